from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from ...internal import check_batch, check_kind, check_shape
from .._dispatch import dispatch
from . import reference, xla


BACKENDS = {"xla": xla.linear_recurrence, "reference": reference.linear_recurrence}


def linear_recurrence(
    a: Inexact[Array, "*batch seq d"],
    x: Inexact[Array, "*batch seq d"],
    *,
    initial_state: Inexact[Array, "*batch d"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Inexact[Array, "*batch seq d"], Inexact[Array, "*batch d"]]:
    r"""The elementwise linear recurrence, the core of every diagonal state space.

    $$h_t = a_t h_{t-1} + x_t$$

    from the first token to the last, or from the last to the first if `reverse`. It
    is what Martin and Cundy, *Parallelizing Linear Recurrent Neural Nets Over
    Sequence Length*, arXiv 1709.04057, build on. Differentiable any number of times,
    forward and reverse; works under `jit`, `vmap`, `checkpoint` and inside `shard_map`
    over mesh axes of type Auto or Explicit.

    **Arguments:**

    - `a`: decays, `(*batch, seq, d)`, real or complex.
    - `x`: inputs, shape of `a`.
    - `initial_state`: state before the first step, `(*batch, d)`; zeros if not given.
    - `reset`: where the state is zeroed before the step, `(*batch, seq)`.
    - `reverse`: whether time runs from the last token to the first.
    - `implementation`: `"xla"` (default), `"reference"`, or a sequence of names of
        which the first that can is used.

    **Returns:**

    `(h, final_state)`: all states, `(*batch, seq, d)`, in the dtype of `a` and `x`
    promoted, and the state after the last step, `(*batch, d)`, in float32 (complex64)
    or wider.

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit, or an unknown
    implementation.

    !!! example

        ```python
        # An exponential moving average.
        ema, last = linear_recurrence(jnp.full_like(x, 0.9), 0.1 * x)
        ```
    """
    name = "linear_recurrence"
    check_batch(name, "x", x, core=("seq", "d"))
    check_shape(name, "a", a, x.shape, "the shape of `x`")
    *batch, seq, d = x.shape
    check_shape(name, "initial_state", initial_state, (*batch, d), "(*batch, d)")
    check_shape(name, "reset", reset, (*batch, seq), "(*batch, seq)", kind=jnp.bool_)
    check_kind(name, {"a": a, "x": x, "initial_state": initial_state}, jnp.inexact)
    return dispatch(name, BACKENDS, implementation, a, x, initial_state, reset, reverse)
