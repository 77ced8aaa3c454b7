from jaxtyping import Array, Shaped


def check_batch(
    operation: str,
    argument: str,
    x: Shaped[Array, "..."],
    core: tuple[str, str],
) -> None:
    """Raise `ValueError` unless `x` is `(*batch, *core)` with a sequence in it."""
    layout = f"(*batch, {', '.join(core)})"
    if x.ndim < len(core):
        raise ValueError(
            f"{operation}: `{argument}` must have shape {layout}, got {x.shape}."
        )
    if x.shape[-2] == 0:
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
    boolean: bool = False,
) -> None:
    """Raise `ValueError` unless `x` is absent or has the `expected` shape."""
    if x is None:
        return
    if x.shape != tuple(expected):
        raise ValueError(
            f"{operation}: `{argument}` must have {meaning}, here {tuple(expected)}; "
            f"got {x.shape}."
        )
    if boolean and x.dtype != bool:
        raise ValueError(
            f"{operation}: `{argument}` must be boolean, got {x.dtype}. Compare to "
            f"make it so, as in `{argument} != 0`."
        )
