from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._checks import check_choice
from ._silu import silu


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


# `gelu` is the exact one, as in the papers; `silu` is also known as swish,
# and `relu2` is the squared relu of Primer (So et al., arXiv 2109.08668).
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu2": _relu2,
}


def check_activation(name: str) -> None:
    """Raise `ValueError` unless `name` is a known activation."""
    check_choice("activation", name, ACTIVATIONS)


def activate(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the activation called `name`: `"silu"`, `"gelu"`, `"relu"`, ..."""
    return ACTIVATIONS[name](x)
