"""From numbers to affine codes: steps, zero points, rounding, derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, UInt8

from ..internal import (
    accumulate,
    check_choice,
    check_flag,
    check_range,
    check_size,
)
from ..kernels import Packing, spread_groups
from ._input_scale import ACTIVATIONS
from ._weight import straight_through


_SHRINKS = 80  # ranges that calibration by squared error tries
_NARROWEST = 0.2
_REACH = 0.51  # steps beyond the last code that have its gradient
_SCALE_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Affine:
    r"""Whole numbers of a few bits times a step, for `transforms.quantize`.

    $$c = \mathrm{clip}(\mathrm{round}(w / s) + z), \quad \hat w = s\,(c - z)$$

    Jacob et al., *Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference*, arXiv 1712.05877. Symmetric codes have their
    zero in the middle. Of a largest value $a$ the step is $a / (2^{b-1} - 1)$ in a
    `"narrow"` range, whose codes are symmetric, so that rounding what was rounded
    changes nothing; in a `"full"` one it is $a / (2^{b-1} - 1/2)$, whose steps are
    finer, which matters with few bits. Without symmetry the step is $(\max - \min) /
    (2^b - 1)$, the range widened to hold zero, which is a code.

    With `learned_step`, `transforms.prepare_qat` makes the step a parameter: Esser et
    al., *Learned Step Size Quantization*, arXiv 1902.08153.

    **Arguments:**

    - `bits`: of a code, 2 to 8.
    - `symmetric`: whether zero is the middle code, else every group has a zero point.
    - `granularity`: `"channel"`, a step for each output, or `"tensor"`, one for all.
    - `group_size`: neighbours along the input that share a step, for `"channel"`; all
        of them if not given. Any size fits any width: the last group may be shorter.
    - `range`: `"narrow"` or `"full"` for symmetric codes; narrow above 4 bits if not
        given.
    - `calibration`: the range is that of all values for `"minmax"`, that of a share of
        them for `"percentile"`, the one of least squared error for `"mse"`.
    - `percentile`: that share, in (50, 100]; without symmetry the rest is left out at
        each end.
    - `learned_step`: whether training with fake codes learns the step.
    - `gradient`: of rounding: `"clipped"`, 1 inside the range and 0 outside, or
        `"identity"`.
    - `activations`: `"int8"` rounds inputs to eight bits, each token by a step of its
        own; `"static_int8"` by one step for all, which `transforms.calibrate` finds.
    - `scale_dtype`: of the steps; float32, or float64 for such weights, if not given.

    **Raises:**

    `ValueError` for an argument outside of what is listed, or two that do not fit.

    !!! example

        ```python
        Affine(4, group_size=64)
        Affine(8, activations="int8")                  # integer products
        Affine(3, symmetric=False, calibration="mse")
        ```
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"
    group_size: int | None = None
    range: str | None = None
    calibration: str = "minmax"
    percentile: float = 99.9
    learned_step: bool = False
    gradient: str = "clipped"
    activations: str | None = None
    scale_dtype: DTypeLike | None = None

    def __post_init__(self):
        _check(self)
        object.__setattr__(self, "scale_dtype", known_dtype(self.scale_dtype))

    def __str__(self) -> str:
        words = [f"int{self.bits}"]
        words += [f"g{self.group_size}"] if self.group_size else []
        words += ["tensor"] if self.granularity == "tensor" else []
        words += [] if self.symmetric else ["asymmetric"]
        words += ACTIVATIONS[self.activations]
        return " ".join(words)

    @property
    def is_narrow(self) -> bool:
        """Whether the lowest code stays unused."""
        return self.range == "narrow" or (self.range is None and self.bits > 4)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code, counted from zero or from the middle."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (1 - half if self.is_narrow else -half), half - 1

    def packing(self, size: int) -> Packing:
        """How rows of `size` codes are read."""
        return Packing(self.bits, size, self.group_size)


