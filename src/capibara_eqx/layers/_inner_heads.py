def inner_heads(d_model: int, expand: int, head_dim: int, n_groups: int) -> int:
    """Number of heads of the `expand * d_model` inner channels.

    **Raises:**

    `ValueError` if the heads do not divide the channels, or the groups the heads.
    """
    d_inner = expand * d_model
    if d_inner % head_dim:
        raise ValueError(
            f"`head_dim` must divide the {d_inner} inner channels (expand * "
            f"d_model), got {head_dim}."
        )
    n_heads = d_inner // head_dim
    if n_heads % n_groups:
        raise ValueError(
            f"`n_groups` must divide the {n_heads} heads (expand * d_model / "
            f"head_dim), got {n_groups}."
        )
    return n_heads
