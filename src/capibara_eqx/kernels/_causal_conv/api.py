from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...internal import (
    check_batch,
    check_choice,
    check_kind,
    check_shape,
    check_size,
    segment_starts,
    zero_padding,
)
from .._dispatch import dispatch
from . import fused, reference, xla


BACKENDS = {
    **{name: fused.implementation(name) for name in fused.NAMES},
    "xla": xla.causal_conv,
    "reference": reference.causal_conv,
}
_DEFAULT = {"fused": fused.implementation(None), "xla": xla.causal_conv}


def causal_conv(
    x: Float[Array, "*batch seq c_in"],
    weight: Float[Array, "c_out c_in_per_group width"],
    bias: Float[Array, " c_out"] | None = None,
    *,
    activation: str | None = None,
    dilation: int = 1,
    groups: int = 1,
    initial_state: Float[Array, "*batch reach c_in"] | None = None,
    segment_ids: Int[Array, "*batch seq"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*batch seq c_out"], Float[Array, "*batch reach c_in"]]:
    r"""A causal convolution over time that can be continued and packed.

    $$y_t = b + \sum_{k=0}^{K-1} W_k\, x_{t - (K-1-k) r}$$

    with width $K$ and dilation $r$, so that the last tap sees the current token and
    none sees a later one; with an activation the result is $\mathrm{silu}(y_t)$. Inputs
    before the first token come from `initial_state`, zeros if not given. van den Oord
    et al., *WaveNet*, arXiv 1609.03499.

    Differentiable any number of times, forward and reverse; works under `jit`, `vmap`,
    `checkpoint` and inside `shard_map` over mesh axes of type Auto or Explicit.

    **Arguments:**

    - `x`: input, `(*batch, seq, c_in)`, any number of batch axes.
    - `weight`: `(c_out, c_in / groups, width)`.
    - `bias`: `(c_out,)`.
    - `activation`: `"silu"` after the bias, or `None`.
    - `dilation`: distance between taps, in tokens.
    - `groups`: channels are convolved within groups; `c_in` for a depthwise one.
    - `initial_state`: the last `reach = (width - 1) * dilation` inputs, oldest
        first, `(*batch, reach, c_in)`. It belongs to the first valid token's document.
    - `segment_ids`: document of each token, `(*batch, seq)`. No tap reaches across a
        change of id. A negative id is padding: skipped as if absent, its output 0.
    - `implementation`: `"cpu"` (C++), `"pallas_tpu"` and `"pallas_gpu"`, all three for
        one channel a group, `"xla"`, `"reference"`, or a sequence of names of which the
        first that can is used; by default the fused kernel of the platform, and XLA
        where there is none.

    **Returns:**

    `(y, final_state)`: `y` with the dtype of `x`, and the inputs with which the last
    document can be continued, in the dtype of `initial_state` (of `x` if not given).

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit, or an unknown
    activation or implementation. `NotImplementedError` with the reason if the
    implementation that was named cannot serve.

    !!! example

        ```python
        y, state = causal_conv(x, weight, groups=x.shape[-1])
        y2, state = causal_conv(x2, weight, groups=x.shape[-1], initial_state=state)
        ```
    """
    name = "causal_conv"
    check_batch(name, "x", x, core=("seq", "c_in"))
    check_size("dilation", dilation)
    check_size("groups", groups)
    *batch, seq, c_in = x.shape
    _check_weight(name, weight, c_in, groups)
    c_out, _, width = weight.shape
    reach = (width - 1) * dilation
    check_shape(name, "bias", bias, (c_out,), "(c_out,)")
    expected = (*batch, reach, c_in)
    meaning = "(*batch, (width - 1) * dilation, c_in)"
    check_shape(name, "initial_state", initial_state, expected, meaning)
    check_shape(
        name,
        "segment_ids",
        segment_ids,
        (*batch, seq),
        "(*batch, seq)",
        kind=jnp.integer,
    )
    floats = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    check_kind(name, floats, jnp.floating)
    if activation is not None:
        check_choice("activation", activation, ("silu",))
    history = jnp.zeros(expected, x.dtype) if initial_state is None else initial_state

    def convolve(x, document):
        arguments = (x, weight, bias, dilation, groups, history, document, activation)
        return dispatch(name, BACKENDS, implementation, *arguments, default=_DEFAULT)

    if segment_ids is None:
        return convolve(x, None), _last_inputs(x, history)

    valid = segment_ids >= 0
    # Valid tokens to the front: padding is then behind everything that is read.
    order = jnp.argsort(~valid, axis=-1, stable=True)
    x = zero_padding(x, segment_ids)
    x = jnp.take_along_axis(x, order[..., None], axis=-2)
    document = _documents(segment_ids, order, reach)
    y = convolve(x, document)
    state = _final_history(x, history, document, valid)
    rank = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
    y = jnp.take_along_axis(y, rank[..., None], axis=-2)
    return zero_padding(y, segment_ids), state


def _check_weight(name, weight, c_in, groups):
    if c_in % groups != 0:
        raise ValueError(
            f"{name}: `groups` must divide the {c_in} channels of `x`, got {groups}."
        )
    if weight.ndim != 3 or weight.shape[1] != c_in // groups or weight.shape[2] < 1:
        raise ValueError(
            f"{name}: `weight` must have shape (c_out, c_in / groups, width >= 1), "
            f"here (c_out, {c_in // groups}, width); got {weight.shape}."
        )
    if weight.shape[0] % groups != 0:
        raise ValueError(
            f"{name}: `groups` = {groups} must divide the {weight.shape[0]} output "
            "channels of `weight`."
        )


def _last_inputs(
    x: Float[Array, "*batch seq c_in"], history: Float[Array, "*batch reach c_in"]
) -> Float[Array, "*batch reach c_in"]:
    """The last `reach` of the history and the inputs after it."""
    seq, reach = x.shape[-2], history.shape[-2]
    x = x[..., max(0, seq - reach) :, :].astype(history.dtype)
    # With nothing of the history left in it, nothing has to be put together.
    if seq >= reach:
        return x
    return jnp.concatenate([history[..., seq:, :], x], axis=-2)


def _documents(
    segment_ids: Int[Array, "*batch seq"], order: Int[Array, "*batch seq"], reach: int
) -> Int[Array, "*batch reach_and_seq"]:
    """Number of the document that each input belongs to, the history's being 0."""
    starts = segment_starts(jnp.take_along_axis(segment_ids, order, axis=-1))
    document = jnp.cumsum(starts.astype(jnp.int32), axis=-1)
    history = jnp.zeros((*document.shape[:-1], reach), document.dtype)
    return jnp.concatenate([history, document], axis=-1)


def _final_history(
    x: Float[Array, "*batch seq c_in"],
    history: Float[Array, "*batch reach c_in"],
    document: Int[Array, "*batch reach_and_seq"],
    valid: Bool[Array, "*batch seq"],
) -> Float[Array, "*batch reach c_in"]:
    """The last `reach` valid inputs, zero where they are not of the last document."""
    reach = history.shape[-2]
    inputs = jnp.concatenate([history, x.astype(history.dtype)], axis=-2)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    last = count + jnp.arange(reach).reshape((1,) * (count.ndim - 1) + (reach,))
    kept = jnp.take_along_axis(inputs, last[..., None], axis=-2)
    current = jnp.take_along_axis(document, count + reach - 1, axis=-1)
    same = jnp.take_along_axis(document, last, axis=-1) == current
    return jnp.where(same[..., None], kept, jnp.zeros_like(kept))
