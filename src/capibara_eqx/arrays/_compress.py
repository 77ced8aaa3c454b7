import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from ..kernels import pack_codes
from ._affine import Affine, affine_codes
from ._affine_array import AffineArray
from ._fake_quant_array import FakeQuantArray
from ._input_scale import check_input_scale
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
    weight: Float[Array, "*stack out in"] | FakeQuantArray,
    spec: Spec,
    input_scale: Float[Array, "*stack"] | None = None,
) -> AffineArray | TernaryArray | SparseArray:
    """A weight in the form that `spec` describes.

    With `activations="static_int8"` also the step of all its inputs, which one in
    training has already.

    !!! example

        ```python
        compress(linear.weight, Affine(4, group_size=64)).nbytes
        ```
    """
    known = {"input_scale": input_scale}
    if not isinstance(weight, FakeQuantArray):
        check_input_scale(spec, input_scale, weight.shape[:-2])
    else:
        known = {"step": weight.step, "input_scale": weight.input_scale}
        weight = weight.weight
    given = {name: value for name, value in known.items() if value is not None}
    return _NODES[type(spec)].compress(weight, spec, **given)


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
        return dataclasses.replace(like, codes=pack_codes(codes, like.spec.bits))
    if isinstance(like, TernaryArray):
        weight = weight.astype(like.dtype)
        return like.compress(weight, like.spec, like.scale, like.input_scale)
    if isinstance(like, FakeQuantArray):
        return dataclasses.replace(like, weight=weight)
    return like.compress(weight.astype(like.dtype), like.spec)
