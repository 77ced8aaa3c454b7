import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.layers import Linear
from capibara_eqx.train import learning_rate_at, make_optimizer, set_learning_rate


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.0),
        (0.05, 0.5),
        (0.1, 1.0),
        # Half of the cosine: the mean of 1 and the final fraction.
        (0.55, 0.6),
        (1.0, 0.2),
        (3.0, 0.2),
    ],
)
def test_schedule_at_known_points(progress, expected):
    rate = learning_rate_at(progress, peak=1.0, warmup_fraction=0.1, final_fraction=0.2)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_schedule_without_warmup_and_all_warmup():
    assert learning_rate_at(0.0, peak=3.0, warmup_fraction=0.0) == pytest.approx(3.0)
    assert learning_rate_at(1.0, peak=3.0, warmup_fraction=1.0) == pytest.approx(0.3)


def _adamw(params, grads, steps, *, rate, decay, decayed, b1, b2, eps, clip):
    """AdamW in float64 NumPy, written from the paper."""
    mean = {k: np.zeros_like(v) for k, v in params.items()}
    square = {k: np.zeros_like(v) for k, v in params.items()}
    for t in range(1, steps + 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = 1.0 if clip is None else min(1.0, clip / norm)
        for k in params:
            g = grads[k] * scale
            mean[k] = b1 * mean[k] + (1 - b1) * g
            square[k] = b2 * square[k] + (1 - b2) * g * g
            m, v = mean[k] / (1 - b1**t), square[k] / (1 - b2**t)
            update = m / (np.sqrt(v) + eps)
            if decayed[k]:
                update = update + decay * params[k]
            params[k] = params[k] - rate * update
    return params


@pytest.mark.parametrize("clip", [None, 0.5])
def test_optimizer_equals_adamw_by_hand(getkey, clip):
    layer = Linear(3, 2, key=getkey())
    grads = jax.tree.map(lambda leaf: jax.random.normal(getkey(), leaf.shape), layer)
    settings = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
    optimizer = make_optimizer(weight_decay=0.3, clip_norm=clip, **settings)
    params = eqx.filter(layer, eqx.is_inexact_array)
    state = set_learning_rate(optimizer.init(params), 0.05)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params)
            params = eqx.apply_updates(params, updates)
    expected = _adamw(
        {k: np.asarray(getattr(layer, k), np.float64) for k in ("weight", "bias")},
        {k: np.asarray(getattr(grads, k), np.float64) for k in ("weight", "bias")},
        3,
        rate=0.05,
        decay=0.3,
        decayed={"weight": True, "bias": False},
        clip=clip,
        **settings,
    )
    # Three updates of size 0.05: roundings of float32 stay below 1e-6.
    np.testing.assert_allclose(params.weight, expected["weight"], atol=1e-6)
    np.testing.assert_allclose(params.bias, expected["bias"], atol=1e-6)


def test_rate_zero_until_it_is_set(getkey):
    layer = Linear(3, 2, key=getkey())
    optimizer = make_optimizer()
    params = eqx.filter(layer, eqx.is_inexact_array)
    grads = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"progress": -0.1, "peak": 1.0}, "progress"),
        ({"progress": float("nan"), "peak": 1.0}, "progress"),
        ({"progress": 0.5, "peak": 0.0}, "peak"),
        ({"progress": 0.5, "peak": float("inf")}, "peak"),
        ({"progress": 0.5, "peak": 1.0, "warmup_fraction": 1.5}, "warmup_fraction"),
        ({"progress": 0.5, "peak": 1.0, "final_fraction": -1.0}, "final_fraction"),
    ],
)
def test_schedule_errors(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        learning_rate_at(arguments.pop("progress"), **arguments)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight_decay", -1.0, ["0 or greater", "-1.0"]),
        ("weight_decay", float("inf"), ["finite", "inf"]),
        ("clip_norm", -1.0, ["positive", "-1.0", "None"]),
        ("clip_norm", 0.0, ["positive", "0.0"]),
        ("clip_norm", float("nan"), ["finite", "nan"]),
        ("b1", 2.0, ["below 1", "2.0"]),
        ("b1", -0.1, ["0 or greater", "-0.1"]),
        ("b2", -1.0, ["0 or greater", "-1.0"]),
        ("b2", 1.0, ["below 1", "1.0"]),
        ("b2", "0.9", ["a number", "'0.9'"]),
        ("eps", -1.0, ["positive", "-1.0"]),
        ("eps", 0.0, ["positive", "0.0"]),
        ("eps", True, ["a number", "True"]),
    ],
)
def test_optimizer_errors(name, value, words):
    with refused(f"`{name}` must", *words):
        make_optimizer(**{name: value})
