from pathlib import Path

import pytest
from support.import_graph import import_cycles, long_files, upward_imports


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "capibara_eqx"

# A folder imports its own level or lower ones.
LEVELS = {
    "internal": 0,
    "kernels": 1,
    "arrays": 2,
    "layers": 3,
    "transforms": 4,
    "meta": 4,
    "models": 5,
    "interop": 6,
    "manifest": 6,
    "train": 7,
    "cli": 8,
}
LINES = 400
# Kernel bodies only, each with the reason beside it; 800 at most.
LONGER: dict[str, int] = {}


def test_no_folder_imports_a_higher_level():
    assert upward_imports(PACKAGE, LEVELS) == []


def test_no_import_cycles():
    assert import_cycles(PACKAGE) == []


def test_no_file_is_too_long():
    folders = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks"]
    assert long_files(folders, LINES, LONGER) == []
    assert all(limit <= 800 for limit in LONGER.values())


def tree(root: Path, files: dict[str, str]) -> Path:
    package = root / "capibara_eqx"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    return package


SOUND = {
    "__init__.py": "from . import layers as layers\n__version__ = '1'\n",
    "internal/_keys.py": "import jax\n",
    "kernels/__init__.py": "from ._scan import scan as scan\n",
    "kernels/_scan/__init__.py": "from .api import scan as scan\n",
    "kernels/_scan/api.py": (
        "from capibara_eqx import __version__\nfrom ...internal import _keys\n"
        "from . import xla\n"
    ),
    "kernels/_scan/xla.py": "import numpy as np\n",
    "layers/__init__.py": "from ._mamba import Mamba as Mamba\n",
    "layers/_mamba.py": (
        "from capibara_eqx.kernels import scan\nfrom ._linear import Linear\n"
    ),
    "layers/_linear.py": "from ..internal._keys import split\n",
    "meta/_adapt.py": "from capibara_eqx.transforms import _freeze\n",
    "transforms/_freeze.py": "import equinox as eqx\n",
}


def test_a_sound_tree_passes(tmp_path):
    package = tree(tmp_path, SOUND)
    assert upward_imports(package, LEVELS) == []
    assert import_cycles(package) == []


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("internal/_keys.py", "import capibara_eqx.kernels\n", 1),
        ("internal/_keys.py", "from capibara_eqx import layers\n", 1),
        ("internal/_keys.py", "import capibara_eqx.layers._mamba as m\n", 1),
        ("kernels/_scan/xla.py", "\nfrom ...layers._linear import Linear\n", 2),
        ("kernels/__init__.py", "from ..layers import Mamba\n", 1),
        ("kernels/_scan/api.py", "from ... import layers\n", 1),
        ("layers/_linear.py", "def f():\n    from ..meta import _adapt\n", 2),
        (
            "layers/_linear.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    import capibara_eqx.transforms\n",
            3,
        ),
        (
            "layers/_linear.py",
            "class A:\n    try:\n        from capibara_eqx.meta._adapt import x\n"
            "    except ImportError:\n        x = None\n",
            3,
        ),
        ("transforms/_freeze.py", "from capibara_eqx.train import fit\n", None),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, text, line):
    files = {**SOUND, "train/_loop.py": "import jax\n", file: text}
    problems = upward_imports(tree(tmp_path, files), LEVELS)
    assert len(problems) == 1
    assert f"{file}:{line or 1}: {file.split('/')[0]} may not import" in problems[0]


@pytest.mark.parametrize("file", ["nets/_mlp.py", "_helpers.py"])
def test_a_folder_without_a_level_is_found(tmp_path, file):
    problems = upward_imports(tree(tmp_path, {**SOUND, file: "import jax\n"}), LEVELS)
    assert problems
    assert all("has no level" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"layers/_linear.py": "from ._mamba import Mamba\n"},
            {"layers._linear", "layers._mamba"},
        ),
        (
            {"layers/_linear.py": "def f():\n    from . import _mamba\n"},
            {"layers._linear", "layers._mamba"},
        ),
        (
            {"layers/_linear.py": "from capibara_eqx.layers import Mamba\n"},
            {"layers._linear", "layers._mamba", "layers"},
        ),
        (
            {"transforms/_freeze.py": "from capibara_eqx.meta._adapt import adapt\n"},
            {"transforms._freeze", "meta._adapt"},
        ),
        (
            {"kernels/_scan/xla.py": "import capibara_eqx.kernels._scan.xla\n"},
            {"kernels._scan.xla"},
        ),
    ],
)
def test_an_import_cycle_is_found(tmp_path, changes, expected):
    problems = import_cycles(tree(tmp_path, {**SOUND, **changes}))
    assert len(problems) == 1
    found = problems[0].removeprefix("import cycle: ").split(" -> ")
    assert found[0] == found[-1]
    assert set(found) == {f"capibara_eqx.{name}" for name in expected}


def test_a_long_file_is_found(tmp_path):
    package = tree(tmp_path, {**SOUND, "kernels/_scan/pallas_gpu.py": "x = 1\n" * 401})
    folders = [package, tmp_path / "absent"]
    assert len(long_files(folders, 401, {})) == 0
    (problem,) = long_files(folders, 400, {})
    assert problem.endswith("pallas_gpu.py: 401 lines, 400 are allowed")
    assert long_files(folders, 400, {"kernels/_scan/pallas_gpu.py": 500}) == []
    assert len(long_files(folders, 400, {"_other/pallas_gpu.py": 500})) == 1
