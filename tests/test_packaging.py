import json
import sys
import zipfile

import pytest
from support.processes import ROOT, run, run_python

import capibara_eqx


SUBPACKAGES = ["cli", "kernels", "layers", "models", "train"]
HEAVY = {"pydantic", "yaml", "rich", "matplotlib", "orbax", "torch"}

# Makes packages look as if they were not installed.
BLOCK = """
import importlib.abc

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def modules_after(code: str) -> set[str]:
    """The top-level packages that an interpreter has loaded after `code`."""
    result = run_python(code + "\nimport json; print(json.dumps(sorted(sys.modules)))")
    assert result.returncode == 0, result.stdout
    names = json.loads(result.stdout.splitlines()[-1])
    return {name.split(".")[0] for name in names}


def test_the_package_alone_is_light():
    loaded = modules_after("import capibara_eqx")
    assert "capibara_eqx" in loaded
    assert not loaded & ({"jax", "equinox", "numpy", "optax", "jaxtyping"} | HEAVY)


def test_sub_packages_need_runtime_dependencies_only():
    """`train` too, until it is used."""
    loaded = modules_after(
        "import capibara_eqx.kernels, capibara_eqx.layers, capibara_eqx.models\n"
        "import capibara_eqx.transforms, capibara_eqx.train"
    )
    assert "jax" in loaded
    assert not loaded & HEAVY


def test_sub_packages_are_attributes():
    names = ", ".join(f"capibara_eqx.{name}.__name__" for name in SUBPACKAGES)
    result = run_python(f"import capibara_eqx; print({names})")
    assert result.stdout.split() == [f"capibara_eqx.{name}" for name in SUBPACKAGES]


def test_sub_packages_are_listed():
    assert set(SUBPACKAGES) <= set(dir(capibara_eqx))
    assert "__version__" in dir(capibara_eqx)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'layer'.*cli, interop, kernels, layers"):
        getattr(capibara_eqx, "layer")  # noqa: B009


@pytest.mark.parametrize(
    ("module", "package"),
    [("rich", "rich"), ("matplotlib.pyplot", "matplotlib"), ("orbax.a.b", "orbax")],
)
def test_a_missing_extra_names_the_command_that_installs_it(module, package):
    result = run_python(
        BLOCK.format(blocked={package})
        + "from capibara_eqx.internal import require_extra\n"
        f"try:\n    require_extra({module!r}, 'train')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert result.stdout == (
        f"capibara_eqx.train needs {package}, which is not installed: "
        "pip install 'capibara-eqx[train]'\n"
    )


def test_a_broken_extra_is_not_called_missing(tmp_path):
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    result = run_python(
        "from capibara_eqx.internal import require_extra\n"
        "try:\n    require_extra('broken', 'train')\n"
        "except ImportError as error:\n    print(error)\n",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout == "No module named 'not_there_at_all'\n"


def test_an_installed_extra_is_returned():
    result = run_python(
        "from capibara_eqx.internal import require_extra\n"
        "print(require_extra('os.path', 'train') is sys.modules['os.path'])\n"
    )
    assert result.stdout == "True\n"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    build = ("pip", "wheel", "--no-deps", "--wheel-dir", tmp_path)
    result = run(sys.executable, "-m", *build, ROOT)
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"capibara_eqx-{capibara_eqx.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"capibara_eqx-{capibara_eqx.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "capibara_eqx").rglob("*")
        if path.suffix in (".py", ".cc", ".h", ".json") or path.name == "py.typed"
    }
    assert {name for name in names if not name.startswith(f"{info}/")} == source
    assert "capibara_eqx/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert "capibara = capibara_eqx.cli:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    required = [
        line.removeprefix("Requires-Dist: ").split(">=")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(required) == ["equinox", "jax", "jaxtyping", "lineax", "optax"]
