"""How an implementation is chosen, and what is said when none can serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_cases import (
    IMPLEMENTATIONS,
    OPERATIONS,
    ORACLES,
    cast,
    conv_arguments,
    recurrence_arguments,
    rounded,
    scan_arguments,
    ssd_arguments,
)
from support.tolerances import assert_close

from capibara_eqx.kernels import causal_conv, selective_scan, traced_implementations
from capibara_eqx.kernels._dispatch import dispatch


CHOICES = [None, ("xla",), ("reference", "xla"), ["xla", "reference"]]
ARGUMENTS = {
    "selective_scan": scan_arguments((2,), 3, 2, 2),
    "linear_recurrence": recurrence_arguments((2,), 3, 2),
    "ssd": ssd_arguments((2,), 3, 2, 2, 1, 2),
    "causal_conv": conv_arguments((2,), 3, 2, 2, 2),
}


@pytest.mark.parametrize(
    ("operation", "implementation"),
    [(name, choice) for name in OPERATIONS for choice in IMPLEMENTATIONS[name]]
    + [(name, choice) for name in OPERATIONS for choice in CHOICES],
    ids=str,
)
def test_every_way_to_choose_gives_the_result(operation, implementation):
    inputs = cast(ARGUMENTS[operation], "float32")
    results = OPERATIONS[operation](**inputs, implementation=implementation)
    expected = ORACLES[operation](**rounded(inputs))
    for got, want in zip(results, expected, strict=True):
        assert_close(got, want, dtype=np.float32, length=6)


def serve(value):
    return value + 1


def refuse_length(value):
    raise NotImplementedError(f"a sequence of length {value} does not fit")


def refuse_platform(value):
    raise NotImplementedError("needs another platform")


def fail(value):
    raise TypeError("a defect, not a refusal")


BACKENDS = {
    "xla": serve,
    "reference": lambda value: value + 2,
    "small": refuse_length,
    "other": refuse_platform,
    "broken": fail,
}


@pytest.mark.parametrize(
    ("implementation", "want"),
    [
        (None, 11),
        ("xla", 11),
        ("reference", 12),
        (("reference", "xla"), 12),
        (("small", "reference", "xla"), 12),
        (["small", "other", "xla"], 11),
    ],
)
def test_the_first_that_can_runs(implementation, want):
    assert dispatch("operation", BACKENDS, implementation, 10) == want


def test_a_name_alone_never_falls_back():
    with pytest.raises(NotImplementedError, match="length 10 does not fit"):
        dispatch("operation", BACKENDS, "small", 10)


def test_every_reason_is_reported_when_none_can():
    with pytest.raises(ExceptionGroup, match="operation") as caught:
        dispatch("operation", BACKENDS, ("small", "other"), 10)
    group = caught.value
    assert caught.group_contains(NotImplementedError, match="length 10 does not fit")
    assert caught.group_contains(NotImplementedError, match="needs another platform")
    assert len(group.exceptions) == 2
    for name, error in zip(("small", "other"), group.exceptions, strict=True):
        said = " ".join([str(error), *getattr(error, "__notes__", [])])
        assert name in said, "the reason does not say which implementation gave it"


def test_a_defect_in_a_backend_is_not_taken_for_a_refusal():
    with pytest.raises(TypeError, match="a defect"):
        dispatch("operation", BACKENDS, ("broken", "xla"), 10)


def test_a_wrong_value_is_not_taken_for_a_refusal():
    def strict(value):
        raise ValueError("`value` is wrong")

    with pytest.raises(ValueError, match="`value` is wrong"):
        dispatch("operation", {"strict": strict, "xla": serve}, ("strict", "xla"), 10)


def test_a_traced_program_says_what_it_computes_with():
    def run(scan, conv):
        y, _ = jax.jit(lambda scan: selective_scan(**scan, implementation="xla"))(scan)
        filtered = functools.partial(causal_conv, **conv, implementation="reference")
        return jax.lax.map(lambda row: filtered(row)[0], y)

    scan = cast(ARGUMENTS["selective_scan"], "float32")
    conv = cast(conv_arguments((2,), 3, 2, 2, 2, options=()), "float32")
    del conv["x"]
    program = jax.make_jaxpr(run)(scan, conv)
    expected = {("selective_scan", "xla"), ("causal_conv", "reference")}
    assert traced_implementations(program) == expected
    assert traced_implementations(jax.make_jaxpr(jnp.sin)(1.0)) == frozenset()
