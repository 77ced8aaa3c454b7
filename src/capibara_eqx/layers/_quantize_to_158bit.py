from jaxtyping import Array, Float

from ..arrays import Ternary, TernaryArray
from ._compress_array import compress_array


def quantize_to_158bit(weights: Float[Array, "*stack in"]) -> TernaryArray:
    r"""Weights as -1, 0 and 1 times a scale, four a byte.

    $$T = \mathrm{sign}(W)\,[\,|W| > \tfrac12 \mathrm{mean}|W|\,], \quad
    \hat W = T\,\frac{\mathrm{mean}|W|}{\mathrm{mean}|T|}$$

    The codes are those of BitNet b1.58 (Ma et al., arXiv 2402.17764), whose scale is
    $\mathrm{mean}|W|$; this one keeps the mean size of the weights and is nearer to
    them: `Ternary(scale="seed")`. A weight of nothing but zeros stays that.

    **Arguments:**

    - `weights`: `(*stack, in)`, of any float dtype. A scale for each matrix of the
        last two axes.

    **Returns:**

    A `TernaryArray` of the same shape: $\hat W$ is its `dense()`, $T$ its `ternary`.

    **Raises:**

    `ValueError` for weights that are not floating point, not finite, empty, or
    compressed already.

    !!! example

        ```python
        small = quantize_to_158bit(jnp.array([[0.9, -0.1], [-1.1, 0.5]]))
        small.ternary, small.scale                     # [[1, 0], [-1, 1]], 0.65 / 0.75
        ```
    """
    node = compress_array("quantize_to_158bit", weights, Ternary(scale="seed"))
    # Of a `Ternary` nothing else comes.
    assert isinstance(node, TernaryArray)
    return node
