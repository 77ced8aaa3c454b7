"""The diffusion head: loss, samples and scores against NumPy."""

import functools
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support import diffusion_oracle as oracle
from support.derivatives import check_first_order, check_second_order
from support.model_oracle import moved
from support.precision import enable_x64
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import (
    DiffusionNextTokenHead,
    NoisePredictor,
    SamplingSchedule,
    weight_decay_mask,
)


D, STEPS = 3, 50
seeds = st.integers(0, 2**32 - 1)
NAMES = [
    f"{layer}.{array}"
    for layer in ("norm", "in_proj", "hidden_proj", "out_proj")
    for array in ("weight", "bias")
]


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def params(predictor: NoisePredictor) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(functools.reduce(getattr, name.split("."), predictor))
        for name in NAMES
    }


def with_params(predictor: NoisePredictor, values: Any) -> NoisePredictor:
    where: Any = lambda p: [functools.reduce(getattr, n.split("."), p) for n in NAMES]
    return eqx.tree_at(where, predictor, [values[name] for name in NAMES])


@functools.cache
def make(kind: Any = DiffusionNextTokenHead, **options: Any) -> Any:
    arguments: dict[str, Any] = {"num_train_timesteps": STEPS, "time_embed_dim": 5}
    return filled(kind, D, seed=1, size=0.4, **(arguments | options))


loss = eqx.filter_jit(lambda head, x, key: head.loss(x, x, key=key))
scores = eqx.filter_jit(lambda head, x0, table: head.logits(x0, table))
draw = eqx.filter_jit(lambda head, x, key: head.sample(x, key=key))


def wide(head: Any) -> Any:
    """Its parameters in float64."""
    cast = lambda leaf: leaf.astype("float64") if eqx.is_inexact_array(leaf) else leaf
    return jax.tree.map(cast, head)


class Spy(DiffusionNextTokenHead):
    """Writes down what the loss draws."""

    seen: ClassVar[list[Any]] = []

    def noise_loss(self, features, targets, t, noise, *, mask=None) -> Any:
        self.seen.append((features, targets, t, noise, mask))
        return jnp.zeros(())


def drawn(head: Any, features, targets, **options) -> Any:

    @eqx.filter_jit
    def run(head, features, targets, options):
        head.loss(features, targets, **options)
        return Spy.seen.pop()

    draws = run(head, features, targets, options)
    return [np.asarray(array) for array in draws]


def test_sizes_of_the_network():
    head = filled(DiffusionNextTokenHead, 24, seed=0, size=1.0)
    shapes = {name: array.shape for name, array in params(head.predictor).items()}
    assert shapes["in_proj.weight"] == (96, 24 + 24 + 128)
    assert shapes["hidden_proj.weight"] == (96, 96)
    assert shapes["out_proj.weight"] == (24, 96)
    assert len(jax.tree.leaves(eqx.filter(head, eqx.is_array))) == len(NAMES)
    small = filled(NoisePredictor, 3, 5, 2, jnp.bfloat16, seed=0, size=1.0)
    assert small.hidden_proj.weight.shape == (64, 64)
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype("bfloat16")}
    decays = weight_decay_mask(head)
    assert [getattr(decays.predictor, n).weight for n in ("norm", "in_proj")] == [0, 1]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_prediction(shape, conditional):
    predictor = make().predictor
    x, c = normal(2, *shape, D).astype("float32")
    t = np.random.default_rng(0).integers(0, STEPS, shape)
    condition = c if conditional else None
    want = oracle.predict_noise(params(predictor), x, t, condition)
    call = eqx.filter_jit(predictor)
    given = None if condition is None else jnp.asarray(condition)
    got = call(jnp.asarray(x), jnp.asarray(t, "int32"), given)
    assert_close(got, want, dtype="float32", length=64)
    one = call(jnp.asarray(x), jnp.asarray(7, "int32"), given)
    want = oracle.predict_noise(params(predictor), x, 7, condition)
    assert_close(one, want, dtype="float32", length=64)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_at_given_draws(masked):
    head = make()
    features, targets, noise = normal(3, 2, 4, D).astype("float32")
    t = np.random.default_rng(1).integers(0, STEPS, (2, 4))
    mask = np.random.default_rng(2).random((2, 4)) < 0.6 if masked else None
    want = oracle.noise_loss(
        params(head.predictor), features, 0.02 * targets, t, noise, STEPS, mask
    )
    if mask is not None:
        assert 0 < mask.sum() < mask.size
        features[~mask] = targets[~mask] = np.nan
    arrays = [jnp.asarray(a) for a in (features, 0.02 * targets, t, noise)]
    given = None if mask is None else jnp.asarray(mask)
    value = eqx.filter_jit(lambda h, a: h.noise_loss(*a, mask=given))
    assert_close(value(head, arrays), want, dtype="float32", length=100)
    grads = eqx.filter_jit(eqx.filter_grad(lambda h, a: h.noise_loss(*a, mask=given)))
    leaves = jax.tree.leaves(grads(head, arrays))
    assert leaves
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_nothing_that_counts():
    head, x = make(), jnp.ones((2, D))
    none = jnp.zeros((2,), bool)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def run(head, x):
        return head.loss(x, x, mask=none, key=jax.random.key(0))

    value, grads = run(head, x)
    assert float(value) == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))


