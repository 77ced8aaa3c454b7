"""The C++ scan in a program of its own, under the compiler's sanitizers.

`native/scan_driver.cc` compares every result and every cotangent with plain loops, so one
run says both that the numbers are right and that nothing undefined made them.
"""

import platform
import shutil
from pathlib import Path

import pytest
from support.processes import run

from capibara_eqx.kernels import _selective_scan
from capibara_eqx.kernels._native._compiler import HEADERS, find_compiler


DRIVER = Path(__file__).with_name("native") / "scan_driver.cc"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    # The library's own liberties with arithmetic.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-pthread",
)

pytestmark = pytest.mark.slow


def build(folder, *flags):
    compiler = find_compiler()
    assert compiler is not None, "these tests need a C++ compiler"
    program = folder / "driver"
    includes = [f"-I{path}" for path in (HEADERS, *_selective_scan.__path__)]
    done = run(*compiler.command, *FLAGS, *flags, *includes, DRIVER, "-o", program)
    assert done.returncode == 0, done.stdout
    return program


def call(program, *wish):
    done = run(program, *wish)
    if "unexpected memory mapping" in done.stdout and shutil.which("setarch"):
        # Older thread sanitizers fail where the kernel scatters addresses too widely.
        done = run("setarch", platform.machine(), "-R", program, *wish)
    return done


def assert_sound(program):
    done = call(program)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"


def assert_notices(program, wish, message):
    done = call(program, wish)
    assert done.returncode != 0
    assert message in done.stdout


def test_addresses_and_undefined_behaviour(tmp_path):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(tmp_path, "-march=native", *flags)
    assert_sound(program)
    assert_notices(program, "overrun", "heap-buffer-overflow")
    assert_notices(program, "spoil", "dA: off by 1.00e-02")


def test_threads(tmp_path):
    program = build(tmp_path, "-march=native", "-fsanitize=thread")
    assert_sound(program)
    assert_notices(program, "race", "data race")


def test_the_smallest_registers(tmp_path):
    """Without what this processor has beyond the least of its kind."""
    program = build(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    assert_sound(program)
