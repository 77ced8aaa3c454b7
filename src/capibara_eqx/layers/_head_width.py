from ..internal import check_size


def head_width(d_model: int, parts: int, name: str, width: int | None) -> int:
    """The width of a head called `name`: `d_model / parts` if it is not given.

    **Raises:**

    `ValueError` for a width that is not positive, or if `parts` do not divide
    `d_model`.
    """
    if width is not None:
        check_size(name, width)
        return width
    if d_model % parts:
        raise ValueError(
            f"`{name}` is d_model / {parts} if it is not given, and d_model={d_model} "
            f"is no multiple of {parts}. Pass `{name}`, or change `n_heads`."
        )
    return d_model // parts
