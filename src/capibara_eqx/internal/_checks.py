import difflib
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def check_positive(name: str, value: int | float) -> None:
    """Raise `ValueError` unless `value` is greater than zero."""
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")


def check_probability(name: str, value: int | float) -> None:
    """Raise `ValueError` unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")


def nearest(value: object, choices: Iterable[str]) -> str:
    """A hint such as `" Did you mean 'silu'?"`, empty if nothing is close."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; name the nearest."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(
            f"`{name}` must be one of {listed}; got {value!r}.{nearest(value, choices)}"
        )


def check_last_axis(
    layer: str, argument: str, x: Shaped[Array, "..."], size: int
) -> None:
    """Raise `ValueError` unless the last axis of `x` has `size` elements."""
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(
            f"{layer}: `{argument}` must have {size} elements on its last axis, got "
            f"shape {x.shape}. Build the layer with the width of its input, or "
            "project the input first."
        )


def check_sequence(
    layer: str, argument: str, x: Shaped[Array, "..."], size: int
) -> None:
    """Raise `ValueError` unless `x` is `(*batch, seq >= 1, size)`."""
    check_last_axis(layer, argument, x, size)
    if x.ndim < 2:
        raise ValueError(
            f"{layer}: `{argument}` must be a sequence (*batch, seq, {size}), got "
            f"shape {x.shape}. Pass one token to `step`, or add a sequence axis: "
            f"`{argument}[None]`."
        )
    if x.shape[-2] == 0:
        raise ValueError(
            f"{layer}: `{argument}` has a zero-length sequence, shape {x.shape}. "
            "A sequence holds at least one token."
        )


def check_segment_ids(
    layer: str, segment_ids: Shaped[Array, "..."] | None, shape: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless `segment_ids` are integers with the tokens' `shape`."""
    if segment_ids is None:
        return
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"{layer}: `segment_ids` must be of integers, got {segment_ids.dtype}. "
            "Convert them, as in `segment_ids.astype(jnp.int32)`."
        )
    if segment_ids.shape != shape:
        raise ValueError(
            f"{layer}: `segment_ids` must have the batch and sequence axes of the "
            f"input, {shape}, got shape {segment_ids.shape}."
        )
