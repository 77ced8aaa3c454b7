from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from ._affine import Affine
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
