import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int, Shaped

from ..internal import segment_documents


class Chunk(NamedTuple):
    """What is needed to read `size` tokens at once.

    `kernel[t]` is the output of an impulse `t` tokens ago, `reach[t]` the state that it
    has become, `observe[t]` the functional that reads the output at token `t` of the
    chunk off the state in front of it, and `leap` takes that state over the chunk.
    """

    kernel: Float[Array, "size d_model"]
    reach: Float[Array, "size d_model d_state"]
    observe: Float[Array, "size d_model d_state"]
    leap: Callable[[Array], Array]


class AbstractSystem(eqx.Module):
    r"""One linear system a channel, $h_t = \bar A h_{t-1} + \bar B u_t$, $y = C h_t$.

    States are real: those of conjugate pairs are the real parts of one of each, then
    the imaginary parts.
    """

    @abc.abstractmethod
    def advance(
        self, h: Float[Array, "*lead d_model d_state"], u: Float[Array, "*lead d_model"]
    ) -> Float[Array, "*lead d_model d_state"]:
        """The state one token later."""

    @abc.abstractmethod
    def readout(
        self, h: Float[Array, "*lead d_model d_state"]
    ) -> Float[Array, "*lead d_model"]:
        """The output at a token, from the state after it."""

    @abc.abstractmethod
    def chunk(self, size: int) -> Chunk:
        """How to read `size` tokens at once."""

    @abc.abstractmethod
    def kernel(self, length: int) -> Float[Array, "length d_model"]:
        """The outputs that follow an impulse."""


def read_tokens(
    system: AbstractSystem,
    u: Float[Array, "*lead seq d_model"],
    h: Float[Array, "*lead d_model d_state"],
    valid: Bool[Array, "*lead seq"] | None = None,
) -> tuple[Float[Array, "*lead seq d_model"], Float[Array, "*lead d_model d_state"]]:
    """Outputs and the last state, one token after the other.

    Tokens that are not `valid` leave the state alone.
    """

    def token(h, now):
        u, valid = now
        after = system.advance(h, u)
        if valid is not None:
            after = jnp.where(valid[..., None, None], after, h)
        return after, system.readout(after)

    axis = u.ndim - 2
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), (u, valid))
    h, y = jax.lax.scan(token, h, tokens)
    return jnp.moveaxis(y, 0, axis), h


def read_chunks(
    system: AbstractSystem,
    u: Float[Array, "*lead seq d_model"],
    h: Float[Array, "*lead d_model d_state"],
    size: int,
    documents: Int[Array, "*lead seq"] | None = None,
) -> tuple[Float[Array, "*lead seq d_model"], Float[Array, "*lead d_model d_state"]]:
    """As `read_tokens`, in chunks of `size` tokens.

    `documents` are the numbers of `segment_documents`, the negative ones last: all
    tokens of padding stand behind.
    """
    *lead, seq, d_model = u.shape
    size = min(size, seq)
    count = -(-seq // size)
    chunk = system.chunk(size)
    padding = [(0, 0)] * len(lead) + [(0, count * size - seq)]
    parts = jnp.pad(u, [*padding, (0, 0)]).reshape(*lead, count, size, d_model)
    if documents is None:
        row = None
        y, arriving = _inside(chunk.kernel, parts, None), parts
    else:
        row = _Documents.of(documents, padding, (count, size))
        y = _inside(chunk.kernel, parts, row.numbers)
        last = (row.numbers == row.last[..., None])[..., None]
        arriving = jnp.where(last, parts, jnp.zeros_like(parts))
    gathered = einsum("jdn,...jd->...dn", chunk.reach[::-1], arriving)

    def pass_on(h, now):
        gathered, continues = now
        after = chunk.leap(h)
        if continues is not None:
            # Replaced, not multiplied by zero: the state may be infinite.
            after = jnp.where(continues[..., None, None], after, jnp.zeros_like(after))
        return after + gathered, h

    axis = len(lead)
    now = (gathered, None if row is None else row.last == row.before)
    now = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), now)
    last, entering = jax.lax.scan(pass_on, h, now)
    inherited = einsum("idn,...dn->...id", chunk.observe, entering)
    inherited = jnp.moveaxis(inherited, 0, axis)
    if row is not None:
        continued = (row.numbers == row.before[..., None])[..., None]
        inherited = jnp.where(continued, inherited, jnp.zeros_like(inherited))
    y = (y + inherited).reshape(*lead, count * size, d_model)[..., :seq, :]
    states = jnp.concatenate([entering, last[None]])
    return y, _after_the_rest(system, u, states, size, documents)


def read_packed(
    system: AbstractSystem,
    u: Float[Array, "*lead seq d_model"],
    h: Float[Array, "*lead d_model d_state"],
    size: int,
    segment_ids: Int[Array, "*lead seq"],
    before: Int[Array, "*lead"],
) -> tuple[Float[Array, "*lead seq d_model"], Float[Array, "*lead d_model d_state"]]:
    """As `read_chunks`, of documents and padding in any order.

    `before` is the segment that `h` belongs to. Padding is put behind all tokens, so
    that the lag between two tokens is their distance again, the same for every row.
    """
    documents = segment_documents(segment_ids, before)
    order = jnp.argsort(documents < 0, axis=-1, stable=True)
    u = jnp.take_along_axis(u, order[..., None], axis=-2)
    documents = jnp.take_along_axis(documents, order, axis=-1)
    y, h = read_chunks(system, u, h, size, documents)
    return jnp.take_along_axis(y, jnp.argsort(order, axis=-1)[..., None], axis=-2), h


