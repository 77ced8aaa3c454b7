"""From numbers to -1, 0 and 1 times a scale."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8

from ..internal import accumulate, check_choice
from ._affine import (
    fake_steps,
    known_dtype,
    learned_scale,
    packing_of_tensor,
    positive_step,
    spread_inverse,
)
from ._input_scale import ACTIVATIONS
from ._weight import straight_through


@dataclasses.dataclass(frozen=True)
class Ternary:
    r"""-1, 0 and 1 times one scale a matrix, for `transforms.quantize`.

    $$T = \mathrm{clip}(\mathrm{round}(W / \gamma), -1, 1), \quad
    \gamma = \mathrm{mean}|W|, \quad \hat W = s\,T$$

    Ma et al., *The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits*,
    arXiv 2402.17764, where $s = \gamma$ (`"absmean"`). The same codes with $s =
    \mathrm{mean}|W| / \mathrm{mean}|T|$ (`"seed"`) or $s = \langle W, T\rangle /
    \langle T, T\rangle$ (`"l2"`, the least squared error for these codes) come nearer
    to $W$ and stay what they are when rounded again; `"learned"` starts from $\gamma$
    and is a parameter under `transforms.prepare_qat`, with the derivatives of Esser et
    al., *Learned Step Size Quantization*, arXiv 1902.08153.

    **Arguments:**

    - `scale`: `"absmean"`, `"seed"`, `"l2"` or `"learned"`.
    - `activations`: `"int8"` rounds inputs to eight bits, each token by a step of its
        own; `"static_int8"` by one step for all, which `transforms.calibrate` finds.
    - `packing`: `"2bit"`, or `"base3"`, 1.6 bits a weight, which is slower to read:
        for files.
    - `scale_dtype`: of the scale; float32, or float64 for such weights, if not given.

    **Raises:**

    `ValueError` for an argument outside of what is listed.

    !!! example

        ```python
        Ternary(activations="int8")                    # BitNet b1.58
        ```
    """

    scale: str = "absmean"
    activations: str | None = None
    packing: str = "2bit"
    scale_dtype: DTypeLike | None = None

    def __post_init__(self):
        check_choice("scale", self.scale, ("absmean", "seed", "l2", "learned"))
        check_choice("activations", self.activations, ACTIVATIONS)
        check_choice("packing", self.packing, ("2bit", "base3"))
        object.__setattr__(self, "scale_dtype", known_dtype(self.scale_dtype))

    @property
    def learned_step(self) -> bool:
        """Whether training with fake codes learns the scale."""
        return self.scale == "learned"

    def __str__(self) -> str:
        words = ["ternary"]
        words += [self.packing] if self.packing != "2bit" else []
        words += [self.scale] if self.scale != "absmean" else []
        words += ACTIVATIONS[self.activations]
        return " ".join(words)


def ternary_codes(
    weight: Float[Array, "*stack out in"],
    spec: Ternary,
    step: Float[Array, "*stack 1 1"] | None = None,
) -> tuple[Int8[Array, "*stack out in"], Float[Array, "*stack 1 1"]]:
    """Codes -1, 0 and 1, and what they are multiplied by."""
    wide = accumulate(weight)
    stored = jnp.dtype(spec.scale_dtype or wide.dtype)
    gamma = mean_size(wide) if step is None else positive_step(step).astype(wide.dtype)
    packing = packing_of_tensor(weight.shape)
    codes = jnp.clip(jnp.round(wide * spread_inverse(gamma, wide, packing)), -1, 1)
    scale = gamma
    if spec.scale in ("seed", "l2"):
        count = jnp.sum(jnp.abs(codes), axis=(-2, -1), keepdims=True)
        measured = jnp.abs(wide) if spec.scale == "seed" else wide * codes
        total = jnp.sum(measured, axis=(-2, -1), keepdims=True)
        scale = jnp.where(count > 0, total / jnp.maximum(count, 1), gamma)
    return codes.astype(jnp.int8), scale.astype(stored)


def fake_ternary(
    weight: Float[Array, "*stack out in"],
    step: Float[Array, "*stack 1 1"] | None,
    spec: Ternary,
) -> Float[Array, "*stack out in"]:
    """What the codes of `weight` stand for, with derivatives as if by no rounding.

    With a learned `step` also those of the step.
    """
    wide = accumulate(weight)
    if step is not None:
        packing = packing_of_tensor(weight.shape)
        scale = learned_scale(step, weight, 1, packing)
        return fake_steps(wide, scale, (-1, 1), packing)
    codes, scale = ternary_codes(jax.lax.stop_gradient(wide), spec)
    scale = jnp.broadcast_to(scale.astype(wide.dtype), wide.shape)
    return straight_through(codes.astype(wide.dtype) * scale, wide)


def mean_size(wide: Float[Array, "*stack out in"]) -> Float[Array, "*stack 1 1"]:
    """The mean absolute value of a matrix; 1 for one of zeros."""
    mean = jnp.mean(jnp.abs(wide), axis=(-2, -1), keepdims=True)
    return jnp.where(mean >= jnp.finfo(mean.dtype).tiny, mean, 1)
