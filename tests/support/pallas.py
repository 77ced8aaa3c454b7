"""The Pallas kernels, and where tests can lower and run each."""

import pytest
from support.kernel_cases import FUSED

from capibara_eqx.kernels._selective_scan import pallas_gpu, pallas_tpu


PLATFORMS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}
MODULES = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}

# On a CPU a kernel is interpreted.
INTERPRETED = FUSED == "cpu"


def _skip(name: str, *, run: bool):
    """Why a test of a kernel cannot be, if it cannot."""
    reason = MODULES[name].unavailable()
    if reason is None and run and not INTERPRETED and name != FUSED:
        reason = f"the tests run on {PLATFORMS[FUSED]}"
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def _each(*, run: bool):
    kernels = [pytest.param(name, marks=_skip(name, run=run)) for name in PLATFORMS]
    return pytest.mark.parametrize("implementation", kernels)


# For tests that run a kernel, and for those that only lower it.
each_run = _each(run=True)
each_lowered = _each(run=False)
