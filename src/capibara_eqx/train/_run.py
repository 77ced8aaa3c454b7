import json
import os
from pathlib import Path
from typing import Any

from ._checkpoint import Checkpointer
from ._config import RunConfig


class RunFolder:
    """The files of one run: settings, metrics, summary, loss curve, checkpoints.

    Files appear whole or not at all; metrics are appended line by line.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_path = path / "config.json"
        self.metrics_path = path / "metrics.jsonl"
        self.summary_path = path / "summary.json"
        self.plot_path = path / "loss.png"
        self.checkpoints_path = path / "checkpoints"

    @staticmethod
    def create(path: str | os.PathLike[str], config: RunConfig) -> "RunFolder":
        """Start a new run in `path`, which must not exist or be empty.

        **Raises:**

        `FileExistsError` if something is there already.
        """
        run = RunFolder(Path(path))
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise FileExistsError(
                f"The run folder {run.path} exists and is not empty. Choose another "
                "with --out, or continue the run in it with "
                f"`capibara train --resume {run.path}`."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        _write_json(run.config_path, config.to_dict())
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
        try:
            values = json.loads(run.config_path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{run.config_path} is no JSON ({error}). The run cannot be continued; "
                "start a new one."
            ) from error
        return run, RunConfig.from_dict(values)

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

    def checkpoints(self) -> Checkpointer:
        """The run's checkpoints."""
        return Checkpointer(self.checkpoints_path)

    def append_metrics(self, values: dict[str, int | float]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, int | float]]:
        """All whole lines of metrics.jsonl."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line without its end was being written when the process died.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind_metrics(self, step: int) -> None:
        """Forget what was measured after `step`, from where the run goes on."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        _write_text(self.metrics_path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        _write_json(self.summary_path, summary)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
