import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara_eqx.train import ByteDataset


def random_text(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def counter(size):
    """A text whose windows of three bytes and more name their own start."""
    assert size < 256 * 256
    high, low = np.divmod(np.arange((size + 1) // 2), 256)
    return np.stack([high, low], 1).reshape(-1)[:size].astype(np.uint8)


def starts_of(dataset, text, epoch):
    """Where the windows of one epoch start, found by looking for them in `text`."""
    places = {}
    for start in range(len(text) - dataset.seq_len):
        places.setdefault(bytes(text[start : start + dataset.seq_len + 1]), start)
    first = epoch * dataset.batches_per_epoch
    batches = [dataset.batch(first + i) for i in range(dataset.batches_per_epoch)]
    return [places[bytes(row.astype(np.uint8))] for row in np.concatenate(batches)]


@settings(max_examples=50, deadline=None)
@given(
    seq_len=st.integers(8, 23),
    batch_size=st.integers(1, 5),
    spare=st.integers(0, 150),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 4),
)
def test_each_window_once_an_epoch(seq_len, batch_size, spare, seed, epoch):
    # With windows of nine bytes and more, random ones do not repeat.
    text = random_text((batch_size + 1) * seq_len + spare, seed)
    dataset = ByteDataset(text, seq_len, batch_size, seed)
    starts = starts_of(dataset, text, epoch)
    offset = starts[0] % seq_len
    windows = text.size // seq_len - 1
    every = set(range(offset, offset + windows * seq_len, seq_len))
    assert set(starts) <= every
    assert len(set(starts)) == len(starts) == windows // batch_size * batch_size
    assert dataset.windows_per_epoch == windows
    assert dataset.batches_per_epoch == windows // batch_size


@settings(max_examples=40, deadline=None)
@given(
    positions=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_a_batch_depends_on_seed_and_position_alone(positions, seed):
    text = random_text(700)
    jumping = ByteDataset(text, 16, 3, seed)
    for position in positions:
        fresh = ByteDataset(text.copy(), 16, 3, seed)
        np.testing.assert_array_equal(
            jumping.batch(position), fresh.batch(position), strict=True
        )


def test_resuming_at_every_position():
    text = random_text(500)
    straight = ByteDataset(text, 11, 4, seed=3)
    batches = [straight.batch(i) for i in range(3 * straight.batches_per_epoch)]
    for start in range(len(batches)):
        resumed = ByteDataset(text, 11, 4, seed=3)
        for position in range(start, len(batches)):
            np.testing.assert_array_equal(resumed.batch(position), batches[position])


def test_the_order_is_the_same_on_every_machine():
    # Written down once: a run resumed under another version must see these batches.
    dataset = ByteDataset(counter(200), 10, 2, seed=5)
    first, later = dataset.batch(0)[:, :4], dataset.batch(21)[:, :4]
    np.testing.assert_array_equal(first, [[12, 0, 13, 0], [7, 0, 8, 0]])
    np.testing.assert_array_equal(later, [[45, 0, 46, 0], [35, 0, 36, 0]])


def test_rows_share_one_byte_with_their_neighbours():
    text = np.arange(60, dtype=np.uint8)
    dataset = ByteDataset(text, 5, 1)
    rows = [dataset.batch(i)[0] for i in range(dataset.batches_per_epoch)]
    rows = np.stack(sorted(rows, key=lambda row: row[0]))
    np.testing.assert_array_equal(np.diff(rows), 1)
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])


def test_offsets_and_orders_change_between_epochs_and_seeds():
    text = counter(4001)
    dataset = ByteDataset(text, 16, 4, seed=0)
    epochs = [tuple(starts_of(dataset, text, epoch)) for epoch in range(40)]
    assert len(set(epochs)) == 40
    offsets = {starts[0] % 16 for starts in epochs}
    # Of 16 offsets, 40 draws miss 16 * (15/16)**40 = 1.2 on average.
    assert len(offsets) >= 10
    other = tuple(starts_of(ByteDataset(text, 16, 4, seed=1), text, 0))
    assert other not in epochs


def test_the_shortest_text_fills_one_batch_from_any_offset():
    text = counter(5 * 7)
    dataset = ByteDataset(text, 7, 4)
    assert dataset.batches_per_epoch == 1
    offsets = {starts_of(dataset, text, epoch)[0] % 7 for epoch in range(60)}
    assert offsets == set(range(7))


def test_the_first_window_comes_first_as_often_as_any():
    text = counter(12 * 9)
    dataset = ByteDataset(text, 9, 1)
    leads = [starts_of(dataset, text, epoch)[0] // 9 for epoch in range(1100)]
    counts = np.bincount(leads, minlength=11)
    # 1100 draws among 11 windows: 100 each, six standard deviations are 57.
    assert counts.shape == (11,)
    assert np.all(np.abs(counts - 100) < 57)


def test_dtype_and_read_only_text():
    text = random_text(300)
    text.flags.writeable = False
    batch = ByteDataset(text, 16, 2).batch(np.int64(3))
    assert batch.dtype == np.int32
    assert batch.shape == (2, 17)
    assert batch.min() >= 0
    batch[:] = -1


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, "`seq_len` must be positive"),
        ({"batch_size": -2}, "`batch_size` must be positive"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"data": np.zeros(99, np.int64)}, "uint8, got shape (99,) of int64"),
        ({"data": np.zeros((9, 9), np.uint8)}, "uint8, got shape (9, 9) of uint8"),
        ({"data": np.zeros(39, np.uint8)}, "`data` has 39 bytes, but one batch of 3"),
        ({"data": np.zeros(0, np.uint8)}, "(batch_size + 1) * seq_len = 40"),
        ({"seq_len": 26}, "(batch_size + 1) * seq_len = 104"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"data": np.zeros(100, np.uint8), "seq_len": 10, "batch_size": 3}
    with pytest.raises(ValueError, match=re.escape(message)):
        ByteDataset(**(arguments | change))


@pytest.mark.errors
def test_a_negative_position_is_an_error():
    dataset = ByteDataset(np.zeros(100, np.uint8), 10, 3)
    with pytest.raises(ValueError, match="`position` must not be negative, got -1"):
        dataset.batch(-1)


@pytest.mark.errors
def test_a_fractional_position_is_an_error():
    dataset = ByteDataset(np.zeros(100, np.uint8), 10, 3)
    with pytest.raises(TypeError, match="float"):
        dataset.batch(1.5)  # pyright: ignore[reportArgumentType]
