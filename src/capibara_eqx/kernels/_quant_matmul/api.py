import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from ...internal import check_choice, check_shape, check_size
from .._dispatch import dispatch
from . import fused, reference, xla
from ._codes import check_bits, packed_size
from ._decode import Packing
from ._operands import Operands
from ._product import product


BACKENDS = {
    **{name: fused.implementation(name) for name in fused.NAMES},
    "xla": xla.quant_matmul,
    "reference": reference.quant_matmul,
}
_DEFAULT = {"fused": fused.implementation(None), "xla": xla.quant_matmul}
ACTIVATIONS = (None, "int8", "static_int8")
# The longest sum of products of eight bits by eight that 32 bits hold for certain.
_LONGEST = 2**31 // (127 * 255)


def quant_matmul(
    x: Float[Array, "*batch in"],
    codes: UInt8[Array, "out bytes"],
    scale: Float[Array, "rows groups"],
    zero: UInt8[Array, "rows groups"] | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    activations: str | None = None,
    input_scale: Float[Array, ""] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "*batch out"]:
    r"""A product with a matrix that is kept as packed codes.

    $$y = x\, \hat W^T, \quad \hat W_{oi} = s_{og}\, (c_{oi} - z_{og}), \quad
    g = \lfloor i / \mathrm{group\_size} \rfloor$$

    With `activations="int8"` every token is rounded to eight bits first,
    $\hat x = \mathrm{round}(x / \sigma)\,\sigma$ with $\sigma = \max|x| / 127$, and
    products are summed as whole numbers of 32 bits. Jacob et al., *Quantization and
    Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, arXiv
    1712.05877; ternary matrices (`bits=2`, codes 1 to 3) with such tokens are those of
    Ma et al., *The Era of 1-bit LLMs*, arXiv 2402.17764. With `"static_int8"` one given
    step $\sigma$ serves all tokens, and what lies beyond is clipped,
    $\hat x = \mathrm{clip}(\mathrm{round}(x / \sigma), -127, 127)\,\sigma$: no token
    has to be read before it is rounded. A token with a NaN becomes NaN.

    Differentiable any number of times, forward and reverse, in `x` and `scale`; through
    the rounding of tokens as if it were not there, but not in inputs that are clipped,
    nor in `input_scale`. Works under `jit`, `vmap`, `scan` and `checkpoint`.

    **Arguments:**

    - `x`: `(*batch, in)`.
    - `codes`: as packed by `pack_codes`, `(out, packed_size(in, bits))`.
    - `scale`: the step of every group, `(rows, groups)` with `rows` either `out` or 1,
        which serves all rows.
    - `zero`: the code that stands for zero, like `scale`; $2^{b-1}$ if not given.
    - `bits`: of a code, 2 to 8.
    - `group_size`: neighbours along `in` that share a scale; all of them if not given.
        The last group may be shorter.
    - `activations`: `None`, `"int8"` or `"static_int8"`.
    - `input_scale`: $\sigma$ of `"static_int8"`, `()`, positive.
    - `implementation`: `"cpu"` (C++, for `activations` of eight bits on a processor
        with AVX-512 VNNI), `"pallas_tpu"` and `"pallas_gpu"`, all three for codes of 2,
        4 and 8 bits, `"xla"`, `"reference"`, or a sequence of names of which the first
        that can is used; by default the fused kernel of the platform, and XLA where
        there is none or it cannot.

    **Returns:**

    `(*batch, out)`, in the dtype of `x`. Sums are carried in float32 or wider.

    **Raises:**

    `ValueError` naming the argument that does not fit, or an unknown implementation.
    `NotImplementedError` with the reason if the implementation that was named cannot
    serve.

    !!! example

        ```python
        ternary = jnp.array([[1, 2, 3, 3], [2, 1, 1, 3]], jnp.uint8)  # -1, 0 and 1
        scale = jnp.full((1, 1), 0.8)
        y = quant_matmul(jnp.ones((5, 4)), pack_codes(ternary, 2), scale, bits=2)
        ```
    """
    packing = _packing(x, codes, bits, group_size)
    rows = scale.shape[0] if scale.ndim == 2 else 0
    if rows not in (1, codes.shape[0]) or scale.shape != (rows, packing.groups):
        raise ValueError(
            f"quant_matmul: `scale` must have shape ({codes.shape[0]} or 1, "
            f"{packing.groups}), a row for every row of the matrix or one for all and "
            f"a column a group, got {scale.shape}."
        )
    check_shape("quant_matmul", "zero", zero, scale.shape, "the shape of `scale`")
    check_choice("activations", activations, ACTIVATIONS)
    if activations is not None and packing.size > _LONGEST:
        raise ValueError(
            f"quant_matmul: sums of {packing.size} products of eight bits may not fit "
            f"in 32; `activations={activations!r}` takes up to {_LONGEST} inputs. "
            "Leave it out."
        )
    _check_input_scale(activations, input_scale)
    tokens = math.prod(x.shape[:-1])
    shape = (*x.shape[:-1], codes.shape[0])
    if tokens == 0:
        return jnp.zeros(shape, x.dtype)
    step = None if input_scale is None else jax.lax.stop_gradient(input_scale)
    operands = Operands(x.reshape(tokens, packing.size), codes, scale, None, step)

    def run(whole, packing, activations):
        arguments = (whole, packing, activations)
        return dispatch(
            "quant_matmul", BACKENDS, implementation, *arguments, default=_DEFAULT
        )

    y = product(operands, zero, run, packing, activations)
    return y.reshape(shape).astype(x.dtype)


def _check_input_scale(activations, input_scale) -> None:
    if (activations == "static_int8") != (input_scale is not None):
        given = "none" if input_scale is None else f"shape {input_scale.shape}"
        raise ValueError(
            "quant_matmul: `input_scale` must be given for activations='static_int8' "
            f"and for nothing else, got {given} with activations={activations!r}. "
            "With 'int8' every token has a step of its own."
        )
    check_shape("quant_matmul", "input_scale", input_scale, (), "one step for all")


def _packing(x, codes, bits, group_size) -> Packing:
    check_bits(bits, least=2)
    if group_size is not None:
        check_size("group_size", group_size)
    if x.ndim == 0 or codes.ndim != 2:
        raise ValueError(
            "quant_matmul: `x` must have shape (*batch, in) and `codes` (out, bytes), "
            f"got {x.shape} and {codes.shape}."
        )
    expected = packed_size(x.shape[-1], bits)
    if codes.shape[-1] != expected:
        raise ValueError(
            f"quant_matmul: `codes` must have {expected} bytes a row for the "
            f"{x.shape[-1]} inputs of `x` at {bits} bits each, got {codes.shape}. "
            "Do `bits` and the width of `x` fit the packed matrix?"
        )
    return Packing(bits, x.shape[-1], group_size)
