import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from ._affine import Affine, affine_codes
from ._affine_array import AffineArray
from ._fake_quant_array import FakeQuantArray
from ._nm import NM
from ._sparse_array import SparseArray
from ._ternary import Ternary
from ._ternary_array import TernaryArray


Spec = Affine | Ternary | NM
_NODES: Mapping[type, Any] = {
    Affine: AffineArray,
    Ternary: TernaryArray,
    NM: SparseArray,
}


def compress(
    weight: Float[Array, "*stack out in"] | FakeQuantArray, spec: Spec
) -> AffineArray | TernaryArray | SparseArray:
    """A weight in the form that `spec` describes.

    !!! example

        ```python
        compress(linear.weight, Affine(4, group_size=64)).nbytes
        ```
    """
    if not isinstance(weight, FakeQuantArray):
        return _NODES[type(spec)].compress(weight, spec)
    if weight.step is None:
        return _NODES[type(spec)].compress(weight.weight, spec)
    return _NODES[type(spec)].compress(weight.weight, spec, weight.step)


def recompress(
    weight: Float[Array, "*stack out in"],
    like: AffineArray | TernaryArray | SparseArray | FakeQuantArray,
) -> AffineArray | TernaryArray | SparseArray | FakeQuantArray:
    """Another weight in the form of one that is there, with its steps.

    What is calibrated anew has other steps, so that values which are codes already
    may be rounded again; on the same steps they stay.

    !!! example

        ```python
        small = compress(linear.weight, Affine(4))
        same = recompress(small.dense(), small)
        ```
    """
    if isinstance(like, AffineArray):
        zero = like.zero_points
        codes = affine_codes(weight, like.scale, zero, like.spec)
        return like.from_codes(codes, like.scale, zero, like.spec, like.dtype)
    if isinstance(like, TernaryArray):
        return like.compress(weight.astype(like.dtype), like.spec, like.scale)
    if isinstance(like, FakeQuantArray):
        return dataclasses.replace(like, weight=weight)
    return like.compress(weight.astype(like.dtype), like.spec)
