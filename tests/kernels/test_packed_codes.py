"""Codes of a few bits in bytes: the layout, and that they come back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_oracle as oracle
from support.derivatives import quick_jit

from capibara_eqx.kernels import (
    pack_codes,
    pack_trits,
    packed_size,
    packed_trits_size,
    unpack_codes,
    unpack_trits,
)


SIZES = range(18)
shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
sizes = st.integers(0, 41)
seeds = st.integers(0, 2**32 - 1)


def codes_of(seed, shape, count):
    return np.random.default_rng(seed).integers(0, count, shape).astype(np.uint8)


def there_and_back(codes, bits):
    """`bits` of `None` are trits."""
    if bits is None:
        packed = pack_trits(codes)
        return packed, unpack_trits(packed, codes.shape[-1])
    packed = pack_codes(codes, bits)
    return packed, unpack_codes(packed, bits, codes.shape[-1])


def rows_packed(codes, bits):
    """By the loop, row after row."""
    own = (lambda row: oracle.pack(row, bits)) if bits else oracle.pack_trits
    *batch, size = codes.shape
    packed = np.zeros((*batch, len(own(np.zeros(size, np.uint8)))), np.uint8)
    for row in np.ndindex(*batch):
        packed[row] = own(codes[row])
    return packed


@pytest.mark.parametrize("bits", [*range(1, 9), None])
def test_every_size_comes_back_in_the_documented_layout(bits):
    rows = [codes_of(size, (3, size), 2**bits if bits else 3) for size in SIZES]
    together = quick_jit(lambda rows: [there_and_back(codes, bits) for codes in rows])
    for codes, (packed, back) in zip(rows, together(rows), strict=True):
        assert packed.dtype == back.dtype == jnp.uint8
        np.testing.assert_array_equal(packed, rows_packed(codes, bits))
        np.testing.assert_array_equal(back, codes)


@settings(max_examples=50)
@given(st.sampled_from([*range(1, 9), None]), shapes, sizes, seeds)
@pytest.mark.slow
def test_codes_of_any_shape_come_back(bits, shape, size, seed):
    count = 3 if bits is None else 2**bits
    codes = codes_of(seed, (*shape, size), count)
    given_codes = jnp.asarray(codes)
    packed, back = quick_jit(functools.partial(there_and_back, bits=bits))(given_codes)
    np.testing.assert_array_equal(back, codes)
    # Pure: what was packed is as it was.
    np.testing.assert_array_equal(given_codes, codes)
    wanted = packed_trits_size(size) if bits is None else packed_size(size, bits)
    assert packed.shape == (*shape, wanted)
    # Also shows that what is left of a last byte is zero.
    np.testing.assert_array_equal(packed, rows_packed(codes, bits))


@settings(max_examples=200)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_the_size_is_the_formula(bits, size):
    assert packed_size(size, bits) == oracle.packed_size(size, bits)
    # Never a byte more than the parts of a code need.
    assert 8 * packed_size(size, bits) - bits * size < 8 * len(oracle.parts(bits))
    assert packed_trits_size(size) == int(np.ceil(size / 5))


@pytest.mark.parametrize("bits", [2, 3, 4, None])
def test_pads_are_never_seen(bits):
    """Whatever stands in what is left of a last byte, no code comes of it."""
    size = 5 if bits is not None else 6
    codes = codes_of(0, (2, size), 3)
    packed = rows_packed(codes, bits)
    if bits is None:
        dirty = packed.copy()
        dirty[:, -1] += 3 * np.arange(1, 3, dtype=np.uint8)
        np.testing.assert_array_equal(unpack_trits(jnp.asarray(dirty), size), codes)
        return
    dirty, start = packed.copy(), 0
    for width in oracle.parts(bits):
        start += -(-size * width // 8)
        used = size * width % 8
        if used:
            dirty[:, start - 1] |= np.uint8(256 - 2**used)
    assert not np.array_equal(dirty, packed)
    np.testing.assert_array_equal(unpack_codes(jnp.asarray(dirty), bits, size), codes)


def test_every_byte_of_trits_is_one_of_243():
    trits = np.stack(np.meshgrid(*[np.arange(3)] * 5, indexing="ij"), -1)
    packed, back = there_and_back(jnp.asarray(trits.reshape(-1, 5), jnp.uint8), None)
    assert sorted(np.asarray(packed).ravel()) == list(range(243))
    np.testing.assert_array_equal(back, trits.reshape(-1, 5))


@pytest.mark.parametrize("bits", [2, 7, None])
def test_under_vmap_and_scan(bits):
    codes = codes_of(3, (4, 2, 7), 3)
    one = functools.partial(there_and_back, bits=bits)
    want = rows_packed(codes, bits)
    for packed, back in (
        quick_jit(jax.vmap(one))(codes),
        quick_jit(lambda codes: jax.lax.map(one, codes))(codes),
    ):
        np.testing.assert_array_equal(packed, want)
        np.testing.assert_array_equal(back, codes)
