import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import UInt8

from ..internal import accumulate, check_positive
from ..models import LanguageModel


@eqx.filter_jit(donate="all-except-first")
def _score(inputs, cache):
    """Sum of the losses of one chunk in nats, and the cache after it."""
    model, tokens, targets, counted = inputs
    logits, cache = model.prefill(tokens.astype(jnp.int32), cache)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        accumulate(logits), targets.astype(jnp.int32)
    )
    return jnp.sum(jnp.where(counted, losses, jnp.zeros_like(losses))), cache


def heldout_bits_per_byte(
    model: LanguageModel,
    heldout: UInt8[np.ndarray, " bytes"],
    *,
    rows: int = 64,
    chunk: int = 256,
    report: Callable[[float], None] | None = None,
) -> float:
    r"""Bits a byte that `model` needs for `heldout`, every byte of it counted once.

    $$-\frac{1}{n} \sum_{t=1}^{n} \log_2 p(x_t \mid x_{<t})$$

    The bytes are cut into `rows` pieces that are read side by side, each from a fresh
    cache behind a NUL byte and then without a break, so that a byte sees all of its
    piece before it.

    **Arguments:**

    - `model`: a language model over bytes.
    - `heldout`: the bytes to score.
    - `rows`: number of pieces; fewer give a longer context, more run faster.
    - `chunk`: bytes of a piece read at a time.
    - `report`: called with the share that is done, 0 to 1.

    **Returns:**

    Bits a byte.

    **Raises:**

    `ValueError` without bytes, or for `rows` or `chunk` that are not positive.
    """
    check_positive("rows", rows)
    check_positive("chunk", chunk)
    if heldout.size == 0:
        raise ValueError("`heldout` must hold at least one byte, got none.")
    rows = min(rows, heldout.size)
    length = -(-heldout.size // rows)
    chunk = min(chunk, length)
    steps = -(-length // chunk)
    padded = np.zeros((rows, steps * chunk), np.uint8)
    counted = np.zeros(padded.shape, bool)
    # Row by row: each row is a contiguous piece, and the padding is at its end.
    for row in range(rows):
        piece = heldout[row * length : (row + 1) * length]
        padded[row, : piece.size] = piece
        counted[row, : piece.size] = True
    tokens = np.concatenate([np.zeros((rows, 1), np.uint8), padded[:, :-1]], axis=1)

    cache = model.init_cache((rows,), max_len=steps * chunk)
    total = 0.0
    for i in range(steps):
        part = (slice(None), slice(i * chunk, (i + 1) * chunk))
        inputs = (model, tokens[part], padded[part], counted[part])
        nats, cache = _score(inputs, cache)
        total += float(nats)
        if report is not None:
            report((i + 1) / steps)
    return total / heldout.size / math.log(2)
