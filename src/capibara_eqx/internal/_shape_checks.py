import jax.numpy as jnp
from jaxtyping import Array, Shaped


_KINDS = {
    jnp.bool_: "boolean",
    jnp.integer: "of integers",
    jnp.floating: "floating point",
    jnp.inexact: "floating point or complex",
}
_CONVERSIONS = {
    jnp.bool_: "Compare to make it so, as in `{} != 0`.",
    jnp.integer: "Convert it, as in `{}.astype(jnp.int32)`.",
    jnp.floating: "Convert it, as in `{}.astype(jnp.float32)`.",
    jnp.inexact: "Convert it, as in `{}.astype(jnp.float32)`.",
}


def check_kind(
    operation: str, arrays: dict[str, Shaped[Array, "..."] | None], kind: type
) -> None:
    """Raise `ValueError` unless every array that is there is of the `kind`.

    `kind` is an abstract dtype such as `jnp.bool_` or `jnp.floating`.
    """
    for argument, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, kind):
            raise ValueError(
                f"{operation}: `{argument}` must be {_KINDS[kind]}, got {x.dtype}. "
                f"{_CONVERSIONS[kind].format(argument)}"
            )


def check_batch(
    operation: str,
    argument: str,
    x: Shaped[Array, "..."],
    core: tuple[str, ...],
) -> None:
    """Raise `ValueError` unless `x` is `(*batch, *core)` with a sequence in it.

    `core` begins with the axis of the sequence.
    """
    layout = f"(*batch, {', '.join(core)})"
    if x.ndim < len(core):
        raise ValueError(
            f"{operation}: `{argument}` must have shape {layout}, got {x.shape}."
        )
    if x.shape[-len(core)] == 0:
        raise ValueError(
            f"{operation}: `{argument}` has a zero-length sequence, shape {x.shape}; "
            "a sequence holds at least one token."
        )


def check_shape(
    operation: str,
    argument: str,
    x: Shaped[Array, "..."] | None,
    expected: tuple[int, ...],
    meaning: str,
    *,
    kind: type | None = None,
) -> None:
    """Raise `ValueError` unless `x` is absent or has the `expected` shape and kind.

    See `check_kind`.
    """
    if x is None:
        return
    if x.shape != tuple(expected):
        raise ValueError(
            f"{operation}: `{argument}` must have {meaning}, here {tuple(expected)}; "
            f"got {x.shape}."
        )
    if kind is not None:
        check_kind(operation, {argument: x}, kind)
