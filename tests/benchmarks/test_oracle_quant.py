import numpy as np
import pytest
from support import packed_oracle as loops

from benchmarks import _harness, _packed_oracle, quant_matmul
from capibara_eqx.kernels._quant_matmul import cpu


TRIAL = _harness.Settings(quick=True, rounds=1, calls=1, turn_s=0.0, budget_s=60.0)


@pytest.mark.parametrize("group_size", [None, 4, 32])
def test_the_oracle_agrees_with_a_loop_over_elements(group_size):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 10)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.0, (3, -(-10 // (group_size or 10))))
    packed = np.stack([loops.pack(row, 4) for row in codes])
    options = {"bits": 4, "size": 10, "group_size": group_size}
    want = loops.matrix(packed, scale, None, **options)
    np.testing.assert_array_equal(
        _packed_oracle.matrix(codes, scale, group_size, 8), want
    )
    x = rng.standard_normal((4, 10))
    np.testing.assert_allclose(
        _packed_oracle.round_tokens(x), loops.round_tokens(x), rtol=1e-14
    )


def test_every_implementation_is_measured_and_right():
    found = list(quant_matmul.measure(TRIAL))
    names = ["float32", "xla", "reference"]
    ours = ["float32", "cpu", "xla", "reference"]
    assert [m.implementation for m in found] == [*ours, *names]
    for measurement in found:
        if measurement.implementation == "cpu" and cpu.unavailable() is not None:
            assert measurement.status == "missing"
            continue
        assert measurement.status == "measured"
        assert measurement.max_error is not None
        assert measurement.max_error < 1e-6
