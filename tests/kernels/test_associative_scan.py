"""The associative form of the selective scan: its depth, its work and its memory."""

import functools

import jax
import pytest
from support.kernel_cases import cast, scan_arguments
from support.programs import flops, turns

from capibara_eqx.kernels import selective_scan


def scan(implementation):
    return functools.partial(
        selective_scan, delta_softplus=True, implementation=implementation
    )


def arguments(seq, d_inner=4, d_state=3):
    return cast(scan_arguments((2,), seq, d_inner, d_state), "float32")


def depth(implementation, seq):
    traced = jax.make_jaxpr(lambda given: scan(implementation)(**given))
    return turns(traced(arguments(seq)).jaxpr)


def test_no_loop_grows_with_the_length():
    assert depth("associative", 64) == depth("associative", 1024) == 3  # d_state
    assert depth("xla", 1024) == 1024
    assert depth("reference", 1024) == 1024


def test_work_is_linear_in_the_length():
    count = {
        seq: flops(lambda given: scan("associative")(**given), arguments(seq))
        for seq in (256, 512)
    }
    assert count[512] / count[256] == pytest.approx(2.0, rel=0.02)


def test_memory_does_not_grow_with_the_states():
    def temporary(d_state):
        run = jax.jit(lambda given: scan("associative")(**given)[0])
        lowered = run.lower(arguments(512, 32, d_state))
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # B and C are there with the state index first, but no array as large as the input.
    more = temporary(32) - temporary(2)
    assert more < 0.1 * 30 * (2 * 512 * 32 * 4)
