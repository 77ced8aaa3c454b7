"""What a measurement depends on: the machine, the versions, the commit, the load."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "numpy",
    "torch",
    "mambapy",
    "transformers",
    "optax",
    "scipy",
    "scikit-learn",
    "higher",
)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device() -> dict[str, Any]:
    """The device that jax computes on; `kind` names the folder of its records."""
    backend = jax.default_backend()
    model = _processor() if backend == "cpu" else jax.devices()[0].device_kind
    kind = f"{backend}-{_slug(model)}"
    if backend == "cpu":
        kind += f"-{cores()}-cores"
    return {
        "kind": kind,
        "platform": backend,
        "model": model,
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Version of Python and of every package that is measured, `None` if absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any]:
    """The commit that is measured, and whether the tree differs from it.

    Records do not count as a difference, or a second run would never be clean.
    """
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {"commit": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": revision, "dirty": bool(changes)}


@dataclass(frozen=True)
class Load:
    """Processor time so far, in seconds: of all processes, and of this one alone."""

    busy: float
    own: float
    total: float

    @classmethod
    def now(cls) -> "Load | None":
        """The counters as they stand, `None` where the system does not tell."""
        if not sys.platform.startswith("linux"):
            return None
        ticks = [
            int(v) for v in Path("/proc/stat").read_text().split("\n")[0][4:].split()
        ]
        second = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user.
        total, idle = sum(ticks[:8]), ticks[3] + ticks[4]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return cls((total - idle) / second, own, total / second)

    def of_others(self, later: "Load | None") -> float | None:
        """Share of the machine that others used between this moment and `later`."""
        if later is None or later.total <= self.total:
            return None
        others = (later.busy - self.busy) - (later.own - self.own)
        return round(max(others, 0.0) / (later.total - self.total), 3)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
