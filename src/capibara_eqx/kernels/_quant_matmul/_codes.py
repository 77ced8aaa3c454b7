import jax.numpy as jnp
from jaxtyping import Array, UInt8

from ...internal import check_range


# What a code of so many bits is cut into, low bits first: parts that divide a byte.
_PARTS = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
_TRITS = 5  # 3^5 = 243 of the 256 values of a byte


def packed_size(size: int, bits: int) -> int:
    """How many bytes `pack_codes` needs for `size` codes.

    !!! example

        ```python
        packed_size(10, 4)                             # 5
        ```
    """
    check_bits(bits)
    return sum(-(-size * width // 8) for width in _PARTS[bits])


def pack_codes(codes: UInt8[Array, "*batch size"], bits: int) -> UInt8[Array, "..."]:
    r"""Codes of a few bits, packed along the last axis.

    With $p = 8 / b$ codes a byte, byte $j$ is
    $\sum_{i<p} 2^{b i} c_{pj+i}$: neighbours share a byte, so that an array that is
    sharded along this axis is unpacked where it lies. Where $b$ divides no byte the
    code is cut into parts that do, low bits first (3 = 2 + 1, 7 = 4 + 2 + 1), and the
    bytes of the parts follow each other.

    **Arguments:**

    - `codes`: in $[0, 2^b)$, `(*batch, size)`.
    - `bits`: of a code, 1 to 8.

    **Returns:**

    `(*batch, packed_size(size, bits))`. What is left of a last byte is zero.

    **Raises:**

    `ValueError` for `bits` outside 1 to 8, or codes without an axis.

    !!! example

        ```python
        codes = jnp.array([1, 2, 3, 0, 1], jnp.uint8)
        unpack_codes(pack_codes(codes, 2), 2, 5)       # the same
        ```
    """
    check_bits(bits)
    _check_axis("pack_codes", "codes", codes)
    packed, shift = [], 0
    for width in _PARTS[bits]:
        part = (codes >> shift) & (2**width - 1)
        shift += width
        columns = _columns(part, 8 // width)
        packed.append(sum(column << (width * i) for i, column in enumerate(columns)))
    return jnp.concatenate(packed, axis=-1) if len(packed) > 1 else packed[0]


def unpack_codes(
    packed: UInt8[Array, "*batch bytes"], bits: int, size: int
) -> UInt8[Array, "*batch size"]:
    """What `pack_codes` packed.

    **Arguments:**

    - `packed`: `(*batch, packed_size(size, bits))`.
    - `bits`: of a code, 1 to 8.
    - `size`: how many codes there are.

    **Returns:**

    The codes, `(*batch, size)`.

    **Raises:**

    `ValueError` for `bits` outside 1 to 8, or another number of bytes than `size` codes
    have.

    !!! example

        ```python
        packed = pack_codes(jnp.arange(5, dtype=jnp.uint8), 3)
        codes = unpack_codes(packed, 3, 5)
        ```
    """
    check_bits(bits)
    _check_axis("unpack_codes", "packed", packed)
    _check_bytes("unpack_codes", packed, packed_size(size, bits), f"{bits} bits", size)
    codes, start, shift = None, 0, 0
    for width in _PARTS[bits]:
        end = start + -(-size * width // 8)
        columns = [
            (packed[..., start:end] >> (width * i)) & (2**width - 1)
            for i in range(8 // width)
        ]
        part = _rows(columns, size) << shift
        codes = part if codes is None else codes | part
        start, shift = end, shift + width
    assert codes is not None
    return codes


def packed_trits_size(size: int) -> int:
    """How many bytes `pack_trits` needs for `size` trits.

    !!! example

        ```python
        packed_trits_size(11)                          # 3
        ```
    """
    return -(-size // _TRITS)


def pack_trits(trits: UInt8[Array, "*batch size"]) -> UInt8[Array, "..."]:
    r"""Codes 0, 1 and 2, five a byte: 1.6 bits each.

    Byte $j$ is $\sum_{i<5} 3^i t_{5j+i}$. Reading them back divides, where
    `unpack_codes` of two bits shifts: made for files.

    **Arguments:**

    - `trits`: 0, 1 or 2, `(*batch, size)`.

    **Returns:**

    `(*batch, packed_trits_size(size))`. What is left of a last byte is zero.

    **Raises:**

    `ValueError` for trits without an axis.

    !!! example

        ```python
        trits = jnp.array([0, 1, 2, 2, 1, 0], jnp.uint8)
        unpack_trits(pack_trits(trits), 6)             # the same
        ```
    """
    _check_axis("pack_trits", "trits", trits)
    first, *others = _columns(trits, _TRITS)
    return sum((column * 3**i for i, column in enumerate(others, start=1)), first)


def unpack_trits(
    packed: UInt8[Array, "*batch bytes"], size: int
) -> UInt8[Array, "*batch size"]:
    """What `pack_trits` packed.

    **Arguments:**

    - `packed`: `(*batch, packed_trits_size(size))`.
    - `size`: how many trits there are.

    **Returns:**

    The trits, `(*batch, size)`.

    **Raises:**

    `ValueError` for another number of bytes than `size` trits have.

    !!! example

        ```python
        packed = pack_trits(jnp.ones((4, 7), jnp.uint8))
        trits = unpack_trits(packed, 7)
        ```
    """
    _check_axis("unpack_trits", "packed", packed)
    _check_bytes("unpack_trits", packed, packed_trits_size(size), "base 3", size)
    return _rows([(packed // 3**i) % 3 for i in range(_TRITS)], size)


def check_bits(bits: object, least: int = 1) -> None:
    """Raise `ValueError` unless `bits` is a whole number from `least` to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise ValueError(f"`bits` must be an integer, got {bits!r}.")
    check_range("bits", bits, least=least, most=8, hint="A code has at most a byte.")


def _columns(codes, count):
    """`codes` in rows of `count`, by column; the last row is filled up with zeros."""
    missing = -codes.shape[-1] % count
    if missing:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    # Not -1, of which no number follows for a batch without elements.
    rows = codes.reshape(*codes.shape[:-1], codes.shape[-1] // count, count)
    return [rows[..., i] for i in range(count)]


def _rows(columns, size):
    if len(columns) == 1:
        return columns[0]
    rows = jnp.stack(columns, axis=-1)
    flat = rows.reshape(*rows.shape[:-2], rows.shape[-2] * len(columns))
    return flat if flat.shape[-1] == size else flat[..., :size]


def _check_axis(function, argument, x):
    if x.ndim == 0:
        raise ValueError(
            f"{function}: `{argument}` must have an axis to pack along, got a scalar."
        )


def _check_bytes(function, packed, expected, kind, size):
    if packed.shape[-1] != expected:
        raise ValueError(
            f"{function}: `packed` must have {expected} bytes on its last axis for "
            f"{size} codes of {kind}, got shape {packed.shape}. Was it packed with "
            "another number of bits, or cut off?"
        )