def test_derivatives_of_the_loss():
    with enable_x64(True):
        head = wide(make())
    t, noise = np.asarray([0, 20, 49]), normal(3, D, seed=5)
    mask = np.asarray([True, False, True])
    point = {
        "features": normal(3, D, seed=6),
        "targets": normal(3, D, seed=7),
        **{name: np.asarray(a) for name, a in params(head.predictor).items()},
    }

    def function(p):
        predictor = with_params(head.predictor, p)
        changed = eqx.tree_at(lambda h: h.predictor, head, predictor)
        return changed.noise_loss(
            p["features"],
            p["targets"],
            jnp.asarray(t),
            jnp.asarray(noise),
            mask=jnp.asarray(mask),
        )

    def loop(p):
        return oracle.noise_loss(p, p["features"], p["targets"], t, noise, STEPS, mask)

    check_first_order(function, loop, point)
    check_second_order(function, loop, point)


def test_every_token_has_its_own_time_noise_and_condition():
    head = make(Spy, cfg_dropout_p=0.3)
    shape = (40, 50)
    features = jnp.ones((*shape, D))
    targets = jnp.asarray(normal(*shape, D), "float32")
    mask = jnp.ones(shape, bool)
    got = drawn(head, features, targets, mask=mask, key=jax.random.key(3))
    x, same, t, noise, same_mask = got
    np.testing.assert_array_equal(same, targets)
    np.testing.assert_array_equal(same_mask, mask)
    assert t.shape == shape
    counts = np.bincount(t.ravel(), minlength=STEPS)
    assert len(counts) == STEPS
    assert counts.min() > 0
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    dropped = np.all(x == 0, axis=-1)
    assert np.all(dropped | np.all(x == 1, axis=-1)), "whole conditions only"
    assert stats.binomtest(int(dropped.sum()), dropped.size, 0.3).pvalue > 1e-3
    # Alike within a row or a column no more often than by chance.
    assert abs(np.mean(t[:, 1:] == t[:, :-1]) - 1 / STEPS) < 0.02
    assert abs(np.mean(t[1:] == t[:-1]) - 1 / STEPS) < 0.02
    assert abs(np.mean(dropped[1:] == dropped[:-1]) - 0.58) < 0.06


@pytest.mark.parametrize("inference", [False, True])
def test_conditions_are_kept_at_inference(inference):
    head = eqx.nn.inference_mode(make(Spy, cfg_dropout_p=1.0), inference)
    ones = jnp.ones((5, D))
    features = drawn(head, ones, ones, key=jax.random.key(0))[0]
    assert np.all(features == (1 if inference else 0))
    never = make(Spy, cfg_dropout_p=0.0)
    assert np.all(drawn(never, ones, ones, key=jax.random.key(0))[0] == 1)


