"""Prints pip constraints that hold every requirement of the project, and of the
extras named, at its lower bound: `lower_bounds.py pyproject.toml test`.
"""

import re
import sys
import tomllib
from pathlib import Path


def lower_bounds(pyproject: Path, *extras: str) -> list[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    pins = []
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += optional[extra]
    for requirement in requirements:
        if own := re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", requirement):
            pins += lower_bounds(pyproject, *own[1].split(","))
        elif bound := re.match(r"([\w.-]+)(?:\[.*\])?(?:>=|==)([\w.]+)", requirement):
            pins.append(f"{bound[1]}=={bound[2]}")
        else:
            raise ValueError(
                f"{pyproject}: {requirement!r} has no lower bound: write name>=version"
            )
    return sorted(set(pins))


if __name__ == "__main__":
    print("\n".join(lower_bounds(Path(sys.argv[1]), *sys.argv[2:])))