def convolve(
    u: Float[Array, "*lead seq d_model"], kernel: Float[Array, "seq d_model"]
) -> Float[Array, "*lead seq d_model"]:
    """The causal convolution over time, by Fourier transforms.

    Padded to twice the length, so that nothing comes around; to the next power of two,
    so that no length is a slow one.
    """
    seq = u.shape[-2]
    padded = 1 << (2 * seq - 1).bit_length()

    def transformed(x):
        return jnp.fft.rfft(jnp.swapaxes(x, -1, -2), padded)

    product = transformed(u) * lifted(transformed(kernel), u.ndim)
    return jnp.swapaxes(jnp.fft.irfft(product, padded)[..., :seq], -1, -2)


def lifted(x: Shaped[Array, "..."], ndim: int) -> Shaped[Array, "..."]:
    """`x` with axes of one element in front."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def as_complex(h: Float[Array, "*lead d_state"]) -> Complex[Array, "*lead half"]:
    """The complex numbers of a real state."""
    return jax.lax.complex(*jnp.split(h, 2, axis=-1))


def as_state(z: Complex[Array, "*lead half"]) -> Float[Array, "*lead d_state"]:
    """The real state of complex numbers."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def as_functional(c: Complex[Array, "*lead half"]) -> Float[Array, "*lead d_state"]:
    """What times `as_state(z)` sums to `2 Re(c z)`, the sum over conjugate pairs."""
    return jnp.concatenate([2 * c.real, -2 * c.imag], axis=-1)


def einsum(formula: str, *operands: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`jnp.einsum` in full precision: a GPU would round the factors to ten bits."""
    return jnp.einsum(formula, *operands, precision=jax.lax.Precision.HIGHEST)


class _Documents(NamedTuple):
    """The documents of each chunk's tokens, of its last one and of that before it."""

    numbers: Int[Array, "*lead count size"]
    last: Int[Array, "*lead count"]
    before: Int[Array, "*lead count"]

    @staticmethod
    def of(documents, padding, shape) -> "_Documents":
        numbers = jnp.pad(documents, padding, constant_values=-1)
        numbers = numbers.reshape(*documents.shape[:-1], *shape)
        last = jnp.max(numbers, axis=-1)
        before = jnp.concatenate([jnp.zeros_like(last[..., :1]), last[..., :-1]], -1)
        return _Documents(numbers, last, before)


def _inside(kernel: Array, u: Array, numbers: Array | None) -> Array:
    """The outputs that come from the same chunk, and from the same document.

    A pass over all tokens a lag, recomputed for the gradient. Measured on 2 CPU cores,
    2 rows of 1024 tokens, 256 channels, chunks of 64, in documents: 3 ms forward and
    26 ms with gradients, where the product with a masked Toeplitz matrix a channel took
    141 and 1022 ms; without documents the product was no faster either.
    """
    size = len(kernel)
    axis = u.ndim - 2
    padding = [(0, 0)] * axis + [(size - 1, 0)]
    earlier = jnp.pad(u, [*padding, (0, 0)])
    if numbers is not None:
        names = jnp.pad(numbers, padding, constant_values=-1)

    @jax.checkpoint
    def at_lag(y, now):
        row, start = now
        window = jax.lax.dynamic_slice_in_dim(earlier, start, size, axis)
        if numbers is not None:
            name = jax.lax.dynamic_slice_in_dim(names, start, size, axis)
            same = (name == numbers)[..., None]
            window = jnp.where(same, window, jnp.zeros_like(window))
        return y + lifted(row, u.ndim) * window, None

    starts = jnp.arange(size - 1, -1, -1)
    return jax.lax.scan(at_lag, jnp.zeros_like(u), (kernel, starts))[0]


def _after_the_rest(system, u, states, size, documents) -> Array:
    """The state after a row, whose last chunk need not be full, from those between.

    The rest is read token by token: how many powers of the system it takes differs
    from row to row.
    """
    seq = u.shape[-2]
    if documents is None:
        whole = seq // size
        if whole * size == seq:
            return states[-1]
        return read_tokens(system, u[..., whole * size :, :], states[whole])[1]
    length = jnp.sum(documents >= 0, axis=-1)
    last = jnp.maximum(jnp.max(documents, axis=-1), 0)
    whole = length // size
    h = jnp.take_along_axis(states, whole[None, ..., None, None], axis=0)[0]
    edge = jnp.maximum(whole * size - 1, 0)[..., None]
    before = jnp.take_along_axis(documents, edge, axis=-1)[..., 0]
    continues = jnp.where(whole > 0, before, 0) == last
    h = jnp.where(continues[..., None, None], h, jnp.zeros_like(h))
    rest = whole[..., None] * size + lifted(jnp.arange(size - 1), whole.ndim + 1)
    at = jnp.minimum(rest, seq - 1)
    same = jnp.take_along_axis(documents, at, axis=-1) == last[..., None]
    u = jnp.take_along_axis(u, at[..., None], axis=-2)
    return read_tokens(system, u, h, (rest < length[..., None]) & same)[1]
