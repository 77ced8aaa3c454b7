import difflib
import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


_REAL = int | float | np.integer | np.floating


def check_positive(name: str, value: int | float) -> None:
    """Raise `ValueError` unless `value` is greater than zero and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


def check_size(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a whole number greater than zero."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_probability(name: str, value: int | float) -> None:
    """Raise `ValueError` unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")


def check_range(
    name: str,
    value: object,
    *,
    above: int | float | None = None,
    least: int | float | None = None,
    below: int | float | None = None,
    most: int | float | None = None,
    hint: str = "",
) -> None:
    """Raise `ValueError` unless `value` is a finite number inside the bounds.

    `above` and `below` are excluded, `least` and `most` are not. `hint` ends the
    message: the likely fix.
    """
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise ValueError(f"`{name}` must be a number, got {value!r}. {hint}".rstrip())
    number = _as_float32(value)
    if not abs(number) <= float(np.finfo(np.float32).max):  # so that NaN is refused too
        raise ValueError(
            f"`{name}` must be finite in float32, got {value}. {hint}".rstrip()
        )
    inside = (
        (above is None or number > above)
        and (least is None or number >= least)
        and (below is None or number < below)
        and (most is None or number <= most)
    )
    if not inside:
        at_edge = number in (above, below) and number != value
        rounded = f", which is {number:g} in float32" if at_edge else ""
        raise ValueError(
            f"`{name}` must {_bounds(above, least, below, most)}, got "
            f"{value}{rounded}. {hint}".rstrip()
        )


def _as_float32(value) -> int | float:
    """What arrays make of a number: subnormal ones are zero there; integers stay."""
    if isinstance(value, int | np.integer):
        return int(value)
    with np.errstate(over="ignore", under="ignore"):
        number = float(np.float32(value))
    return 0.0 if abs(number) < np.finfo(np.float32).tiny else number


def _bounds(above, least, below, most) -> str:
    if least is not None and most is not None:
        return f"lie between {least} and {most}"
    positive = "positive" if above == 0 else f"above {above}"
    words = [
        positive if above is not None else None,
        f"{least} or greater" if least is not None else None,
        f"below {below}" if below is not None else None,
        f"at most {most}" if most is not None else None,
    ]
    return "be " + " and ".join(word for word in words if word is not None)


def check_seed(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a seed of its own for `jax.random.key`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")
    # Beyond, jax keeps the low 32 bits: two seeds would give the same run.
    check_range(name, value, least=0, most=2**32 - 1)


def nearest(value: object, choices: Iterable[str | None]) -> str:
    """A hint such as `" Did you mean 'silu'?"`, empty if nothing is close."""
    close = difflib.get_close_matches(
        str(value), [c for c in choices if c is not None], n=1
    )
    return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`; name the nearest."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(
            f"`{name}` must be one of {listed}; got {value!r}.{nearest(value, choices)}"
        )


def check_keys(owner: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` for a key that `owner` does not have; name the nearest."""
    known = tuple(known)
    for key in keys:
        if key not in known:
            raise ValueError(
                f"{owner} has no `{key}`; it has {', '.join(known)}."
                f"{nearest(key, known)}"
            )


def check_flag(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is `True` or `False`."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


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


def check_floating(
    layer: str, argument: str, x: Shaped[Array, "..."], hint: str = ""
) -> None:
    """Raise `ValueError` unless `x` is of real numbers."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{layer}: `{argument}` must be floating point, got {x.dtype}. Convert it, "
            f"as in `{argument}.astype(jnp.float32)`{hint}."
        )


def check_sequence(
    layer: str, argument: str, x: Shaped[Array, "..."], size: int
) -> None:
    """Raise `ValueError` unless `x` is `(*batch, seq >= 1, size)`, of real numbers."""
    check_last_axis(layer, argument, x, size)
    check_floating(layer, argument, x, "; token ids need an embedding")
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


def check_ids(layer: str, argument: str, ids: Shaped[Array, "..."]) -> None:
    """Raise `ValueError` unless `ids` are integers."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{layer}: `{argument}` must be of integers, got {ids.dtype}. "
            f"Convert them, as in `{argument}.astype(jnp.int32)`."
        )


def check_segment_ids(
    layer: str, segment_ids: Shaped[Array, "..."] | None, shape: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless `segment_ids` are integers with the tokens' `shape`."""
    if segment_ids is None:
        return
    check_ids(layer, "segment_ids", segment_ids)
    if segment_ids.shape != shape:
        raise ValueError(
            f"{layer}: `segment_ids` must have the batch and sequence axes of the "
            f"input, {shape}, got shape {segment_ids.shape}."
        )
