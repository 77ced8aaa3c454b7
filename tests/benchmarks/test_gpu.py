from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _chain, _gpu_cases, _harness, _roofline, gpu, report
from benchmarks._bars import bars
from benchmarks._gpu_cases import BACKWARD, BOTH, FORWARD, SCAN
from benchmarks._records import Measurement
from benchmarks._roofline import Rates, Work
from capibara_eqx.kernels._causal_conv.specs import Spec as ConvSpec
from capibara_eqx.kernels._pallas_gpu_launch import unavailable
from capibara_eqx.kernels._selective_scan.specs import Spec as ScanSpec


TRIAL = _harness.Settings(quick=True, rounds=1, calls=1, turn_s=0.0, budget_s=60.0)
# What rounding the largest number of a result to bfloat16 can make, and little more.
ROUNDING = 2.0**-8 * 1.05

# More tokens and channels than are judged, neither a multiple of a chunk.
SHAPE = ScanSpec("odd", 2, 70, 41, 3)


# The roofline.


def test_work_is_what_one_counts_by_hand():
    # 6 tokens of 4 channels with 5 states; a state is kept every second token.
    forward = _roofline.scan_forward(2, 3, 4, 5, 2, 2)
    streams, weights, states = 2 * 6 * (4 * 4 + 2 * 5), 4 * (20 + 4 + 4), 4 * 2 * 2 * 20
    assert forward == Work(streams + weights + states, 6 * 4 * 7, 6 * 4 * 5 * 4)
    assert _roofline.scan_forward(2, 3, 4, 5, 2, 0).bytes == streams + weights
    streams = 2 * 6 * (7 * 4 + 4 * 5)
    backward = _roofline.scan_backward(2, 3, 4, 5, 2, 2)
    assert backward == Work(streams + 2 * weights + states, 168, 6 * 4 * 5 * 12)
    # 2 tokens, and 2 states of 20 numbers, read and written.
    step = _roofline.scan_step(2, 4, 5, 2)
    assert step == Work(2 * 2 * 26 + weights + 2 * 4 * 2 * 20, 2 * 4 * 7, 2 * 20 * 4)
    # 24 numbers, 4 channels with 5 taps and a bias.
    conv = _roofline.conv_forward(2, 3, 4, 5, 2)
    assert conv == Work(2 * (24 + 24 + 24), 24, 24 * 5)
    conv = _roofline.conv_backward(2, 3, 4, 5, 2)
    assert conv == Work(2 * (3 * 24 + 2 * 24), 24, 3 * 24 * 5)


def test_the_roofline_is_the_largest_part_of_each_pass():
    rates = Rates(1e3, 1e2, 1e4)
    passes = [Work(5, 1, 1), Work(1, 1, 400), Work(1, 4, 1), Work(1, 4, 1)]
    assert _roofline.roofline(passes[:1], rates) == (
        pytest.approx(10.0),
        "exponentials",
    )
    assert _roofline.roofline(passes[1:2], rates) == (
        pytest.approx(40.0),
        "multiply-adds",
    )
    assert _roofline.roofline([Work(7, 0, 0)], rates) == (pytest.approx(7.0), "bytes")
    total, limits = _roofline.roofline(passes[1:], rates)
    assert total == pytest.approx(40.0 + 40.0 + 40.0)
    assert limits == "multiply-adds, then exponentials"


@pytest.mark.parametrize(
    ("kind", "tflops", "exponentials"),
    [
        ("NVIDIA H100 80GB HBM3", 67, 4.18e12),
        ("NVIDIA H200", 67, 4.18e12),
        ("NVIDIA H100 PCIe", 51, 3.20e12),
    ],
)
def test_rates_agree_with_the_data_sheets(kind, tflops, exponentials):
    rates = _roofline.rates(kind, 3e12)
    assert rates is not None
    assert rates.bytes == 3e12
    assert 2 * rates.multiply_adds == pytest.approx(tflops * 1e12, rel=0.01)
    assert rates.exponentials == pytest.approx(exponentials, rel=0.01)


def of_race(kind):
    spec = {"name": "mamba_130m_batch"}
    found = [
        Measurement(SCAN, "pallas_gpu", spec, FORWARD, median_ms=0.5),
        Measurement(SCAN, "xla", spec, FORWARD, status="missing", reason="why"),
        Measurement(
            *(SCAN, "copy", spec | {"bytes_per_call": 2 * 10**9}, FORWARD),
            median_ms=1.0,
        ),
    ]
    work = Work(10**9, 0, 0)
    return gpu.with_roofline(found, [work], kind)


def test_bytes_take_as_long_as_those_of_the_copy_beside_them():
    ours, missing, copy = of_race("NVIDIA H200")
    assert (ours.roofline_ms, ours.roofline_of) == (0.5, "bytes")
    assert (missing.roofline_ms, missing.roofline_of) == (None, None)
    assert (copy.roofline_ms, copy.roofline_of) == (None, None)


def test_there_is_no_roofline_of_an_unknown_chip_and_no_claim():
    ours, *_ = found = of_race("NVIDIA A100-SXM4-40GB")
    assert ours.roofline_ms is None
    assert "NVIDIA A100-SXM4-40GB" in str(ours.roofline_of)
    assert list(bars(found)) == []


