from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..internal import check_choice


@jax.custom_jvp
def _silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x) with the quotient last.

    XLA repeats a cheap product in every consumer, and with it the convolution in front
    and one more array for the sigmoid; a quotient it computes once. A Mamba layer holds
    two arrays `(*batch, seq, d_inner)` fewer at its peak on CPU.
    """
    return x / (1 + jnp.exp(-x))


@_silu.defjvp
def _silu_jvp(primals, tangents):
    # Of the quotient itself the derivative is infinity over infinity far below zero.
    (x,), (x_dot,) = primals, tangents
    s = jax.nn.sigmoid(x)
    return _silu(x), x_dot * (s * (1 + x * (1 - s)))


# `gelu` is the exact one, as in the papers; `silu` is also known as swish.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": _silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def check_activation(name: str) -> None:
    """Raise `ValueError` unless `name` is a known activation."""
    check_choice("activation", name, ACTIVATIONS)


def activate(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the activation called `name`: `"silu"`, `"gelu"` or `"relu"`."""
    return ACTIVATIONS[name](x)
