import gc
import itertools
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

# In the environment, and before jax is imported, so that the processes that tests
# start share these settings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Compiled code need not know which line of Python it comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Whether everything compiles as users compile it, as in `make test-all`.
OPTIMISED = "CAPIBARA_TEST_OPTIMISED" in os.environ
# XLA's older way to fuse operations compiles in two thirds of the time. jaxlib 0.12 has
# forgotten it, and an unknown flag ends the process.
OLD_FUSION = "--xla_cpu_use_fusion_emitters=false"
HAS_OLD_FUSION = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
# Eight devices, for what is sharded; everything else runs on the first, and takes no
# longer than with two.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *([OLD_FUSION] if HAS_OLD_FUSION and not OPTIMISED else []),
    )
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: NPROC sizes XLA's pools, down to a thread a device.
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings
from jaxtyping import PRNGKeyArray


IN_CI = os.environ.get("CI") == "true"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("capibara", deadline=None, derandomize=IN_CI, max_examples=30)
settings.load_profile("capibara")


def pytest_collection_finish() -> None:
    """What has been imported stays, and is not looked through for garbage again.

    Traces are many small objects: with Python's own thresholds the search takes a
    fourteenth of the time of the tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def seed_of(nodeid: str) -> int:
    replayed = os.environ.get("CAPIBARA_TEST_SEED")
    if replayed is not None:
        return int(replayed)
    return zlib.crc32(nodeid.encode()) if IN_CI else secrets.randbelow(2**32)


# Linux lets a process have 65530 memory maps; a compiled function takes about seven.
MOST_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def room_for_compiled_functions() -> Iterator[None]:
    """Forgets them between files before there are too many: jaxlib would crash."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# Everything else is put together of kernels, whose values are tested by themselves.
# Here it counts what is computed, once and on a handful of numbers; without the
# optimiser of machine code that compiles in two thirds of the time. Arrays are tested
# to be the same to the bit, compiled or not, as users compile them, and runs of the
# command to be so, of which some are made before this is set.
OPTIMISED_FOLDERS = ("arrays", "benchmarks", "cli", "kernels")


@pytest.fixture(autouse=True, scope="module")
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    plain = request.path.parent.name not in OPTIMISED_FOLDERS and not OPTIMISED
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], PRNGKeyArray]:
    """A function that returns a new `jax.random` key at every call.

    The keys follow from one seed a test, new at every run (in CI: fixed by the
    test's name). A failure's report shows the seed, and the test runs again with the
    same keys under `CAPIBARA_TEST_SEED=<seed>`. In a `hypothesis` test draw an
    integer seed instead, so that a failing example stays the same.
    """
    seed = seed_of(request.node.nodeid)
    print(f"getkey: run this again with CAPIBARA_TEST_SEED={seed}")
    root = jax.random.key(seed)
    calls: Iterator[int] = itertools.count()
    return lambda: jax.random.fold_in(root, next(calls))
