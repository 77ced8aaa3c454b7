import enum


class AttentionMode(enum.StrEnum):
    """The three ways in which attention makes its keys and values.

    - `STANDARD`, `"standard"`: every head has its own, `Attention(n_kv_heads=None)`.
    - `GQA`, `"gqa"`: neighbouring heads share them, `Attention(n_kv_heads=...)`.
    - `DECOUPLED`, `"decoupled"`: narrow ones, by content and by position apart,
        `DecoupledAttention`.

    `layer.mode` says which a layer is.

    !!! example

        ```python
        model = transformer_language_model(
            256, 64, 2, 8, n_kv_heads=2, mode=AttentionMode.GQA, key=key
        )
        ```
    """

    STANDARD = "standard"
    GQA = "gqa"
    DECOUPLED = "decoupled"
