"""The checker behind `test_architecture.py`: what a source tree imports, and which
of its rules it breaks. It reads files only, so that it runs on any folder.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int


def module_names(package: Path) -> dict[str, Path]:
    """The dotted name of every module under `package`, with its file."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = path
    return modules


def _base_of_relative(importer: str, is_package: bool, level: int) -> str:
    parts = importer.split(".")
    keep = len(parts) - level + (1 if is_package else 0)
    return ".".join(parts[: max(keep, 0)])


def _nearest_module(name: str, modules: Mapping[str, Path]) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def imports_of(importer: str, modules: Mapping[str, Path]) -> Iterator[Import]:
    """The imports of one module that stay inside the tree, wherever they stand."""
    path = modules[importer]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = _base_of_relative(
                    importer, path.name == "__init__.py", node.level
                )
                base = f"{package}.{base}".rstrip(".")
            # `from package import name` means a sub-module where there is one.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            imported = _nearest_module(name, modules)
            if imported is not None:
                yield Import(importer, imported, node.lineno)


def _folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward_imports(package: Path, levels: Mapping[str, int]) -> list[str]:
    """One message for every import of a folder of a higher level, and for every
    folder or module of `package` that `levels` does not know.

    `package/__init__.py` is free on both sides: it only names the sub-packages.
    """
    modules = module_names(package)
    problems = []
    for importer in modules:
        here = _folder(importer)
        if not here:
            continue
        if here not in levels:
            problems.append(f"{modules[importer]}: {here!r} has no level")
            continue
        for found in imports_of(importer, modules):
            there = _folder(found.imported)
            if there and levels.get(there, len(levels)) > levels[here]:
                problems.append(
                    f"{modules[importer]}:{found.line}: {here} may not import "
                    f"{there} ({found.imported}), which is on a higher level"
                )
    return problems


def import_cycles(package: Path) -> list[str]:
    """One message for every loop of modules that import each other, as found by a
    depth-first walk. `package/__init__.py` is left out: its imports are lazy.
    """
    modules = module_names(package)
    graph = {
        importer: sorted(
            {found.imported for found in imports_of(importer, modules)}
            - {package.name, *_own_package(importer, modules)}
        )
        for importer in modules
        if importer != package.name
    }
    finished: set[str] = set()
    problems = []

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            loop = [*path[path.index(module) :], module]
            problems.append(f"import cycle: {' -> '.join(loop)}")
            return
        if module in finished:
            return
        for imported in graph[module]:
            walk(imported, [*path, module])
        finished.add(module)

    for module in graph:
        walk(module, [])
    return problems


def _own_package(importer: str, modules: Mapping[str, Path]) -> set[str]:
    # `from . import _name` in an `__init__.py` whose `_name` is not a module refers
    # to the package itself, which is no cycle.
    return {importer} if modules[importer].name == "__init__.py" else set()


def long_files(
    folders: list[Path], limit: int, exceptions: Mapping[str, int]
) -> list[str]:
    """One message for every Python file over `limit` lines, or over the limit that
    `exceptions` gives to paths that end so.
    """
    problems = []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            allowed = next(
                (own for end, own in exceptions.items() if path.match(end)), limit
            )
            lines = len(path.read_text().splitlines())
            if lines > allowed:
                problems.append(f"{path}: {lines} lines, {allowed} are allowed")
    return problems
