import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ._files import write_json
from ._sine_comparison import SINE_STEPS, SineConfig, SineResult


# After a write that failed.
AGAIN = "compare again, with `capibara adapt`"


class SineFolder:
    """The files of a comparison on sines: adaptation.json and adaptation.png."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.record_path = self.path / "adaptation.json"
        self.plot_path = self.path / "adaptation.png"

    @staticmethod
    def create(path: str | os.PathLike[str]) -> "SineFolder":
        """A new folder in `path`, which must not exist or be empty.

        **Raises:**

        `FileExistsError` if something is there already, `OSError` if it cannot be
        written.
        """
        folder = SineFolder(path)
        if folder.path.exists() and (
            not folder.path.is_dir() or any(folder.path.iterdir())
        ):
            raise FileExistsError(
                f"The folder {folder.path} exists and is not empty. Choose another "
                "with --out."
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self, config: SineConfig, results: Sequence[SineResult]) -> None:
        """Write adaptation.json, of all methods so far."""
        settings = {
            "iterations": config.iterations,
            "shots": config.shots,
            "seed": config.seed,
        }
        record = {
            "settings": settings,
            "methods": {result.method: _summary(result) for result in results},
            "versions": {"capibara_eqx": __version__},
        }
        write_json(self.record_path, record, AGAIN)


def _summary(result: SineResult) -> dict[str, Any]:
    steps = range(SINE_STEPS + 1)
    return {
        "iterations": result.iterations,
        "seconds": result.seconds,
        "rates": result.rates,
        "tasks": len(result.errors),
        "mse": [result.mean(step) for step in steps],
        "mse_95_percent": [result.margin(step) for step in steps],
    }
