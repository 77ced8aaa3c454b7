import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...internal import check_activation, check_ids, check_range, check_shape
from .._dispatch import dispatch
from . import capacity, dense, gather, ragged, reference, scan
from ._operands import Operands, Stacked, none_dropped


BACKENDS = {
    "ragged": ragged.experts,
    "capacity": capacity.experts,
    "dense": dense.experts,
    "scan": scan.experts,
    "gather": gather.experts,
    "reference": reference.experts,
}
DEFAULT = "ragged"


def experts(
    x: Float[Array, "*batch d_model"],
    indices: Int[Array, "*batch top_k"],
    weights: Float[Array, "*batch top_k"],
    gate: Float[Array, "experts d_ff d_model"],
    up: Float[Array, "experts d_ff d_model"] | None,
    down: Float[Array, "experts d_model d_ff"],
    *,
    gate_bias: Float[Array, "experts d_ff"] | None = None,
    up_bias: Float[Array, "experts d_ff"] | None = None,
    down_bias: Float[Array, "experts d_model"] | None = None,
    activation: str = "silu",
    capacity_factor: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "*batch d_model"], Int[Array, ""]]:
    r"""Feed-forward experts, a few of them for each token.

    $$y_t = \sum_{j=1}^{k} w_{tj}\, E_{i_{tj}}(x_t), \quad
    E_i(x) = D_i\,(\sigma(G_i x + b_i) \odot (U_i x + c_i)) + d_i$$

    and without `up` experts of two matrices, $E_i(x) = D_i\,\sigma(G_i x + b_i) + d_i$.
    Shazeer et al., *Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer*, arXiv 1701.06538; gated experts as in Shazeer, *GLU
    Variants Improve Transformer*, arXiv 2002.05202.

    Nothing is dropped without a `capacity_factor`. With one, as in Fedus et al.,
    *Switch Transformers*, arXiv 2101.03961, every expert has
    `ceil(capacity_factor * top_k * tokens / experts)` places. First choices are placed
    before second ones and choices of equal rank in the order of the tokens; a choice
    that finds no place adds nothing to its token.

    Differentiable any number of times, forward and reverse, in everything but
    `indices`; works under `jit`, `vmap`, `checkpoint` and inside `shard_map` over mesh
    axes of type Auto or Explicit. Outside it, `"dense"` and `"scan"` alone take arrays
    that are sharded along an Explicit axis.

    **Arguments:**

    - `x`: tokens, `(*batch, d_model)`.
    - `indices`: chosen experts of each token, `(*batch, top_k)`. An index outside
        `[0, experts)`, such as -1, chooses none: it adds nothing and takes no place.
    - `weights`: of the chosen experts, `(*batch, top_k)`.
    - `gate`, `up`: `(experts, d_ff, d_model)`; `up` is `None` for experts of two
        matrices.
    - `down`: `(experts, d_model, d_ff)`.
    - `gate_bias`, `up_bias`: `(experts, d_ff)`.
    - `down_bias`: `(experts, d_model)`.
    - `activation`: of the gate: `"silu"`, `"gelu"`, `"relu"` or `"relu2"`.
    - `capacity_factor`: places at the experts, as a multiple of what balanced routing
        takes; for `"capacity"` alone, which is then the default.
    - `implementation`: `"ragged"` (default: products of rows grouped by expert, the
        work of the chosen experts alone), `"capacity"`, `"dense"` and `"scan"` (every
        expert for every token; the latter one after the other, which saves memory, and
        is the default where arrays are sharded along an Explicit axis), `"gather"` (a
        copy of its experts for every token: for very many experts of a few rows),
        `"reference"`, or a sequence of names of which the first that can is used.

    **Returns:**

    `(y, dropped)`: `y` like `x`, and how many choices found no place, always 0 without
    a `capacity_factor`. Sums are carried in float32 or wider.

    **Raises:**

    `ValueError` naming the argument that does not fit, or an unknown activation or
    implementation. `NotImplementedError` if the implementation that was named has no
    use for a `capacity_factor`, or lacks one.

    !!! example

        ```python
        gate, up = jax.random.normal(key, (2, 8, 32, 64))
        scores, indices = jax.lax.top_k(jax.random.normal(key, (2, 5, 8)), 2)
        weights = jax.nn.softmax(scores)
        y, dropped = experts(x, indices, weights, gate, up, jnp.matrix_transpose(up))
        ```
    """
    _check(x, indices, weights, gate)
    if up is None and up_bias is not None:
        raise ValueError(
            f"experts: `up_bias` of shape {up_bias.shape} has no `up` to be added to. "
            "Leave it out too, or pass the matrices that it belongs to."
        )
    count, d_ff, d_model = gate.shape
    for argument, given, shape, meaning in (
        ("up", up, (count, d_ff, d_model), "the shape of `gate`"),
        ("down", down, (count, d_model, d_ff), "(experts, d_model, d_ff)"),
        ("gate_bias", gate_bias, (count, d_ff), "(experts, d_ff)"),
        ("up_bias", up_bias, (count, d_ff), "(experts, d_ff)"),
        ("down_bias", down_bias, (count, d_model), "(experts, d_model)"),
    ):
        check_shape("experts", argument, given, shape, meaning)
    check_activation(activation)
    if capacity_factor is not None:
        check_range("capacity_factor", capacity_factor, above=0)
    tokens, top_k = math.prod(x.shape[:-1]), indices.shape[-1]
    stacked = Stacked(gate, up, down, gate_bias, up_bias, down_bias)
    operands = Operands(
        x.reshape(tokens, d_model),
        indices.reshape(tokens, top_k).astype(jnp.int32),
        weights.reshape(tokens, top_k),
        jax.tree.map(lambda w: w.astype(x.dtype), stacked),
    )
    # The second where the first cannot sort what is sharded.
    default = (DEFAULT, "scan") if capacity_factor is None else ("capacity",)
    if tokens == 0:
        return x, none_dropped()
    y, dropped = dispatch(
        "experts",
        BACKENDS,
        implementation,
        operands,
        activation,
        capacity_factor,
        default={name: BACKENDS[name] for name in default},
    )
    return y.reshape(x.shape), dropped


def _check(x, indices, weights, gate):
    if gate.ndim != 3 or 0 in gate.shape:
        raise ValueError(
            "experts: `gate` must have shape (experts, d_ff, d_model), none of them "
            f"zero, got {gate.shape}."
        )
    if x.ndim == 0 or x.shape[-1] != gate.shape[-1]:
        raise ValueError(
            f"experts: `x` must have {gate.shape[-1]} elements on its last axis, the "
            f"last of `gate`, got shape {x.shape}."
        )
    check_ids("experts", "indices", indices)
    if indices.shape[:-1] != x.shape[:-1] or indices.ndim != x.ndim:
        raise ValueError(
            "experts: `indices` must have the batch axes of `x` and one of chosen "
            f"experts, here {(*x.shape[:-1], 'top_k')}, got {indices.shape}."
        )
    if indices.shape[-1] == 0:
        raise ValueError(
            f"experts: `indices` choose no expert, shape {indices.shape}; give at "
            "least one a token."
        )
    check_shape("experts", "weights", weights, indices.shape, "the shape of `indices`")
