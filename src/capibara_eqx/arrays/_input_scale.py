"""The one step of all inputs of a weight, where its form asks for one."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float


STATIC = "static_int8"
# How inputs are rounded, and what a spec says of it in words.
ACTIVATIONS: Mapping[str | None, list[str]] = {
    None: [],
    "int8": ["a8"],
    STATIC: ["a8 static"],
}


def is_static(spec: Any) -> bool:
    """Whether the inputs of such a weight are rounded by one given step."""
    return getattr(spec, "activations", None) == STATIC


def check_input_scale(
    spec: Any, input_scale: Float[Array, "*_"] | None, stack: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless there is a step for every matrix, or none is due."""
    if is_static(spec) != (input_scale is not None):
        given = "none" if input_scale is None else f"one of shape {input_scale.shape}"
        raise ValueError(
            f"`input_scale` must be given for activations={STATIC!r} and for nothing "
            f"else, got {given} for {spec}. `transforms.calibrate` finds it, and "
            "`transforms.quantize(model, rules, calibration=found)` puts it in."
        )
    if input_scale is not None and input_scale.shape != stack:
        raise ValueError(
            f"`input_scale` must have shape {stack}, one step for every matrix of the "
            f"weight, got {input_scale.shape}."
        )