def test_the_key_decides():
    head, x = make(), jnp.asarray(normal(4, D), "float32")
    losses = [float(loss(head, x, jax.random.key(k))) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    samples = [np.asarray(draw(head, x, jax.random.key(k))) for k in (0, 0, 1)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert np.all(samples[0] != samples[2])
    alike = np.asarray(draw(head, jnp.ones((2, D)), jax.random.key(0)))
    assert np.any(alike[0] != alike[1]), "rows start from noise of their own"


def start_of(head: DiffusionNextTokenHead, features, key) -> np.ndarray:
    """The noise that a sample starts from: without a prediction it is only scaled."""
    where: Any = lambda h: (h.predictor.out_proj.weight, h.predictor.out_proj.bias)
    silent = eqx.tree_at(where, head, jax.tree.map(jnp.zeros_like, where(head)))
    single = SamplingSchedule(head.schedule.noise, 1, "ddim", spacing="linspace")
    silent = eqx.tree_at(lambda h: h.schedule, silent, single)
    last = oracle.alpha_bars(STEPS)[-1]
    return np.asarray(draw(silent, features, key)) * np.sqrt(last)


@pytest.mark.parametrize(
    ("scheduler", "scale"),
    [
        ("ddim", 0),
        ("ddim", 1.0),
        ("ddim", jnp.asarray(-0.5)),
        ("dpm", 2.5),
    ],
    ids=str,
)
def test_a_guided_sample(scheduler, scale):
    with enable_x64(True):
        head = wide(make(scheduler=scheduler, num_infer_steps=4))
        head = eqx.tree_at(lambda h: h.cfg_guidance_scale, head, scale)
        features = jnp.asarray(normal(2, 3, D, seed=8))
        key = jax.random.key(9)
        start = start_of(head, features, key)
        assert abs(start.std() - 1) < 0.5
        times = head.schedule.timesteps()
        kept = [oracle.alpha_bars(STEPS)[t] for t in times]
        p, s = params(head.predictor), float(scale)

        def predict(x, i):
            with_it = oracle.predict_noise(p, x, times[i], np.asarray(features))
            without = oracle.predict_noise(p, x, times[i], None)
            return without + s * (with_it - without)

        want = oracle.sample(scheduler, kept, start, predict)
        got = eqx.filter_jit(lambda h, f: h.sample(f, key=key))(head, features)
        assert_close(got, want, dtype="float64", length=1000)


def test_guidance_at_one_and_zero():
    x = jnp.asarray(normal(2, 4, D), "float32")
    key = jax.random.key(0)

    def sample(scale, features):
        head = make(cfg_guidance_scale=scale)
        return np.asarray(draw(head, features, key))

    np.testing.assert_array_equal(sample(0.0, x[0]), sample(0.0, x[1]))
    np.testing.assert_array_equal(sample(0, x[0]), sample(1, jnp.zeros_like(x[0])))
    assert np.max(abs(sample(1, x[0]) - sample(1, x[1]))) > 1e-2


def test_clipping_reaches_the_sample():
    x = jnp.asarray(normal(4, D), "float32")
    key = jax.random.key(0)
    free = np.asarray(draw(make(), x, key))
    assert np.max(abs(free)) > 0.1
    assert_close(draw(make(clip_x0=1e3), x, key), free, dtype="float32", length=64)
    bound = np.asarray(draw(make(clip_x0=0.1), x, key))
    assert np.max(abs(bound)) <= np.float32(0.1)


@given(seed=seeds)
def test_the_nearest_row_wins_whatever_its_length(seed):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((7, D)) * np.exp(rng.normal(0, 3, (7, 1)))
    x0 = rng.standard_normal((4, D))
    rows = oracle.unit_rms(table.astype("float32"))
    logits = scores(make(), jnp.asarray(x0, "float32"), jnp.asarray(table, "float32"))
    assert_close(logits, x0 @ rows.T, dtype="float32", length=D)
    distances = ((x0[:, None] - rows) ** 2).sum(-1)
    top = np.argmax(np.asarray(logits), axis=-1)
    best = np.take_along_axis(distances, top[:, None], -1)[:, 0]
    assert np.all(best <= distances.min(-1) + 1e-4)


def test_a_long_row_would_win_without_normalising():
    table = jnp.asarray([[1.0, 0.0, 0.0], [30.0, 40.0, 0.0], [0.0, 0.0, 0.0]])
    x0 = jnp.asarray([1.7, 0.1, 0.0])
    assert int(jnp.argmax(table @ x0)) == 1
    assert int(jnp.argmax(scores(make(), x0, table))) == 0


def test_rows_of_zeros():
    head = make()
    table = jnp.zeros((2, D)).at[0, 0].set(0.5)
    x0 = jnp.asarray([1.0, 2.0, 3.0])
    assert np.asarray(scores(head, x0, table))[1] == 0

    def total(table):
        loss = head.loss(x0[None], table[1:], key=jax.random.key(0))
        return loss + jnp.sum(head.logits(x0, table))

    along = jnp.ones_like(table)
    slope, bend = jax.jit(lambda table: jax.jvp(jax.grad(total), (table,), (along,)))(
        table
    )
    assert np.all(np.isfinite([slope, bend]))


def test_bfloat16():
    head = make(num_infer_steps=3)
    x = jnp.asarray(normal(4, D), "bfloat16")
    sample = draw(head, x, jax.random.key(0))
    assert sample.dtype == jnp.bfloat16
    near = draw(head, x.astype("float32"), jax.random.key(0))
    # Twelve roundings of the network's output, seen through 1 / a.
    assert_close(sample, near, dtype="bfloat16", length=12)
    logits = scores(head, sample, jnp.ones((2, D)))
    assert logits.dtype == jnp.bfloat16
    value = loss(head, x, jax.random.key(0))
    assert value.dtype == jnp.float32
    near = loss(head, x.astype("float32"), jax.random.key(0))
    assert_close(value, near, dtype="bfloat16")


def test_one_trace_for_other_values():
    traces = []

    @eqx.filter_jit
    def run(head, x, key):
        traces.append(1)
        return head.sample_token(x, jnp.eye(D), key=key)

    for seed in range(3):
        x = jnp.asarray(normal(4, D, seed=seed), "float32")
        ids = run(moved(make(), seed), x, jax.random.key(seed))
        assert ids.dtype == jnp.int32
    assert len(traces) == 1
