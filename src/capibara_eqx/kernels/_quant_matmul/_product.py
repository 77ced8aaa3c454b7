"""The derivatives of a product with a packed matrix, the same for every backend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...internal import accumulate
from ._decode import Packing
from ._operands import Operands, round_tokens, unclipped


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def product(
    operands: Operands,
    zero: Any,
    run: Callable[..., Any],
    packing: Packing,
    activations: str | None,
) -> Any:
    r"""`run`, with $dy = dx\, \hat W^T + \hat x\, d\hat W^T$.

    $\hat x$ is what the tokens are rounded to; through the rounding itself derivatives
    pass as if it were not there (Bengio et al., *Estimating or Propagating Gradients
    Through Stochastic Neurons*, arXiv 1308.3432), but for what one step for all
    clips.
    """
    return run(operands._replace(zero=zero), packing, activations)


@functools.partial(product.defjvp, symbolic_zeros=True)
def _tangent(run, packing, activations, primals, tangents):
    operands, zero = primals
    change, _ = tangents
    whole = operands._replace(zero=zero)
    y = product(operands, zero, run, packing, activations)
    dy = jnp.zeros_like(y)
    if not isinstance(change.x, SymbolicZero):
        dx = change.x.astype(whole.dtype)
        if whole.input_scale is not None:
            dx = jnp.where(unclipped(whole.x, whole.input_scale), dx, 0)
        dy = dy + jnp.einsum("ti,oi->to", dx, whole.dense(packing))
    if not isinstance(change.scale, SymbolicZero):
        of_scale = whole._replace(scale=change.scale).dense(packing)
        x = accumulate(whole.x)
        if activations is not None:
            x = round_tokens(x, whole.input_scale)
        dy = dy + jnp.einsum("ti,oi->to", x.astype(whole.dtype), of_scale)
    return y, dy
