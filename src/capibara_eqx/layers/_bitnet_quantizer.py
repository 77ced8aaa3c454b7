import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ..arrays import Affine, FakeQuantArray
from ..internal import check_range


class BitNetQuantizer(eqx.Module):
    r"""Rounds every token to a few bits, in training as at any other time.

    $$\hat x = s\,\mathrm{round}(x / s), \quad s = \max|x| / (2^{b-1} - 1)$$

    over the last axis, so that a token does not see the others: Ma et al., *The Era of
    1-bit LLMs: All Large Language Models are in 1.58 Bits*, arXiv 2402.17764. Without
    symmetry the $2^b$ codes reach from the least to the largest value of a token, with
    zero among them. Derivatives pass as if nothing were rounded (Bengio et al.,
    *Estimating or Propagating Gradients Through Stochastic Neurons*, arXiv 1308.3432).
    Computed in float32 or wider.

    !!! example

        ```python
        y = BitNetQuantizer(4)(x)                      # same shape, 15 values a token
        ```
    """

    spec: Affine = eqx.field(static=True)

    def __init__(self, num_bits: int = 8, symmetric: bool = True):
        """**Arguments:**

        - `num_bits`: of a value, 2 to 8.
        - `symmetric`: whether values are rounded around zero, else between their ends.

        **Raises:**

        `ValueError` for `num_bits` outside of 2 to 8.
        """
        check_range("num_bits", num_bits, least=2, most=8)
        narrow = "narrow" if symmetric else None
        self.spec = Affine(num_bits, symmetric, range=narrow, gradient="identity")

    @jax.named_scope("capibara_eqx.layers.BitNetQuantizer")
    def __call__(
        self, x: Float[Array, "*batch d"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d"]:
        """**Arguments:**

        - `x`: `(*batch, d)`; each token is a row of the last axis.
        - `key`: ignored.

        **Returns:**

        The same shape and dtype.

        **Raises:**

        `ValueError` for an `x` without axes.
        """
        del key
        if x.ndim == 0:
            raise ValueError(
                "BitNetQuantizer: `x` must be (*batch, d), got a number without axes. "
                "Pass the values of a token together."
            )
        # Every token is a matrix of one row, with a step of its own.
        return FakeQuantArray.of(x[..., None, :], self.spec).dense()[..., 0, :]
