import numpy as np
import pytest
from support.expert_oracle import experts as one_by_one

from benchmarks import _expert_oracle, _harness, moe


SHAPES = {
    "x": (6, 3),
    "weights": (6, 2),
    "gate": (4, 5, 3),
    "up": (4, 5, 3),
    "down": (4, 3, 5),
}
TRIAL = _harness.Settings(quick=True, rounds=1, calls=1, turn_s=0.0, budget_s=60.0)


def inputs():
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    indices = np.argsort(rng.normal(size=(6, 4)), axis=-1)[:, :2]
    return indices, arrays, rng


def test_the_oracle_agrees_with_a_loop_over_tokens():
    indices, arrays, _ = inputs()
    want, _ = one_by_one(arrays, indices)
    np.testing.assert_allclose(_expert_oracle.experts(indices, **arrays), want)


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradients_of_the_oracle_are_the_slopes_of_its_result(name):
    indices, arrays, rng = inputs()
    dy = rng.normal(size=SHAPES["x"])
    y, gradients = _expert_oracle.experts_gradients(indices, **arrays, dy=dy)
    np.testing.assert_allclose(y, _expert_oracle.experts(indices, **arrays))
    direction, small = rng.normal(size=SHAPES[name]), 1e-6

    def moved(sign):
        changed = arrays | {name: arrays[name] + sign * small * direction}
        return np.sum(dy * _expert_oracle.experts(indices, **changed))

    slope = (moved(1) - moved(-1)) / (2 * small)
    gradient = gradients[list(SHAPES).index(name)]
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-6)


def test_every_implementation_is_measured_and_right():
    found = list(moe.measure(TRIAL))
    names = ["ragged", "capacity", "dense", "scan", "reference", "lax_ragged_dot"]
    assert [m.implementation for m in found] == 2 * names
    for measurement in found:
        assert measurement.status == "measured"
        assert measurement.max_error is not None
        assert measurement.max_error < 1e-6
