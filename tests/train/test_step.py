import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capibara_eqx.layers import (
    AbstractAux,
    AbstractSequenceMixer,
    Mamba,
    cast_for_compute,
)
from capibara_eqx.models import LanguageModel, ResidualBlock, mamba_language_model
from capibara_eqx.train import (
    init_train_state,
    make_train_step,
    next_token_loss,
)


def _model(seed=0):
    return mamba_language_model(11, 8, 1, d_state=2, key=jax.random.key(seed))


SGD = optax.sgd(0.1)


@functools.cache
def _step(accumulation=1, compute_dtype=None):
    """A step of `SGD`, compiled once for all tests."""
    return make_train_step(SGD, accumulation=accumulation, compute_dtype=compute_dtype)


def _batch(rows=4, length=9):
    return np.random.default_rng(0).integers(0, 11, (rows, length)).astype(np.int32)


def test_loss_equals_numpy():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 3, 5))
    targets = rng.integers(0, 5, (2, 3))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.mean(np.log(np.take_along_axis(p, targets[..., None], -1)))
    loss = next_token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_step_is_gradient_descent_on_the_loss():
    # With plain SGD the change of the parameters is the gradient, which autodiff of
    # the written-out loss gives another way.
    model, batch = _model(), _batch()
    before = jax.tree.map(jnp.copy, eqx.filter(model, eqx.is_inexact_array))

    def loss(model):
        log_p = jax.nn.log_softmax(model(jnp.asarray(batch[:, :-1])))
        return -jnp.mean(
            jnp.take_along_axis(log_p, jnp.asarray(batch[:, 1:, None]), axis=-1)
        )

    value, grads = eqx.filter_value_and_grad(loss)(model)
    state, metrics = _step()(init_train_state(model, SGD), batch)
    after = eqx.filter(state.model, eqx.is_inexact_array)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-6)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1
    for old, new, grad in zip(
        *map(jax.tree.leaves, (before, after, grads)), strict=True
    ):
        np.testing.assert_allclose(new, old - 0.1 * grad, atol=1e-6)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(parts):
    results = []
    for accumulation in (1, parts):
        step = _step(accumulation)
        state, metrics = step(init_train_state(_model(), SGD), _batch())
        results.append((jax.tree.leaves(state.model), metrics["loss"]))
    (whole, loss), (parted, parted_loss) = results
    assert float(loss) == pytest.approx(float(parted_loss), rel=1e-6)
    for a, b in zip(whole, parted, strict=True):
        if eqx.is_array(a):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_bfloat16_computes_in_half_and_keeps_float32_parameters():
    model = _model()
    cast = cast_for_compute(model, jnp.bfloat16)
    mixer = cast.stack.blocks[0].mixer
    assert mixer.in_proj.weight.dtype == jnp.bfloat16
    assert mixer.A_log.dtype == mixer.D.dtype == jnp.float32
    assert cast(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.bfloat16

    step = _step(compute_dtype=jnp.bfloat16)
    state, metrics = step(init_train_state(_model(), SGD), _batch())
    _, exact = _step()(init_train_state(_model(), SGD), _batch())
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state.model) if eqx.is_array(leaf)}
    assert dtypes == {jnp.dtype(jnp.float32)}
    # Logits carry a relative error of bfloat16's 2^-8; they are below 1 here.
    assert abs(float(metrics["loss"] - exact["loss"])) < 2**-7
    assert float(metrics["loss"]) != float(exact["loss"])


class _Balance(AbstractAux):
    load: jax.Array

    def losses(self):
        return {"balance": jnp.mean(self.load**2)}


class _Reporting(AbstractSequenceMixer):
    mixer: Mamba

    def __call__(self, x, *, segment_ids=None, key=None):
        y = self.mixer(x, segment_ids=segment_ids, key=key)
        return y, _Balance(jnp.mean(y, axis=tuple(range(y.ndim - 1))))

    def init_cache(self, batch_shape=(), *, max_len=None):
        return self.mixer.init_cache(batch_shape, max_len=max_len)

    def prefill(self, x, cache, *, segment_ids=None):
        return self.mixer.prefill(x, cache, segment_ids=segment_ids)

    def step(self, x, cache):
        return self.mixer.step(x, cache)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_aux_losses_reach_the_objective(getkey, scan):
    mixers = [_Reporting(Mamba(8, d_state=2, key=getkey())) for _ in range(2)]
    blocks = [ResidualBlock(mixer, 8) for mixer in mixers]
    model = LanguageModel(11, 8, blocks, scan=scan, key=getkey())
    optimizer = optax.sgd(1.0)
    batch = _batch()

    @eqx.filter_value_and_grad
    def balance(model):
        output = model.forward(jnp.asarray(batch[:, :-1]))
        return sum(jnp.mean(aux.load**2) for aux in output.aux)

    expected, gradient = balance(model)
    moved = []
    for weights in ({}, {"balance": 3.0}):
        copy = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, model)
        step = make_train_step(optimizer, aux_weights=weights)
        state, metrics = step(init_train_state(copy, optimizer), batch)
        assert float(metrics["balance"]) == pytest.approx(float(expected), rel=1e-5)
        moved.append(state.model.embedding.weight)
    # SGD at rate 1 takes the gradient of what the weight adds to the objective.
    change = np.asarray(moved[1] - moved[0])
    wanted = -3 * np.asarray(gradient.embedding.weight)
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(change, wanted, atol=1e-2 * np.abs(wanted).max())


def test_buffers_of_the_state_are_reused():
    optimizer = optax.adam(0.1)
    before = init_train_state(_model(), optimizer)
    leaves = [leaf for leaf in jax.tree.leaves(before) if eqx.is_array(leaf)]
    batch = jnp.asarray(_batch())
    after, _ = make_train_step(optimizer)(before, batch)
    assert all(leaf.is_deleted() for leaf in leaves)
    # What is not part of the state is left to its owner.
    assert not batch.is_deleted()
    assert not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(after) if eqx.is_array(leaf)
    )


@pytest.mark.errors
def test_step_errors():
    optimizer = optax.sgd(0.1)
    state = init_train_state(_model(), optimizer)
    with pytest.raises(ValueError, match="`accumulation` = 3 must divide"):
        make_train_step(optimizer, accumulation=3)(state, _batch())
    with pytest.raises(ValueError, match="`accumulation` must be positive"):
        make_train_step(optimizer, accumulation=0)
    with pytest.raises(ValueError, match="`batch` must hold integer"):
        make_train_step(optimizer)(state, _batch().astype(np.float32))
    with pytest.raises(ValueError, match="`aux_weights` names .'balanse'"):
        make_train_step(optimizer, aux_weights={"balanse": 1.0})(state, _batch())
