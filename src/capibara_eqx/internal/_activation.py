from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from ._checks import check_choice
from ._silu import silu


# `gelu` is the exact one, as in the papers; `silu` is also known as swish.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def check_activation(name: str) -> None:
    """Raise `ValueError` unless `name` is a known activation."""
    check_choice("activation", name, ACTIVATIONS)


def activate(name: str, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply the activation called `name`: `"silu"`, `"gelu"` or `"relu"`."""
    return ACTIVATIONS[name](x)
