"""Compilers that are of no use or interrupted, and the scan without and with one."""

import json
import os
import shlex
import time

import pytest
from support.processes import run_python

from capibara_eqx.kernels._native import _compiler, handlers
from capibara_eqx.kernels._native._compiler import Compiler, find_compiler


# Compilers that are of no use.


def test_a_compiler_that_fails_is_quoted_once(machine):
    machine.behave("echo 'answer.cc:1: no brain found' >&2; exit 3")
    with pytest.warns(UserWarning, match="could not be compiled") as caught:
        reason = machine.assert_unavailable(str(machine.compiler), "exit status 3")
    (warning,) = caught
    for words in ("answer.cc of _tiny", "no brain found", str(machine.source), "-O3"):
        assert words in str(warning.message)
    # Any warning is an error from here on.
    assert machine.assert_unavailable() == reason
    assert machine.calls() == 1
    machine.assert_nothing_left()


@pytest.mark.parametrize(
    "behaviour",
    ["exit 0", 'printf junk > "$target"; exit 0', 'printf junk > "$target"; exit 1'],
)
def test_a_compiler_that_makes_no_library(machine, behaviour):
    machine.behave(behaviour)
    with pytest.warns(UserWarning, match="answer.cc"):
        machine.assert_unavailable()
    assert list(machine.scratch.iterdir()) == []


def test_a_compiler_that_cannot_be_run(machine):
    compiler = find_compiler()
    machine.compiler.unlink()
    assert compiler is not None
    with pytest.raises(_compiler.CompileError, match=str(machine.compiler)):
        compiler.compile(machine.source, machine.folder / "out.so")


@pytest.mark.parametrize("name", ["/nowhere/c++", "no-such-compiler -O1", "c++ '"])
def test_a_compiler_that_does_not_exist(machine, monkeypatch, name):
    monkeypatch.setenv("CXX", name)
    find_compiler.cache_clear()
    machine.assert_unavailable("C++ compiler", "$CXX")
    machine.assert_nothing_left()


@pytest.mark.parametrize("blank", ["", " "])
def test_without_a_choice_the_system_has_a_compiler(machine, monkeypatch, blank):
    for name in ("g++", "clang++"):
        path = machine.folder / name
        path.write_bytes(machine.compiler.read_bytes())
        path.chmod(0o755)
    monkeypatch.setenv("CXX", blank)
    monkeypatch.setenv("PATH", f"{machine.folder}:{os.environ['PATH']}")
    for name in ("c++", "g++", "clang++"):
        find_compiler.cache_clear()
        found = find_compiler()
        assert found == Compiler((str(machine.folder / name),), "fake 1.0\n")
        monkeypatch.setenv("PATH", str(machine.folder))
        (machine.folder / name).unlink()
    find_compiler.cache_clear()
    assert find_compiler() is None


def test_a_compiler_that_hangs_is_given_up(machine, monkeypatch):
    assert find_compiler() is not None
    monkeypatch.setattr(_compiler, "_TIMEOUT_S", 0.3)
    machine.behave("exec sleep 20")
    with pytest.warns(UserWarning, match="timed out"):
        machine.assert_unavailable("timed out")
    machine.assert_nothing_left()


def test_what_a_hanging_compiler_has_started_ends_with_it(machine, monkeypatch):
    assert find_compiler() is not None
    monkeypatch.setattr(_compiler, "_TIMEOUT_S", 0.2)
    survived = machine.folder / "survived"
    machine.behave(f"(sleep 0.6; touch {shlex.quote(str(survived))}) & wait; exit 1")
    with pytest.warns(UserWarning, match="timed out"):
        machine.assert_unavailable("timed out")
    time.sleep(0.8)
    assert machine.calls() == 1
    assert not survived.exists()


def test_a_compiler_that_hangs_before_it_compiles_is_given_up(machine, monkeypatch):
    monkeypatch.setattr(_compiler, "_TIMEOUT_S", 0.3)
    machine.versions("exec sleep 20")
    machine.assert_unavailable("no C++ compiler")
    assert machine.calls() == 0


# Compilers that are interrupted.


def test_an_interrupted_compiler_leaves_nothing(machine, monkeypatch):
    def interrupted(compiler, source, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handlers(machine.source, ())
    machine.assert_nothing_left()
    # Nor is it taken for a failure.
    handlers(machine.source, ())
    machine.assert_whole()


def test_a_process_killed_while_it_compiles_leaves_no_library(machine):
    machine.behave('printf half > "$target"; kill -9 $PPID; exit')
    assert machine.in_another_process().returncode == -9
    assert machine.files() == []
    machine.behave("")
    assert machine.answer() == 42
    assert len(machine.files()) == 2


@pytest.mark.parametrize("writes", [0, 1])
def test_an_interrupted_write_leaves_no_library(machine, monkeypatch, writes):
    done = []

    def replace(old, new):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(new)
        os.rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            machine.answer()
    assert len(machine.files()) == writes
    assert machine.answer() == 42
    machine.assert_whole()
    assert machine.calls() == 2


# The scan itself.

SCAN = """
import json, warnings
import jax, numpy as np
from capibara_eqx.kernels import selective_scan

rng = np.random.default_rng(0)
shapes = {"u": (2, 7, 3), "delta": (2, 7, 3), "A": (3, 4)}
shapes |= {"B": (2, 7, 4), "C": (2, 7, 4)}
arguments = {n: rng.uniform(-1, 0, s).astype(np.float32) for n, s in shapes.items()}
want, _ = selective_scan(**arguments, implementation="reference", delta_softplus=True)

def error(implementation):
    y, _ = selective_scan(
        **arguments, implementation=implementation, delta_softplus=True
    )
    return float(abs(y - want).max())

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    errors = [error(None), error(None), error(("cpu", "xla"))]
    try:
        refusal = error("cpu") and None
    except NotImplementedError as reason:
        refusal = str(reason)
said = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
print(json.dumps([errors, refusal, said]))
"""


def scan(**env):
    done = run_python(SCAN, env=env)
    assert done.returncode == 0, done.stdout
    errors, refusal, said = json.loads(done.stdout.splitlines()[-1])
    # Sums of four products of numbers below one, in float32.
    assert max(errors) < 1e-5
    return refusal, said


def test_the_scan_is_right_without_a_compiler_that_works(machine):
    machine.behave("echo 'cpu.cc:1: no brain found' >&2; exit 3")
    refusal, said = scan()
    assert refusal is not None
    assert "exit status 3" in refusal
    (warning,) = said
    assert "cpu.cc of _selective_scan" in warning
    assert "no brain found" in warning
    machine.assert_nothing_left()


def test_the_scan_is_compiled_by_the_first_process_only(machine, real):
    # Quickly: what it does, not how fast, is asked for.
    machine.behave(f'exec {shlex.join(real.command)} "$@" -O0')
    assert scan() == (None, [])
    assert machine.calls() == 1
    assert len(machine.files()) == 2
    machine.behave("exit 1")
    assert scan() == (None, [])
    assert machine.calls() == 1