def affine_steps(
    weight: Float[Array, "*stack out in"], spec: Affine
) -> tuple[
    Float[Array, "*stack rows groups"], UInt8[Array, "*stack rows groups"] | None
]:
    """Step and zero point of every group; no zero point for symmetric codes."""
    grouped = _grouped(accumulate(weight), spec)
    low, high = _range(grouped, spec)
    if spec.calibration == "mse":
        low, high = _best_range(grouped, low, high, spec)
    return _from_range(low, high, grouped.dtype, spec)


def affine_codes(
    weight: Float[Array, "*stack out in"],
    scale: Float[Array, "*stack rows groups"],
    zero: UInt8[Array, "*stack rows groups"] | None,
    spec: Affine,
) -> UInt8[Array, "*stack out in"]:
    """The nearest codes, halves to even."""
    wide = accumulate(weight)
    packing = spec.packing(weight.shape[-1])
    steps = jnp.round(wide * spread_inverse(scale, wide, packing))
    origin = jnp.full((), packing.middle, wide.dtype)
    if zero is not None:
        origin = spread_groups(zero.astype(wide.dtype), wide.shape, packing)
    low, high = spec.limits
    if zero is not None:
        codes = jnp.clip(steps + origin, low, high)
    else:
        codes = jnp.clip(steps, low, high) + jnp.broadcast_to(origin, steps.shape)
    return codes.astype(jnp.uint8)


def fake_affine(
    weight: Float[Array, "*stack out in"],
    step: Float[Array, "*stack rows groups"] | None,
    spec: Affine,
) -> Float[Array, "*stack out in"]:
    """What the codes of `weight` stand for, with derivatives as if by no rounding.

    With a learned `step` also those of the step.
    """
    wide = accumulate(weight)
    packing = spec.packing(weight.shape[-1])
    scale, zero = affine_steps(jax.lax.stop_gradient(wide), spec)
    if step is not None:
        scale = learned_scale(step, weight, spec.limits[1], packing)
        return fake_steps(wide, scale, spec.limits, packing)
    codes = affine_codes(jax.lax.stop_gradient(wide), scale, zero, spec)
    origin = jnp.full(wide.shape, packing.middle, wide.dtype)
    if zero is not None:
        origin = spread_groups(zero.astype(wide.dtype), wide.shape, packing)
    spread = spread_groups(scale.astype(wide.dtype), wide.shape, packing)
    value = (codes.astype(wide.dtype) - origin) * spread
    # Of all values the range leaves none outside, though the largest may round to a
    # code beyond the last: the ends of a full range lie half a step from it.
    if spec.gradient == "identity" or spec.calibration == "minmax":
        return straight_through(value, wide)
    low, high = spec.limits
    least = low - origin if zero is not None else jnp.full_like(origin, low)
    most = high - origin if zero is not None else jnp.full_like(origin, high)
    # Half a step beyond the last code still rounds to it; a little more, for the ends
    # of a full range again.
    steps = jax.lax.stop_gradient(wide) * spread_inverse(scale, wide, packing)
    inside = (steps >= least - _REACH) & (steps <= most + _REACH)
    return straight_through(value, jnp.where(inside, wide, value))


def learned_scale(
    step: Float[Array, "*stack rows groups"],
    weight: Float[Array, "*stack out in"],
    highest: int,
    packing: Packing,
) -> Float[Array, "*stack rows groups"]:
    r"""The step, its gradient scaled by $1 / \sqrt{N Q}$ as in the paper.

    $N$ is how many values share it and $Q$ the highest code.
    """
    step = positive_step(step)
    rows = weight.shape[-2] // step.shape[-2]
    width = packing.group_size or packing.size
    counts = [min(width, packing.size - width * i) for i in range(packing.groups)]
    factors = [(rows * count * highest) ** -0.5 for count in counts]
    factor = jnp.broadcast_to(jnp.array(factors, step.dtype), step.shape)
    return straight_through(step, step * factor)


