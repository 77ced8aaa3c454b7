import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent

# What an outer `make` or `pytest` leaves in the environment of its children.
OUTER = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PY", "ARGS", "VENV")


def run(
    *command: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a command as if from a fresh shell; `stderr` is part of `stdout`."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in OUTER and not name.startswith("PYTEST_")
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def run_python(code: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that sees this `src` folder."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    return run(sys.executable, "-c", prelude + code, **options)