@pytest.mark.parametrize(("ms", "passed"), [(0.9, True), (1.1, False)])
def test_the_claims_follow_from_times_and_rooflines(ms, passed):
    ours, *others = of_race("NVIDIA H200")
    backward = replace(ours, mode=BACKWARD, roofline_ms=1.0, median_ms=2.0)
    found = {b.name: b for b in bars([replace(ours, median_ms=ms), backward, *others])}
    assert set(found) == {"roofline_forward", "roofline_backward"}
    assert found["roofline_forward"].value == pytest.approx(2 * ms)
    assert found["roofline_forward"].passed == passed
    assert found["roofline_backward"].value == 2.0
    assert found["roofline_backward"].passed


# The chain.


def test_a_chain_is_of_that_many_calls_also_of_what_could_be_kept():
    calls = []

    def count(x):
        calls.append(1)
        return x + 1

    def function(x, other):
        # Of the larger argument alone, which is the same in every call.
        return jax.pure_callback(count, x, x), other * 2

    x, other = jnp.arange(4.0), jnp.ones(())
    chain = jax.jit(lambda *args: _chain.repeat(function, 7, *args))
    got = jax.block_until_ready(chain(jnp.zeros(()), x, other))
    assert len(calls) == 7
    np.testing.assert_array_equal(got[0], x + 1)
    np.testing.assert_array_equal(got[1], 2)


def test_each_call_gets_something_of_the_one_before():
    # A zero that is none shows what is passed on: 2 of 3 calls add twice their sum.
    chain = jax.jit(lambda *args: _chain.repeat(lambda x, y: x + y, 3, *args))
    assert chain(jnp.full((), 2.0), jnp.zeros(()), jnp.ones(2))[0] == 1 + 2 + 6


def test_a_chain_is_timed_by_the_call():
    prepared = _chain.chained(lambda x: x * 2, jnp.ones(3), at_least_s=1e-3)
    assert 1 <= prepared.calls <= 1000
    fixed = _harness.Prepared(lambda: np.ones(()), calls=1000)
    alone = replace(fixed, calls=1)
    contenders = [
        _harness.Contender(name, lambda own=own: own)
        for name, own in (("many", fixed), ("one", alone))
    ]
    entries = _harness.entries({"name": "s"}, contenders, lambda: np.ones(()))
    many, one = _harness.race(TRIAL, "operation", "forward", entries)
    assert many.median_ms is not None
    assert one.median_ms is not None
    assert many.median_ms < one.median_ms / 10


# The subject.


def test_without_a_gpu_nothing_is_recorded_and_the_reason_is_said(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert list(gpu.measure(TRIAL)) == []
    assert "needs an NVIDIA GPU, and jax runs on cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_every_operation_and_mode_with_its_error():
    found = list(gpu.compare(TRIAL, ["xla"]))
    assert {(m.operation, m.mode) for m in found} == {
        *((operation, mode) for operation in list(gpu.HEADINGS)[:2] for mode in MODES),
        (_gpu_cases.STEP, "step"),
    }
    for m in found:
        assert m.status == "measured"
        assert m.median_ms is not None
        assert m.median_ms > 0
        assert m.max_error is not None
        assert m.max_error <= (ROUNDING if m.implementation == "xla" else 0)


MODES = (FORWARD, BACKWARD, BOTH)


def error(case, implementation, mode, spoil=lambda results: results):
    prepared = gpu.prepare(case, implementation, mode, 1e-4)
    assert prepared.outputs is not None
    results = prepared.outputs(spoil(prepared.run()))
    return _harness.max_error(results, case.expected(mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_larger_scan_is_judged_rightly(mode):
    case = _gpu_cases.scan_case(SHAPE)
    assert error(case, "xla", mode) < ROUNDING


@pytest.mark.parametrize("at", range(8))
def test_a_wrong_gradient_is_noticed(at):
    case = _gpu_cases.scan_case(SHAPE)

    def spoil(gradients):
        return [g * 1.05 if k == at else g for k, g in enumerate(gradients)]

    assert error(case, "xla", BACKWARD, spoil) > 0.04


@pytest.mark.skipif(unavailable() is not None, reason="needs a newer jax")
def test_the_kernels_of_a_gpu_interpreted():
    conv = _gpu_cases.conv_case(ConvSpec("tiny", 2, 9, 5, 5, 4, groups=5))
    assert error(conv, "pallas_gpu", BOTH) < ROUNDING
    step = _gpu_cases.step_case(2, 5, 3)
    assert error(step, "pallas_gpu", "step") < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_scan_of_a_gpu_interpreted(mode):
    case = _gpu_cases.scan_case(ScanSpec("tiny", 2, 19, 3, 4))
    assert error(case, "pallas_gpu", mode) < ROUNDING


# The page.


def record(measurement, device="gpu-a"):
    common = {"kind": "measurement", "device": {"kind": device, "model": "b"}}
    common["device"] |= {"cores": 2}
    common |= {"commit": "c" * 40, "dirty": False, "versions": {"jax": "1"}, "run": "1"}
    return {**common, **vars(measurement)}


def filled(measurements):
    return [replace(m, max_error=1e-3, evaluation_ms=[1.0]) for m in measurements]


def test_the_page_shows_the_share_of_the_roofline():
    page = report.render(map(record, filled(of_race("NVIDIA H200"))))
    assert "### The selective scan on a GPU" in page
    assert "| roofline, ms | share of it | GB/s |" in page
    assert "| 0.5 (bytes) | 100% |  |" in page
    assert "| 2,000 |" in page


def test_the_page_says_why_there_is_no_roofline():
    page = report.render(map(record, filled(of_race("some GPU"))))
    assert "share of it" not in page
    assert "No roofline: the rates of some GPU are not in the table." in page
