r"""Sums over the inputs of a weight, as gradients of zeros.

A tally is an array of zeros. Where the weight is used, a *probe* is made of it, linear
in the zeros, and dropped again; but the backward pass is told that the cotangent of the
probe is some *signal*, so that the gradient of the zeros is the sum that the transpose
of the probe makes of the signals. Of the probe $D x$ and the signal $x$ that is $\sum
x x^T$. Cotangents are added up over uses, tokens, `vmap`s and `scan`s, all by one
product of matrices each, and nothing of the forward pass changes.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


Pair = tuple[Array, Array]


class AbstractTally(eqx.Module):
    """Zeros in which the inputs of a weight are added up, `(*stack, ...)`."""

    tokens: eqx.AbstractVar[Float[Array, "*stack"]]

    @abc.abstractmethod
    def pairs(
        self, x: Float[Array, "*batch in"], present: Bool[Array, "*batch"] | None
    ) -> list[Pair]:
        """Probes and signals of inputs; those that are not present are zero."""

    def watch(
        self,
        through: Float[Array, "..."],
        x: Float[Array, "*batch in"],
        present: Bool[Array, "*batch"] | None = None,
    ) -> Float[Array, "..."]:
        """`through` itself; when it is differentiated, `x` has been added up."""
        x = jax.lax.stop_gradient(x)
        # A probe must be one of `x`, or an outer `vmap` would not count its rows.
        nothing = 0 * x[..., 0].astype(self.tokens.dtype)
        probe = jnp.broadcast_to(self.tokens, nothing.shape) + nothing
        ones = jnp.ones_like(probe) if present is None else present.astype(probe.dtype)
        pairs = [(probe, ones), *self.pairs(x, present)]
        probes, signals = zip(*pairs, strict=True)
        return _seen(through, probes, signals)


class SecondMoments(AbstractTally):
    r"""Tokens, and $\sum x x^T$ over them."""

    tokens: Float[Array, "*stack"]
    matrix: Float[Array, "*stack in in"]

    def pairs(self, x, present):
        del present  # What is not present is zero.
        x = x.astype(self.matrix.dtype)
        exact = jax.lax.Precision.HIGHEST
        return [(jnp.matmul(x, self.matrix, precision=exact), x)]


class Sizes(AbstractTally):
    """Tokens, and how many of their values have which size; see `bins`."""

    tokens: Float[Array, "*stack"]
    histogram: Float[Array, "*stack bins"]

    def pairs(self, x, present):
        probe = self.histogram[bins(x)]
        ones = jnp.ones(x.shape, probe.dtype)
        if present is not None:
            ones = jnp.where(present[..., None], ones, jnp.zeros_like(ones))
        return [(probe, ones)]


BINS = 2**15
_DROPPED_BITS = 16


def bins(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """A bin for every size: values that share the first 15 bits of float32's `|x|`.

    Those are the exponent and seven digits: what lies in a bin differs by less than a
    hundredth, from the least number to the largest.
    """
    size = jnp.abs(x.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    return jax.lax.shift_right_logical(bits, _DROPPED_BITS)


def upper_edges() -> Float[Array, " bins"]:
    """Of every bin: where the next one starts. Those of infinity and NaN are NaN."""
    bits = (jnp.arange(BINS, dtype=jnp.uint32) + 1) << _DROPPED_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.custom_vjp
def _seen(through, probes, signals):
    del probes, signals
    return through


def _seen_forward(through, probes, signals):
    del probes
    return through, signals


def _seen_backward(signals, cotangent):
    return cotangent, signals, jax.tree.map(jnp.zeros_like, signals)


_seen.defvjp(_seen_forward, _seen_backward)
