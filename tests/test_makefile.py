import os
import shutil
import sys
from pathlib import Path

import pytest
from support.processes import ROOT, run


pytestmark = pytest.mark.skipif(
    shutil.which("make") is None, reason="make is not installed"
)

EXTRAS = {
    "demo": "train",
    "test": "test",
    "test-all": "test",
    "test-gpu": "test",
    "tune": "test",
    "check": "dev",
    "format": "dev",
    "notebooks": "notebooks",
    "bench": "peers",
    "evidence": "peers",
    "docs": "docs",
}

# Stands for a Python of a given version. What it makes of a virtual environment is
# a `python` that has pip, and whose `pip install` writes a log.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
    *version_info*) echo {version} ;;
    *ensurepip*) exit {no_ensurepip} ;;
    "-m venv"*)
        mkdir -p .venv/bin
        if [ {no_ensurepip} = 0 ]; then cp {good} .venv/bin/python
        else exit 1; fi ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder, with a space in its name, that has what the set-up reads."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    return folder


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_python(folder: Path, version: str, *, ensurepip: bool = True) -> Path:
    good = executable(
        folder / "good-python", f'#!/bin/sh\necho "venv $*" >> {folder}/log\n'
    )
    text = FAKE_PYTHON.format(
        log=folder / "log", version=version, no_ensurepip=int(not ensurepip), good=good
    )
    return executable(folder / "fake-python", text)


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_an_old_python_is_named_with_the_way_out(checkout, tmp_path, version):
    python = fake_python(tmp_path, version)
    result = run("make", "demo", f"PY={python}", cwd=checkout)
    assert result.returncode != 0
    assert f"need Python >= 3.11, found {version} ({python});" in result.stdout
    assert "try: make demo PY=python3.12" in result.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.20"])
def test_a_newer_python_makes_the_environment(checkout, tmp_path, version):
    python = fake_python(tmp_path, version)
    result = run("make", ".venv/.stamps/train", f"PY={python}", cwd=checkout)
    assert result.returncode == 0, result.stdout
    log = (tmp_path / "log").read_text()
    assert "-m venv --clear .venv" in log
    assert log.count("venv -m pip install") == 1
    assert log.rstrip().endswith("--editable .[train]")


def test_a_python_that_does_not_exist_is_named(checkout):
    result = run("make", "test", "PY=no-such-python", cwd=checkout)
    assert result.returncode != 0
    assert "no-such-python does not run: install Python >= 3.11" in result.stdout
    assert "make test PY=python3.12" in result.stdout


def test_a_missing_venv_module_names_the_package(checkout, tmp_path):
    python = fake_python(tmp_path, "3.11", ensurepip=False)
    result = run("make", "demo", f"PY={python}", cwd=checkout)
    assert result.returncode != 0
    assert "sudo apt install python3-venv" in result.stdout
    assert "python3.11-venv" in result.stdout
    assert not (checkout / ".venv").exists()


def test_a_half_made_environment_is_made_again(checkout, tmp_path):
    # What Debian's python3 leaves behind without ensurepip: a python without pip.
    half = checkout / ".venv" / "bin"
    half.mkdir(parents=True)
    executable(half / "python", "#!/bin/sh\nexit 1\n")
    bad = fake_python(tmp_path, "3.11", ensurepip=False)
    result = run("make", "demo", f"PY={bad}", cwd=checkout)
    assert "sudo apt install python3-venv" in result.stdout
    good = fake_python(tmp_path, "3.11")
    result = run("make", ".venv/.stamps/train", f"PY={good}", cwd=checkout)
    assert result.returncode == 0, result.stdout
    assert "venv -m pip install" in (tmp_path / "log").read_text()


def test_a_failed_install_is_tried_again(checkout, tmp_path):
    python = fake_python(tmp_path, "3.11")
    target = ("make", ".venv/.stamps/train", f"PY={python}")
    executable(
        tmp_path / "good-python",
        '#!/bin/sh\ncase "$*" in *install*) exit 1;; esac\n',
    )
    assert run(*target, cwd=checkout).returncode != 0
    assert not (checkout / ".venv/.stamps/train").exists()
    shutil.copy(python, checkout / ".venv/bin/python")
    assert run(*target, cwd=checkout).returncode == 0


def set_up(checkout: Path) -> None:
    stamps = checkout / ".venv" / ".stamps"
    stamps.mkdir(parents=True)
    for name in ("venv", *EXTRAS.values()):
        (stamps / name).touch()


@pytest.mark.parametrize(("target", "extra"), EXTRAS.items())
def test_nothing_is_set_up_twice(checkout, target, extra):
    set_up(checkout)
    planned = run("make", "--dry-run", target, cwd=checkout)
    assert planned.returncode == 0, planned.stdout
    assert "pip" not in planned.stdout
    assert "venv --clear" not in planned.stdout
    assert ".venv/bin/" in planned.stdout

    stamp = checkout / ".venv" / ".stamps" / extra
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / "pyproject.toml", (later, later))
    planned = run("make", "--dry-run", target, cwd=checkout)
    assert planned.stdout.count("pip install") == 1
    assert f"'.[{extra}]'" in planned.stdout


def test_tests_run_in_two_passes(checkout):
    set_up(checkout)
    plan = run("make", "--dry-run", "test", cwd=checkout).stdout.splitlines()
    with_hook, without_hook = (line for line in plan if "pytest" in line)
    assert '-m "not errors and not slow"' in with_hook
    assert "--jaxtyping-packages=capibara_eqx,beartype.beartype" in with_hook
    assert '-m "errors and not slow"' in without_hook
    assert "jaxtyping" not in without_hook


def test_help_lists_every_target(checkout):
    listed = run("make", cwd=checkout).stdout
    for target in [*EXTRAS, "help", "test-oldest", "clean"]:
        assert f"make {target} " in listed


def test_the_oldest_versions_come_from_the_bounds():
    script = ROOT / ".ci" / "lower_bounds.py"
    result = run(sys.executable, script, ROOT / "pyproject.toml", "test")
    pins = dict(line.split("==") for line in result.stdout.splitlines())
    assert {"jax", "equinox", "jaxtyping", "optax"} <= set(pins)
    assert {"rich", "matplotlib", "orbax-checkpoint", "pytest"} <= set(pins)
    assert "ruff" not in pins
    assert "capibara-eqx" not in pins


@pytest.mark.errors
def test_a_requirement_without_a_bound_is_refused(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "x"\ndependencies = ["jax"]\n'
        "[project.optional-dependencies]\n"
    )
    script = ROOT / ".ci" / "lower_bounds.py"
    result = run(sys.executable, script, project)
    assert result.returncode != 0
    assert "'jax' has no lower bound" in result.stdout


@pytest.mark.slow
def test_the_demo_sets_itself_up(tmp_path):
    folder = tmp_path / "a checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    first = run("make", "demo", "ARGS=--help", f"PY={sys.executable}", cwd=folder)
    assert first.returncode == 0, first.stdout
    assert "usage: capibara demo" in first.stdout
    again = run("make", "demo", "ARGS=--help", cwd=folder)
    assert again.returncode == 0, again.stdout
    assert "Installing" not in again.stdout