def positive_step(step: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A learned step as it is used: training may take it below zero."""
    return jnp.maximum(jnp.abs(step), jnp.finfo(step.dtype).tiny)


def fake_steps(
    wide: Float[Array, "*stack out in"],
    scale: Float[Array, "*stack rows groups"],
    limits: tuple[int, int],
    packing: Packing,
) -> Float[Array, "*stack out in"]:
    """Rounded to steps between `limits`, differentiable in the step too."""
    spread = spread_groups(scale.astype(wide.dtype), wide.shape, packing)
    steps = wide * spread_inverse(scale, wide, packing)
    low, high = limits
    # At a limit as beyond it, as in the paper; `clip` would take half of each side.
    inside = (steps > low) & (steps < high)
    clipped = jnp.where(
        inside, steps, jnp.clip(jax.lax.stop_gradient(steps), low, high)
    )
    return straight_through(jnp.round(clipped), clipped) * spread


def spread_inverse(
    scale: Float[Array, "*stack rows groups"],
    wide: Float[Array, "*stack out in"],
    packing: Packing,
) -> Float[Array, "*stack out in"]:
    """1 / step for every value.

    XLA makes a product with the inverse of every division by what is spread. Then the
    rounding of ties, such as the ends of a full range, would depend on what is compiled
    together, and a weight in training would have other codes than the converted one.
    """
    return spread_groups(1 / scale.astype(wide.dtype), wide.shape, packing)


def packing_of_tensor(shape: tuple[int, ...]) -> Packing:
    """Of codes that share one step over a whole matrix, for `learned_scale`."""
    return Packing(8, shape[-1])


def _grouped(wide, spec):
    """`(*stack, rows, groups, values)`; what fills the last group up is NaN."""
    *stack, out, size = wide.shape
    if spec.granularity == "tensor":
        return wide.reshape(*stack, 1, 1, out * size)
    packing = spec.packing(size)
    width = packing.group_size or size
    missing = packing.groups * width - size
    if missing:
        padding = [(0, 0)] * (wide.ndim - 1) + [(0, missing)]
        wide = jnp.pad(wide, padding, constant_values=jnp.nan)
    return wide.reshape(*stack, out, packing.groups, width)


def _range(grouped, spec):
    """Low and high end of what codes must reach, `(*stack, rows, groups)`."""
    if spec.calibration == "percentile":
        share = spec.percentile / 100
        if spec.symmetric:
            high = jnp.nanquantile(jnp.abs(grouped), share, axis=-1)
            return -high, high
        ends = jnp.nanquantile(grouped, jnp.array([1 - share, share]), axis=-1)
        return jnp.minimum(ends[0], 0), jnp.maximum(ends[1], 0)
    if spec.symmetric:
        high = jnp.nanmax(jnp.abs(grouped), axis=-1)
        return -high, high
    low = jnp.minimum(jnp.nanmin(grouped, axis=-1), 0)
    return low, jnp.maximum(jnp.nanmax(grouped, axis=-1), 0)


def _from_range(low, high, dtype, spec):
    """Step and zero point for a range."""
    count = 2**spec.bits - 1
    if not spec.symmetric:
        # Half of each, since their difference may be too large a number. Halves are
        # exact, so that compiled or not the step is the same to the bit.
        width = high / 2 - low / 2
        scale = _stored_step(_quotient(width, count / 2), high > low, dtype, spec)
        # Where zero lies in the range: no multiple of the range moves it, also where it
        # lies between two codes. As steps of a rounded size it would be either's.
        share = -low / 2 / jnp.where(width > 0, width, 1)
        zero = jnp.clip(jnp.round(count * share), 0, count)
        return scale, zero.astype(jnp.uint8)
    half = 2 ** (spec.bits - 1)
    step = _quotient(high, half - 1 if spec.is_narrow else half - 0.5)
    return _stored_step(step, high > 0, dtype, spec), None


def _quotient(positive, number):
    """The division itself: of one by a constant older XLA makes a product, if compiled.

    Then a step would not be the same to the bit, and a weight on its codes would move.
    """
    return positive / jnp.where(positive > 0, number, 1).astype(positive.dtype)


def _stored_step(step, some, dtype, spec):
    """In the dtype that keeps it, within its range; 1 where all values are zero."""
    stored = jnp.dtype(spec.scale_dtype or dtype)
    limits = [jnp.finfo(stored), jnp.finfo(dtype)]
    least = max(float(limit.tiny) for limit in limits)
    # Not so large that its inverse is subnormal, which is zero.
    most = min(float(limits[0].max), float(limits[1].max) / 8)
    step = jnp.clip(step, least, most)
    return jnp.where(some, step, 1).astype(stored)


def _best_range(grouped, low, high, spec):
    """The share of the range whose codes have the least squared error."""
    values = jnp.where(jnp.isnan(grouped), 0, grouped)

    def error(share):
        scale, zero = _from_range(low * share, high * share, grouped.dtype, spec)
        step = scale.astype(grouped.dtype)[..., None]
        steps = jnp.round(values * jnp.broadcast_to(1 / step, values.shape))
        least, most = spec.limits
        if zero is not None:
            origin = zero.astype(grouped.dtype)[..., None]
            steps = jnp.clip(steps, least - origin, most - origin)
        else:
            steps = jnp.clip(steps, least, most)
        return jnp.sum(jnp.square(steps * step - values), axis=-1)

    shares = jnp.linspace(1, _NARROWEST, _SHRINKS, dtype=grouped.dtype)
    # One after the other: all at once would hold as many copies of the weight.
    errors = jax.lax.map(error, shares)
    best = shares[jnp.argmin(errors, axis=0)]
    return low * best, high * best


def _check(spec: Affine) -> None:
    if isinstance(spec.bits, bool) or not isinstance(spec.bits, int):
        raise ValueError(f"`bits` must be an integer, got {spec.bits!r}.")
    hint = "Ternary() has three values, about 1.58 bits." if spec.bits < 2 else ""
    check_range("bits", spec.bits, least=2, most=8, hint=hint)
    check_flag("symmetric", spec.symmetric)
    check_flag("learned_step", spec.learned_step)
    check_choice("granularity", spec.granularity, ("channel", "tensor"))
    check_choice("range", spec.range, (None, "narrow", "full"))
    check_choice("calibration", spec.calibration, ("minmax", "percentile", "mse"))
    check_choice("gradient", spec.gradient, ("clipped", "identity"))
    check_choice("activations", spec.activations, ACTIVATIONS)
    check_range("percentile", spec.percentile, above=50, most=100)
    if spec.group_size is not None:
        check_size("group_size", spec.group_size)
        if spec.granularity == "tensor":
            raise ValueError(
                f"`group_size` is for granularity='channel', got {spec.group_size} "
                "with granularity='tensor'. Leave one of the two out."
            )
    if not spec.symmetric and spec.range is not None:
        raise ValueError(
            f"`range` is for symmetric codes, got {spec.range!r} with symmetric=False, "
            "which use every code. Leave it out."
        )
    if not spec.symmetric and spec.learned_step:
        raise ValueError(
            "`learned_step` is for symmetric codes; got symmetric=False. Leave one of "
            "the two out."
        )


def known_dtype(dtype: DTypeLike | None) -> jnp.dtype | None:
    """In one spelling, so that equal specs compare equal."""
    if dtype is None:
        return None
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = dtype
    if known not in [jnp.dtype(name) for name in _SCALE_DTYPES]:
        raise ValueError(
            f"`scale_dtype` must be one of {', '.join(_SCALE_DTYPES)} or None, got "
            f"{known}. Codes get their size from `bits`, scales from this."
        )
    return jnp.dtype(known)
