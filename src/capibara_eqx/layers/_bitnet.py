import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8, PRNGKeyArray

from ..arrays import (
    AbstractWeight,
    Affine,
    AffineArray,
    FakeQuantArray,
    Ternary,
    TernaryArray,
    apply_weight,
    as_array,
    compress,
)
from ..internal import accumulate, check_flag, check_last_axis, check_range, check_size
from ..kernels import unpack_codes
from ._compress_array import compress_array, finite
from ._norm import RMSNorm


class BitNet158(eqx.Module):
    r"""A linear map with weights of -1, 0 and 1 behind a norm of its own.

    $$y = \hat W\,\hat x, \quad \hat W = \gamma\,\mathrm{clip}(\mathrm{round}(W /
    \gamma), -1, 1), \quad \gamma = \mathrm{mean}|W|$$

    where $\hat x$ is $\mathrm{RMSNorm}(x)$ rounded to eight bits, token by token. Ma et
    al., *The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits*, arXiv
    2402.17764. In training the layer keeps float weights, and derivatives pass through
    both roundings as if they were not there; `quantize`, or `transforms.convert` for a
    whole model, packs them, 2 bits each.

    A layer whose weights were trained without rounding takes it better by and by:
    with `warmup` $\lambda$ it computes with $W + \lambda(\hat W - W)$ and the same of
    the input, 0 being no rounding and 1 all of it. A schedule sets it inside the step,
    as in the example; it is no parameter.

    !!! example

        ```python
        layer = BitNet158(64, 32, key=key)
        y = layer(x)                                   # (*batch, 32)
        layer.get_weights()                            # -1, 0 and 1
        half = eqx.tree_at(lambda m: m.warmup, layer, jnp.asarray(0.5))
        small = layer.quantize()
        small.weight.nbytes                            # 32 * 64 / 4, and a scale
        ```
    """

    norm: RMSNorm
    weight: Float[Array, "{self.out_features} {self.in_features}"] | AbstractWeight
    # Not static, so that a schedule can change it under `jit`.
    warmup: float | Float[Array, ""]
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    spec: Ternary | Affine = eqx.field(static=True)

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"warmup"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_quantization: bool = True,
        quantization_bits: int | float = 1.58,
        scale: str = "absmean",
        warmup: int | float = 1.0,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `in_features`, `out_features`: sizes of the last axis before and after.
        - `use_quantization`: whether to round; otherwise a plain map behind a norm.
        - `quantization_bits`: 1.58 for three values, or 2 to 8 for `Affine` codes, with
            a step for each output.
        - `scale`: of three values, see `Ternary`: `"absmean"`, `"seed"`, `"l2"`, or
            `"learned"`.
        - `warmup`: the share of rounding, in [0, 1].
        - `eps`: of the norm.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, uniform in $\pm 1/\sqrt{\mathrm{in}}$.

        **Raises:**

        `ValueError` for an argument outside of what is listed, or two that do not fit.
        """
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_flag("use_quantization", use_quantization)
        check_range("warmup", warmup, least=0, most=1)
        self.spec = _spec(quantization_bits, scale)
        self.norm = RMSNorm(in_features, eps, dtype=dtype)
        dtype = jnp.float32 if dtype is None else dtype
        limit = 1 / math.sqrt(in_features)
        shape = (out_features, in_features)
        weight = jax.random.uniform(key, shape, dtype, -limit, limit)
        self.weight = (
            FakeQuantArray.of(weight, self.spec) if use_quantization else weight
        )
        self.warmup = float(warmup)
        self.in_features = in_features
        self.out_features = out_features

    @jax.named_scope("capibara_eqx.layers.BitNet158")
    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        """**Arguments:**

        - `x`: `(*batch, in_features)`.
        - `key`: ignored.

        **Returns:**

        `(*batch, out_features)`, in the dtype of `x`.

        **Raises:**

        `ValueError` if the last axis of `x` is not `in_features` long.
        """
        del key
        check_last_axis("BitNet158", "x", x, self.in_features)
        y = self.norm(x)
        whole = isinstance(self.warmup, int | float) and self.warmup == 1
        if isinstance(self.weight, FakeQuantArray) and not whole:
            return _warming(self.weight, self.warmup, y)
        return apply_weight(self.weight, y)

    def get_weights(self) -> Int8[Array, "*stack out in"]:
        """The codes of the weights, counted from zero.

        **Returns:**

        -1, 0 and 1, `(out_features, in_features)`; with more bits whole numbers around
        zero. The weights are so many scales.

        **Raises:**

        `ValueError` if the weights have no such codes.
        """
        node = self.weight
        if isinstance(node, FakeQuantArray):
            node = compress(node, node.spec)
        if isinstance(node, TernaryArray):
            return node.ternary
        if isinstance(node, AffineArray) and node.zero is None:
            packing = node.spec.packing(node.in_features)
            codes = unpack_codes(node.codes, packing.bits, packing.size)
            return (codes.astype(jnp.int16) - packing.middle).astype(jnp.int8)
        raise ValueError(
            "BitNet158.get_weights: the weights are kept as "
            f"{type(node).__name__}, which has no codes around zero. Read "
            "`layer.weight`, or call `layer.quantize()` first."
        )

    def quantize(
        self, weights: Float[Array, "*stack out in"] | AbstractWeight | None = None
    ) -> "BitNet158":
        """The layer with packed weights, for use after training.

        What it computes is what the layer computes in training with a `warmup` of 1,
        but for the rounding of float32. A layer that has packed weights stays as it is.

        **Arguments:**

        - `weights`: others to take in the place of its own, an array or a node that
            stands for one, of the same shape.

        **Returns:**

        The layer, its `weight` a `TernaryArray`, or an `AffineArray` for more bits.

        **Raises:**

        `ValueError` for weights of another shape or that are not finite.
        """
        node = self.weight if weights is None else as_array(weights)
        if node.shape != self.weight.shape:
            raise ValueError(
                f"BitNet158.quantize: `weights` must have shape {self.weight.shape}, "
                f"got {node.shape}. Are they those of a layer of this size, "
                "(out_features, in_features)?"
            )
        name = "BitNet158.quantize"
        if isinstance(node, FakeQuantArray):
            checked = finite(name, node.weight)
            node = eqx.tree_at(lambda node: node.weight, node, checked)
            packed = compress(node, node.spec)
        elif isinstance(node, AbstractWeight):
            return self
        else:
            packed = compress_array(name, node, self.spec)
        return eqx.tree_at(lambda layer: layer.weight, self, packed)


def _spec(bits: int | float, scale: str) -> Ternary | Affine:
    if bits == 1.58:
        return Ternary(scale, activations="int8")
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(
            "`quantization_bits` must be 1.58, for weights of -1, 0 and 1, or a whole "
            f"number from 2 to 8, got {bits!r}."
        )
    if scale != "absmean":
        raise ValueError(
            "`scale` is for the three values of quantization_bits=1.58, got "
            f"{scale!r} with quantization_bits={bits}. Leave one of the two out."
        )
    return Affine(int(bits), activations="int8")


def _warming(
    node: FakeQuantArray, warmup: float | Array, y: Float[Array, "*batch in"]
) -> Float[Array, "*batch out"]:
    """The product of `node` and `y`, only a share of either being rounded."""
    wide = accumulate(y)
    share = jax.lax.stop_gradient(jnp.asarray(warmup, wide.dtype))
    rounded = node.astype(wide.dtype).dense()
    weight = (1 - share) * node.weight.astype(wide.dtype) + share * rounded
    x = (1 - share) * wide + share * node.rounded_inputs(wide)
    return apply_weight(weight, x).astype(y.dtype)
