"""The steps of inputs, from a calibration to the weights that ask for one."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from ..arrays import AbstractWeight
from ..arrays._input_scale import STATIC, is_static
from ..layers import CompressedConv, MixtureOfRookies, MoE
from ._calibrate import Calibration
from ._places import Place
from ._rules import Rule


# They write their matrices out, and round no inputs.
_WRITTEN_OUT = (CompressedConv, eqx.nn.Conv, eqx.nn.ConvTranspose)
_EXPERTS = (MoE, MixtureOfRookies)


def check_calibration(
    function: str, calibration: Calibration | None, rules: Sequence[Rule]
) -> None:
    """Raise `ValueError` for a calibration that is none, or that no rule asks for."""
    if calibration is None:
        return
    if not isinstance(calibration, Calibration):
        raise ValueError(
            f"{function}: `calibration` must be what `calibrate` returns, got "
            f"{calibration!r}."
        )
    if isinstance(rules, Rule):
        return  # which is refused as such
    if not any(isinstance(rule, Rule) and is_static(rule.spec) for rule in rules):
        raise ValueError(
            f"{function}: `calibration` is given, but no rule asks for "
            f"activations={STATIC!r}, which alone needs it. Leave it out, or ask for "
            "that."
        )


def input_scale(
    function: str, place: Place, spec: Any, calibration: Calibration | None
) -> Float[Array, "*stack"] | None:
    """The step of eight bits of the inputs of a weight, `None` if none is due.

    **Raises:**

    `ValueError` for a weight whose layer rounds no inputs, and if the calibration is
    missing, has no range for the weight, or one that does not fit: the message names
    the path. A range that is not finite is an error at run time under `jit`.
    """
    if not is_static(spec):
        return None
    asks = f"{function}: the rule for {place.path!r} asks for activations={STATIC!r}"
    if isinstance(place.holder, _WRITTEN_OUT + _EXPERTS):
        layer = type(place.holder).__name__
        raise ValueError(
            f"{asks}, but a {layer} writes its matrices out and rounds no inputs. "
            "Leave `activations` out for it."
        )
    if calibration is None:
        raise ValueError(
            f"{asks}, which needs the range of its inputs. Call `calibrate(model, "
            f"forward, batches, rules)` first and pass {function}(..., "
            "calibration=found)."
        )
    if place.path not in calibration.ranges:
        known = next(iter(calibration.ranges), None)
        found = "none at all" if known is None else f"others, like {known!r}"
        raise ValueError(
            f"{asks}, but `calibration` has no range for it, and {found}. Call "
            "`calibrate` for this model, with these rules."
        )
    largest, tokens = calibration.ranges[place.path], calibration.tokens[place.path]
    stack = _stack(place)
    if largest.shape != stack:
        raise ValueError(
            f"{asks}, a weight with the axes {stack} in front, but `calibration` has "
            f"ranges of shape {largest.shape} for it. Was it made before the model was "
            "stacked, or for another one?"
        )
    step = _checked(
        calibration.steps[place.path],
        tokens > 0,
        f"{asks}, but in the batches of `calibration` no input reached it, or not all "
        "that are stacked. Calibrate with batches that do, or give it another form.",
    )
    return _checked(
        step,
        jnp.isfinite(largest) & (largest >= 0),
        f"{asks}, but the range that `calibration` has for it is not a finite number "
        "from zero on, so that its step would be none. Call `calibrate` again; were "
        "the inputs or the file damaged?",
    )


def _stack(place: Place) -> tuple[int, ...]:
    value = place.value
    assert isinstance(value, AbstractWeight) or eqx.is_array(value)
    return value.shape[:-2]


def _checked(
    value: Array, good: Bool[Array, "*stack"], message: str
) -> Float[Array, "*stack"]:
    good = jnp.all(good)
    if isinstance(good, Tracer):
        return eqx.error_if(value, ~good, message)
    if not good:
        raise ValueError(message)
    return value
