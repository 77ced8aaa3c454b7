"""The C++ scan, dual and packed product by themselves, under the compiler's sanitizers.

`native/*_driver.cc` compare every result and every cotangent with plain loops, so one
run says both that the numbers are right and that nothing undefined made them.
"""

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.processes import run

from capibara_eqx.kernels import _quant_matmul, _selective_scan, _ssd
from capibara_eqx.kernels._native._compiler import HEADERS, find_compiler


SOURCES = Path(__file__).with_name("native")
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


class Driver(NamedTuple):
    """A program, where its kernel lies, and what it says of a wrong number."""

    source: str
    kernel: Sequence[str]
    spoiled: str
    # The instruction that it cannot do without, as Linux calls it.
    needs: str | None = None


DRIVERS = {
    "scan": Driver("scan_driver.cc", _selective_scan.__path__, "dA: off by 1.00e-02"),
    "dual": Driver("dual_driver.cc", _ssd.__path__, "dlog_decay: off by 1.00e-02"),
    "product": Driver(
        "product_driver.cc",
        _quant_matmul.__path__,
        "codes of 4 bits: off by 1.00e+03",
        "avx512_vnni",
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS),
]


def build(driver, folder, *flags):
    compiler = find_compiler()
    assert compiler is not None, "these tests need a C++ compiler"
    info = Path("/proc/cpuinfo")
    known = info.read_text(errors="replace") if info.exists() else ""
    if driver.needs is not None and driver.needs not in known:
        pytest.skip(f"needs a processor with {driver.needs}")
    program = folder / "driver"
    includes = [f"-I{path}" for path in (HEADERS, *driver.kernel)]
    source = SOURCES / driver.source
    done = run(*compiler.command, *FLAGS, *flags, *includes, source, "-o", program)
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


def test_addresses_and_undefined_behaviour(driver, tmp_path):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(driver, tmp_path, "-march=native", *flags)
    assert_sound(program)
    assert_notices(program, "overrun", "heap-buffer-overflow")
    assert_notices(program, "spoil", driver.spoiled)


def test_threads(driver, tmp_path):
    program = build(driver, tmp_path, "-march=native", "-fsanitize=thread")
    assert_sound(program)
    assert_notices(program, "race", "data race")


def test_the_smallest_registers(driver, tmp_path):
    """Without what this processor has beyond the least of its kind."""
    if driver.needs is not None:
        pytest.skip(f"is made of {driver.needs}")
    program = build(
        driver, tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all"
    )
    assert_sound(program)
