import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._checkpoint import Checkpointer
from ._config import RunConfig
from ._files import read_object, write_json, write_text, writing


# What the loop writes into every line of metrics.jsonl and its readers need.
_METRICS = ("step", "bits_per_byte", "elapsed")
_SUMMARY = {
    "heldout_bits_per_byte": (int, float),
    "references": dict,
    "steps": int,
    "training_seconds": (int, float),
    "tokens_per_second": (int, float),
}


class RunFolder:
    """The files of one run: settings, text, metrics, summary, loss curve, checkpoints.

    Files appear whole or not at all; metrics are appended line by line.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_path = path / "config.json"
        self.text_path = path / "text.json"
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.plot_path = path / "loss.png"
        self.compression_path = path / "compression.json"
        self.checkpoints_path = path / "checkpoints"

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        config: RunConfig,
        text: dict[str, Any] | None = None,
    ) -> "RunFolder":
        """Start a new run in `path`, which must not exist or be empty.

        **Arguments:**

        - `path`: of the folder.
        - `config`: the settings.
        - `text`: what is read, its `source` and `sha256` at least, for `check_text`.

        **Raises:**

        `FileExistsError` if something is there already, `OSError` if it cannot be
        written.
        """
        run = RunFolder(Path(path))
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise FileExistsError(
                f"The run folder {run.path} exists and is not empty. Choose another "
                "with --out, or continue the run in it with "
                f"`capibara train --resume {run.path}`."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        # The settings come last: with them the folder is whole.
        if text is not None:
            write_json(run.text_path, text)
        write_json(run.config_path, config.to_dict())
        return run

    @staticmethod
    def open(path: str | os.PathLike[str]) -> tuple["RunFolder", RunConfig]:
        """An existing run and its settings.

        **Raises:**

        `FileNotFoundError` if there is none in `path`, `ValueError` if its settings
        cannot be read.
        """
        run = RunFolder(Path(path))
        if not run.path.is_dir():
            raise FileNotFoundError(
                f"There is no run folder {run.path}. Make one with `capibara train "
                f"--text FILE --out {run.path}`."
            )
        if not run.config_path.is_file():
            raise FileNotFoundError(
                f"{run.path} is not a whole run folder: config.json is missing. Give "
                "the folder that `capibara train` or `capibara demo` named first."
            )
        remedy = "The run cannot be continued; start a new one."
        values = read_object(run.config_path, remedy)
        try:
            return run, RunConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{run.config_path}: {error}") from error

    def check_config(self, config: RunConfig, given: dict[str, Any]) -> None:
        """Raise `ValueError` if `given` settings differ from those of the run."""
        own = config.to_dict()
        differing = [
            f"{name} is {own[name]!r} there and {value!r} here"
            for name, value in given.items()
            if own[name] != value
        ]
        if differing:
            raise ValueError(
                f"The run in {self.path} belongs to another config: "
                f"{'; '.join(differing)}. Resume it without these flags, or start a "
                "new run with --out."
            )

    def check_text(self, text: dict[str, Any]) -> bool:
        """Compare the text that is read now with the one the run began with.

        **Arguments:**

        - `text`: as for `create`.

        **Returns:**

        Whether there was something to compare with; if not, `text` is noted now.

        **Raises:**

        `ValueError` if it is another text.
        """
        if not self.text_path.exists():
            write_json(self.text_path, text)
            return False
        began = read_object(self.text_path, "Put it back, or start a new run.")
        if began.get("sha256") != text["sha256"]:
            raise ValueError(
                f"The run in {self.path} began with another text: {self.text_path.name}"
                f" names {began.get('source')}, sha256 {began.get('sha256')}, but "
                f"{text['source']} now has sha256 {text['sha256']}. Put the text back "
                "as it was, say with --text where it is now, or start a new run with "
                "--out."
            )
        return True

    def checkpoints(
        self, *, read_only: bool = False, warn: Callable[[str], None] | None = None
    ) -> Checkpointer:
        """The run's checkpoints; `read_only` to leave a running training alone.

        `warn` is told of damaged ones, as in `Checkpointer`.
        """
        return Checkpointer(self.checkpoints_path, read_only=read_only, warn=warn)

    def append_metrics(self, values: dict[str, int | float]) -> None:
        """Add one line to metrics.jsonl."""
        with writing(self.metrics_path):
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, int | float]]:
        """All lines of metrics.jsonl; a last one that is torn is left out.

        **Raises:**

        `ValueError` if another line is damaged.
        """
        if not self.metrics_path.exists():
            return []
        text = self.metrics_path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines(keepends=True)
        metrics = []
        for number, line in enumerate(lines, start=1):
            values = _parse_metrics(line)
            if values is not None:
                metrics.append(values)
            elif number < len(lines):
                raise ValueError(
                    f"Line {number} of {self.metrics_path} is damaged: it must hold a "
                    f"JSON object with the numbers {', '.join(_METRICS)}, got "
                    f"{line[:80]!r}. Delete that line and try again."
                )
        return metrics

    def rewind_metrics(self, step: int) -> None:
        """Forget what was measured after `step`, from where the run goes on."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.metrics_path, text)

    def write_compression(self, values: dict[str, Any]) -> None:
        """Write compression.json, which marks the run as a compressed one."""
        write_json(self.compression_path, values)

    def read_compression(self) -> dict[str, Any]:
        """What compression.json holds.

        **Raises:**

        `ValueError` if it is damaged.
        """
        remedy = "Compress the run again with `capibara quantize`."
        return read_object(self.compression_path, remedy)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        write_json(self.summary_path, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """What summary.json holds, `None` if the run is not finished.

        **Raises:**

        `ValueError` if it is damaged.
        """
        if not self.summary_path.exists():
            return None
        remedy = (
            "Delete it and write it anew with `capibara train --resume "
            f"{self.path}`, which goes on from the last checkpoint."
        )
        summary = read_object(self.summary_path, remedy)
        for name, kind in _SUMMARY.items():
            if not isinstance(summary.get(name), kind):
                found = repr(summary[name]) if name in summary else "nothing"
                raise ValueError(
                    f"{self.summary_path} does not hold `{name}` as `capibara train` "
                    f"writes it, but {found}. {remedy}"
                )
        return summary


def _parse_metrics(line: str) -> dict[str, int | float] | None:
    # A line without its end was being written when the process died.
    if not line.endswith("\n"):
        return None
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(values, dict):
        return None
    whole = all(isinstance(values.get(name), int | float) for name in _METRICS)
    return values if whole else None
