import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from ._state_space_scan import (
    AbstractSystem,
    Chunk,
    as_complex,
    as_functional,
    as_state,
    einsum,
    lifted,
)


# Frequencies at which the denominators of all states are there at the same time.
_NODES = 64


class LowRankSystem(AbstractSystem):
    r"""Bilinear steps of $h' = A h + B u$ with $A = \Lambda - P P^*$.

    One of each conjugate pair is kept, so that the inner products $P^* h$ of all states
    are $2 \mathrm{Re}(P^* h)$ of those: $A$ is linear in a real state only.

    $(1 - \Delta A / 2)^{-1}$ is the diagonal `inverse`, then, one rank after the other
    (Sherman and Morrison), less `corrections` times an inner product.
    """

    poles: Complex[Array, "d_model half"]
    P: tuple[Complex[Array, "d_model half"], ...]
    B: Complex[Array, "d_model half"]
    C: Complex[Array, "d_model half"]
    dt: Float[Array, " d_model"]
    inverse: Complex[Array, "d_model half"]
    corrections: tuple[Complex[Array, "d_model half"], ...]

    def __init__(
        self,
        poles: Complex[Array, "d_model half"],
        P: tuple[Complex[Array, "d_model half"], ...],
        B: Complex[Array, "d_model half"],
        C: Complex[Array, "d_model half"],
        dt: Float[Array, " d_model"],
    ):
        self.poles, self.P, self.B, self.C, self.dt = poles, P, B, C, dt
        self.inverse = 1 / (1 - (dt / 2).astype(poles.dtype)[:, None] * poles)
        self.corrections = ()
        for row in P:
            solved = self._solved(row)
            scale = 1 / (2 / dt + _inner(row, solved))
            self.corrections += (solved * scale[:, None].astype(poles.dtype),)

    def _solved(self, z):
        z = lifted(self.inverse, z.ndim) * z
        for row, correction in zip(self.P, self.corrections, strict=False):
            z = z - _along(correction, row, z)
        return z

    def advance(self, h, u):
        z = as_complex(h)
        slope = lifted(self.poles, z.ndim) * z
        for row in self.P:
            slope = slope - _along(row, row, z)
        slope = slope + lifted(self.B, z.ndim) * (2 * u)[..., None].astype(z.dtype)
        half_step = (self.dt / 2).astype(z.dtype)[:, None]
        return as_state(self._solved(z + lifted(half_step, z.ndim) * slope))

    def readout(self, h):
        return jnp.sum(lifted(as_functional(self.C), h.ndim) * h, axis=-1)

    def chunk(self, size):
        A, B = self._dense()
        doublings = _doublings(A, size)
        reach = _orbit("dij,kdj->kdi", doublings, B, size)
        first = einsum("dij,di->dj", A, as_functional(self.C))
        observe = _orbit("dij,kdi->kdj", doublings, first, size)
        over = _power(doublings, size)

        def leap(h):
            return einsum("dij,...dj->...di", over, h)

        return Chunk(self.readout(reach), reach, observe, leap)

    def kernel(self, length):
        # The kernel's tail after the row would come around: C (1 - A^length) has none.
        A, _ = self._dense()
        over = _power(_doublings(A, length), length)
        C = as_functional(self.C)
        C = C - einsum("dij,di->dj", over, C)
        real, imag = jnp.split(C / 2, 2, axis=-1)
        ends = jax.lax.complex(real, -imag)
        # Half the angles of the roots of unity, so that nothing cancels near z = 1.
        count = length // 2 + 1
        blocks = -(-count // _NODES)
        size = min(count, _NODES)
        angles = jnp.arange(blocks * size, dtype=self.dt.dtype) * (jnp.pi / length)

        @jax.checkpoint
        def at(angles):
            return self._generating(ends, angles)

        values = jax.lax.map(at, angles.reshape(blocks, size))
        values = values.reshape(blocks * size, -1)[:count]
        return jnp.fft.irfft(values.T, length).T

    def _dense(self):
        """The step's real matrix and vector."""
        d_model, half = self.poles.shape
        shape = (2 * half, d_model, 2 * half)
        eye = jnp.eye(2 * half, dtype=self.dt.dtype)[:, None]
        silence = jnp.zeros(shape[:2], self.dt.dtype)
        columns = self.advance(jnp.broadcast_to(eye, shape), silence)
        impulse = jnp.ones_like(self.dt)
        response = self.advance(jnp.zeros(shape[1:], self.dt.dtype), impulse)
        return jnp.moveaxis(columns, 0, -1), response

    def _generating(self, C, angles):
        r"""$\sum_t K_t z^t$ at $z = e^{-2 i \theta}$, for the kernel of `C`.

        It is $C (1 - \bar A z)^{-1} \bar B = \Delta e^{i\theta} C (w - v A)^{-1} B$,
        where $w = 2 i \sin\theta$ and $v = \Delta \cos\theta$: products of C and P with
        B and P over $w - v \lambda$, from which the low rank part is eliminated. The
        two terms of a conjugate pair are one quotient, whose numerator is real but for
        $w$.
        """
        poles, size = self.poles[None], len(self.P) + 1
        w = 2 * jnp.sin(angles)[:, None]  # less the factor i
        v = self.dt[None] * jnp.cos(angles)[:, None]
        squares = jnp.square(poles.real) + jnp.square(poles.imag)
        real = jnp.square(v)[..., None] * squares - jnp.square(w)[..., None]
        inverse = 1 / jax.lax.complex(real, -2 * (w * v)[..., None] * poles.real)
        left, right = [C, *map(jnp.conj, self.P)], [self.B, *self.P]
        products = jnp.stack([x * y for x in left for y in right], axis=1)
        turned = products * jnp.conj(self.poles)[:, None]
        numerators = 2 * jnp.concatenate([products.real, turned.real], axis=1)
        sums = jax.lax.complex(
            einsum("kdn,den->edk", inverse.real, numerators),
            einsum("kdn,den->edk", inverse.imag, numerators),
        )
        sums = jnp.swapaxes(sums, 1, 2)
        w, v = jax.lax.complex(jnp.zeros_like(w), w), v.astype(sums.dtype)
        by_w, by_v = jnp.split(sums, 2)
        forms = w[None] * by_w - v[None] * by_v
        forms = forms.reshape(size, size, *v.shape)
        for k in range(1, size):
            # The resolvent of one rank more.
            factor = (v / (1 + v * forms[k, k]))[None, None]
            forms = forms - factor * forms[:, k : k + 1] * forms[k : k + 1]
        turn = jax.lax.complex(jnp.cos(angles), jnp.sin(angles))[:, None]
        return turn * self.dt.astype(sums.dtype)[None] * forms[0, 0]


def _inner(row: Array, z: Array) -> Array:
    """The inner product over conjugate pairs, `2 Re(row* z)`."""
    return 2 * jnp.sum(jnp.real(lifted(jnp.conj(row), z.ndim) * z), axis=-1)


def _along(direction: Array, row: Array, z: Array) -> Array:
    """`direction` times the inner product of `row` and `z`."""
    return lifted(direction, z.ndim) * _inner(row, z)[..., None].astype(z.dtype)


def _product(left: Array, right: Array) -> Array:
    return einsum("dij,djk->dik", left, right)


def _doublings(A: Array, count: int) -> list[Array]:
    """`A`, `A ** 2`, `A ** 4` and so on, up to `A ** count` at most."""
    powers = [A]
    while 2 ** len(powers) <= count:
        powers.append(_product(powers[-1], powers[-1]))
    return powers


def _power(doublings: list[Array], count: int) -> Array:
    """`A ** count`, from the powers that its binary digits name."""
    chosen = [power for k, power in enumerate(doublings) if count >> k & 1]
    return functools.reduce(_product, chosen)


def _orbit(formula: str, doublings: list[Array], first: Array, count: int) -> Array:
    """`first` after 0 to `count - 1` steps: each doubling takes all so far along."""
    orbit = first[None]
    for power in doublings:
        if len(orbit) < count:
            orbit = jnp.concatenate([orbit, einsum(formula, power, orbit)])
    return orbit[:count]
