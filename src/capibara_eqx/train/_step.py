from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, Int, Integer, PyTree

from ..internal import accumulate, check_positive
from ..layers import cast_for_compute
from ..models import LanguageModel, aux_losses


class TrainState(eqx.Module):
    """All that a training run changes: model, optimiser state, number of steps."""

    model: LanguageModel
    opt_state: PyTree
    step: Int[Array, ""]


def init_train_state(
    model: LanguageModel, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    params = eqx.filter(model, eqx.is_inexact_array)
    return TrainState(model, optimizer.init(params), jnp.zeros((), jnp.int32))


def next_token_loss(
    logits: Float[Array, "*batch seq vocab"], targets: Integer[Array, "*batch seq"]
) -> Float[Array, ""]:
    r"""Mean cross-entropy in nats, $-\mathrm{mean}\,\log \mathrm{softmax}(l)_{target}$.

    **Arguments:**

    - `logits`: scores, `(*batch, seq, vocab)`; computed with in float32 or wider.
    - `targets`: ids, `(*batch, seq)`.

    **Returns:**

    A scalar. Divide by `log(2)` for bits a token.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(
        accumulate(logits), targets
    )
    return jnp.mean(losses)


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    compute_dtype: DTypeLike | None = None,
    aux_weights: Mapping[str, float] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A compiled step of next-token training.

    **Arguments:**

    - `optimizer`: any optax transformation.
    - `accumulation`: number of equal parts that a batch is cut into, one after the
        other, their gradients averaged: the memory of a part, the step of the whole.
    - `compute_dtype`: dtype of the forward and backward pass, such as `jnp.bfloat16`;
        parameters, optimiser and loss stay in theirs.
    - `aux_weights`: weight of each named loss that layers report; a name that no layer
        reports is an error, a reported loss without a weight is measured only.

    **Returns:**

    `step(state, batch, key=None) -> (state, metrics)`. `batch` holds token ids,
    `(batch_size, seq_len + 1)`: the last `seq_len` are predicted from those before.
    The buffers of `state` are reused: use the returned one. `metrics` holds `loss`
    (nats a token), `grad_norm` (before clipping) and every aux loss by its name.

    **Raises:**

    `ValueError` for an `accumulation` that is not positive; when called, for a batch
    that it does not divide or that is not an array of integers of two axes.

    !!! example

        ```python
        optimizer = optax.adam(1e-3)
        step = make_train_step(optimizer)
        state = init_train_state(model, optimizer)
        state, metrics = step(state, batch)
        ```
    """
    check_positive("accumulation", accumulation)
    weights = dict(aux_weights or {})

    def objective(model, tokens, key):
        if compute_dtype is not None:
            model = cast_for_compute(model, compute_dtype)
        output = model.forward(tokens[:, :-1], key=key)
        loss = next_token_loss(output.logits, tokens[:, 1:])
        metrics = {"loss": loss, **aux_losses(output.aux)}
        missing = sorted(set(weights) - set(metrics))
        if missing:
            raise ValueError(
                f"`aux_weights` names {missing}, which no layer reports; reported are "
                f"{sorted(set(metrics) - {'loss'})}."
            )
        total = loss
        for name, weight in weights.items():
            total = total + weight * metrics[name]
        return total, metrics

    differentiate = eqx.filter_grad(objective, has_aux=True)

    def gradients(model, tokens, key):
        if accumulation == 1:
            return differentiate(model, tokens, key)
        parts = tokens.reshape(accumulation, -1, tokens.shape[-1])
        keys = None if key is None else jax.random.split(key, accumulation)

        first_key = None if keys is None else keys[0]
        shapes = eqx.filter_eval_shape(differentiate, model, parts[0], first_key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(total, inputs):
            return jax.tree.map(jnp.add, total, differentiate(model, *inputs)), None

        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    @eqx.filter_jit(donate="all-except-first")
    def update(inputs: tuple[Any, Any], state: TrainState):
        batch, key = inputs
        grads, metrics = gradients(state.model, batch.astype(jnp.int32), key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        params = eqx.filter(state.model, eqx.is_inexact_array)
        # optax's Adam raises a float to an integer power; strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, params)
        model = eqx.apply_updates(state.model, updates)
        return TrainState(model, opt_state, state.step + 1), metrics

    def step(state, batch, key=None):
        _check_batch(batch, accumulation)
        return update((jnp.asarray(batch), key), state)

    return step


def _check_batch(batch, accumulation):
    if (
        batch.ndim != 2
        or batch.shape[1] < 2
        or not jnp.issubdtype(batch.dtype, jnp.integer)
    ):
        raise ValueError(
            "`batch` must hold integer token ids, (batch_size, seq_len + 1 >= 2), got "
            f"{batch.dtype} of shape {batch.shape}."
        )
    if batch.shape[0] % accumulation:
        raise ValueError(
            f"`accumulation` = {accumulation} must divide the batch of "
            f"{batch.shape[0]} rows."
        )
