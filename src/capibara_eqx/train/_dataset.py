from operator import index
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32, UInt8

from ..internal import check_positive


class ByteDataset:
    """Batches of windows of a text, each a pure function of `(seed, position)`.

    An epoch cuts the text into windows of `seq_len + 1` bytes that start `seq_len`
    bytes apart, so that the last byte of one is the first of the next and every byte
    is predicted once. The first window starts at a random offset below `seq_len`, and
    the windows come in a random order; both are drawn anew each epoch. Every window
    comes once an epoch, but for those of a last incomplete batch, which is dropped.

    To resume, remember the position: nothing else is state. The order is drawn from
    the bits of PCG64 alone, which NumPy keeps the same from version to version.

    **Example:**

        dataset = ByteDataset(corpus.train, seq_len=256, batch_size=16, seed=0)
        for position in range(start, start + steps):
            tokens = dataset.batch(position)
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
    """

    data: UInt8[np.ndarray, " n"]
    seq_len: int
    batch_size: int
    seed: int
    windows_per_epoch: int
    batches_per_epoch: int

    def __init__(
        self,
        data: UInt8[np.ndarray, " n"],
        seq_len: int,
        batch_size: int,
        seed: int = 0,
    ):
        """**Arguments:**

        - `data`: the text; it is not copied, so leave it unchanged.
        - `seq_len`: tokens a row that a model is trained on; rows have one byte more,
            the target of the last.
        - `batch_size`: rows a batch.
        - `seed`: not negative; another seed gives other offsets and orders.

        **Raises:**

        - `ValueError`: a size is not positive, `seed` is negative, or `data` is not
            one axis of `uint8` with at least `(batch_size + 1) * seq_len` bytes, the
            length that fills one batch from any offset.
        """
        check_positive("seq_len", seq_len)
        check_positive("batch_size", batch_size)
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(
                f"`data` must be one axis of uint8, got shape {data.shape} of "
                f"{data.dtype}. Read bytes with `np.frombuffer(text, np.uint8)`."
            )
        if data.size < (batch_size + 1) * seq_len:
            raise ValueError(
                f"`data` has {data.size} bytes, but one batch of {batch_size} windows "
                f"with `seq_len` {seq_len} needs (batch_size + 1) * seq_len = "
                f"{(batch_size + 1) * seq_len}. Give a longer text, or lower "
                "`batch_size` or `seq_len`."
            )
        self.data = data
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        # One window fewer than fit without an offset, so that every offset has as many.
        self.windows_per_epoch = data.size // seq_len - 1
        self.batches_per_epoch = self.windows_per_epoch // batch_size
        self._windows = np.lib.stride_tricks.sliding_window_view(data, seq_len + 1)
        # A memo of the pure function `_starts`: it saves time and changes no result.
        # Epoch and starts are replaced together, so threads may share the dataset.
        self._memo = (0, self._starts(0))

    def batch(
        self, position: SupportsIndex
    ) -> Int32[np.ndarray, "{self.batch_size} {self.seq_len}+1"]:
        """The batch at `position`, counted from 0 through all epochs.

        **Arguments:**

        - `position`: how many batches come before this one.

        **Returns:**

        `(batch_size, seq_len + 1)` bytes as `int32`: inputs are all but the last
        column, targets all but the first.

        **Raises:**

        - `ValueError`: `position` is negative.
        """
        position = index(position)
        if position < 0:
            raise ValueError(
                f"`position` must not be negative, got {position}. It counts the "
                "batches since the start of training."
            )
        epoch, number = divmod(position, self.batches_per_epoch)
        known, starts = self._memo
        if known != epoch:
            starts = self._starts(epoch)
            self._memo = (epoch, starts)
        first = number * self.batch_size
        return self._windows[starts[first : first + self.batch_size]].astype(np.int32)

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of `epoch` start, in the order in which they come."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        bits = np.random.PCG64(sequence).random_raw(self.windows_per_epoch + 1)
        offset = int(bits[0] % self.seq_len)
        return offset + self.seq_len * np.argsort(bits[1:], kind="stable")
