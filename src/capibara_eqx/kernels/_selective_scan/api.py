from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...internal import check_batch, check_kind, check_shape
from .._dispatch import dispatch
from . import associative, fused, reference, xla


BACKENDS = {
    **{name: fused.implementation(name) for name in fused.NAMES},
    "xla": xla.selective_scan,
    "associative": associative.selective_scan,
    "reference": reference.selective_scan,
}
_DEFAULT = {"fused": fused.implementation(None), "xla": xla.selective_scan}


def selective_scan(
    u: Float[Array, "*batch seq d_inner"],
    delta: Float[Array, "*batch seq d_inner"],
    A: Float[Array, "d_inner d_state"],
    B: Float[Array, "*batch seq d_state"],
    C: Float[Array, "*batch seq d_state"],
    D: Float[Array, " d_inner"] | None = None,
    *,
    z: Float[Array, "*batch seq d_inner"] | None = None,
    delta_bias: Float[Array, " d_inner"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Array, "*batch d_inner d_state"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*batch seq d_inner"], Float[Array, "*batch d_inner d_state"]]:
    r"""The selective state space scan of Mamba, with everything around it fused.

    For every channel $d$ and state $n$, with $h_0$ the initial state:

    $$\Delta_t = \mathrm{softplus}(\delta_t + \mathrm{bias}), \quad
    h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \quad
    y_t = (C_t \cdot h_t + D u_t)\, \mathrm{silu}(z_t)$$

    where softplus, bias, $D$ and the gate $z$ are there only if asked for. The input
    enters by the Euler form $\Delta B$, as in the original. Gu and Dao, *Mamba:
    Linear-Time Sequence Modeling with Selective State Spaces*, arXiv 2312.00752.

    Differentiable any number of times, forward and reverse, in every array argument,
    through `y` and `final_state`; works under `jit`, `vmap`, `checkpoint`, inside
    `shard_map` over mesh axes of type Auto or Explicit, and on rows that are sharded
    along an Explicit axis. The scan and its gradient run as one fused kernel each where
    the platform has one; every other derivative is that of the XLA form.

    **Arguments:**

    - `u`: input, `(*batch, seq, d_inner)`, any number of batch axes.
    - `delta`: step sizes (before bias and softplus), shape of `u`.
    - `A`: continuous-time decay rates, `(d_inner, d_state)`, negative for stability.
    - `B`, `C`: input and output maps of each token, `(*batch, seq, d_state)`.
    - `D`: skip weights, `(d_inner,)`.
    - `z`: gate before its SiLU, shape of `u`.
    - `delta_bias`: added to `delta`, `(d_inner,)`.
    - `delta_softplus`: whether step sizes pass through softplus.
    - `initial_state`: state before the first token, `(*batch, d_inner, d_state)`;
        zeros if not given.
    - `reset`: where the state is zeroed before the token is read, `(*batch, seq)`.
    - `implementation`: `"cpu"` (C++), `"pallas_tpu"`, `"pallas_gpu"`, `"xla"`,
        `"associative"`, `"reference"`, or a sequence of names of which the first that
        can is used; by default the fused kernel of the platform, and XLA where there is
        none. `"xla"` is the form for `jax.export` to a CPU. `"associative"` has a depth
        logarithmic in `seq` where the others take the tokens one after the other, and
        is slower on a CPU.

    **Returns:**

    `(y, final_state)`: `y` with the shape and dtype of `u`, and the state after the
    last token in float32 or wider.

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit, or an unknown
    implementation. `NotImplementedError` with the reason if the implementation that was
    named cannot serve.

    !!! example

        ```python
        y, state = selective_scan(u, delta, A, B, C, delta_softplus=True)
        y2, state = selective_scan(u2, delta2, A, B2, C2, delta_softplus=True,
                                   initial_state=state)
        ```
    """
    name = "selective_scan"
    check_batch(name, "u", u, core=("seq", "d_inner"))
    if A.ndim != 2:
        raise ValueError(
            f"{name}: `A` must have shape (d_inner, d_state), got {A.shape}."
        )
    d_inner, d_state = A.shape
    *batch, seq, _ = u.shape
    check_shape(name, "A", A, (u.shape[-1], d_state), "(d_inner, d_state)")
    check_shape(name, "delta", delta, u.shape, "the shape of `u`")
    for argument, value in (("B", B), ("C", C)):
        expected = (*batch, seq, d_state)
        check_shape(name, argument, value, expected, "(*batch, seq, d_state)")
    check_shape(name, "D", D, (d_inner,), "(d_inner,)")
    check_shape(name, "z", z, u.shape, "the shape of `u`")
    check_shape(name, "delta_bias", delta_bias, (d_inner,), "(d_inner,)")
    expected = (*batch, d_inner, d_state)
    meaning = "(*batch, d_inner, d_state)"
    check_shape(name, "initial_state", initial_state, expected, meaning)
    check_shape(name, "reset", reset, (*batch, seq), "(*batch, seq)", kind=jnp.bool_)
    floats = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
    floats |= {"delta_bias": delta_bias, "initial_state": initial_state}
    check_kind(name, floats, jnp.floating)
    return dispatch(
        name,
        BACKENDS,
        implementation,
        *(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset),
        default=_DEFAULT,
    )
