"""What the kernels say to wrong arguments: a message names the one at fault."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_cases import (
    IMPLEMENTATIONS,
    OPERATIONS,
    cast,
    conv_arguments,
    recurrence_arguments,
    scan_arguments,
    ssd_arguments,
)


pytestmark = pytest.mark.errors


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


def good_arguments():
    return {
        "selective_scan": cast(scan_arguments((2,), 7, 3, 4), "float32"),
        "linear_recurrence": cast(recurrence_arguments((2,), 7, 3), "float32"),
        "ssd": cast(ssd_arguments((2,), 7, 4, 3, 2, 5), "float32"),
        "causal_conv": cast(conv_arguments((2,), 7, 4, 6, 3, groups=2), "float32")
        | {"groups": 2},
    }


# operation, argument, wrong value
WRONG = [
    ("selective_scan", "u", zeros(3)),
    ("selective_scan", "delta", zeros(2, 7, 4)),
    ("selective_scan", "delta", zeros(2, 6, 3)),
    ("selective_scan", "delta", zeros(7, 3)),
    ("selective_scan", "A", zeros(4, 4)),
    ("selective_scan", "A", zeros(3)),
    ("selective_scan", "A", zeros(2, 3, 4)),
    ("selective_scan", "B", zeros(2, 7, 5)),
    ("selective_scan", "B", zeros(3, 7, 4)),
    ("selective_scan", "C", zeros(2, 7, 3)),
    ("selective_scan", "C", zeros(2, 1, 4)),
    ("selective_scan", "D", zeros(4)),
    ("selective_scan", "D", zeros(3, 1)),
    ("selective_scan", "D", zeros()),
    ("selective_scan", "z", zeros(2, 7, 1)),
    ("selective_scan", "delta_bias", zeros(1)),
    ("selective_scan", "initial_state", zeros(2, 4, 3)),
    ("selective_scan", "initial_state", zeros(3, 4)),
    ("selective_scan", "reset", zeros(7, dtype="bool")),
    ("selective_scan", "reset", zeros(2, 8, dtype="bool")),
    ("selective_scan", "reset", zeros(2, 7, dtype="int32")),
    ("selective_scan", "reset", zeros(2, 7)),
    ("ssd", "x", zeros(4, 3)),
    ("ssd", "log_decay", zeros(2, 7, 3)),
    ("ssd", "log_decay", zeros(2, 7, 4, 1)),
    ("ssd", "B", zeros(5)),
    ("ssd", "B", zeros(2, 7, 3, 5)),
    ("ssd", "B", zeros(2, 7, 0, 5)),
    ("ssd", "C", zeros(2, 7, 1, 5)),
    ("ssd", "C", zeros(2, 7, 2, 4)),
    ("ssd", "coefficient", zeros(2, 7)),
    ("ssd", "initial_state", zeros(2, 4, 5, 3)),
    ("ssd", "reset", zeros(2, 7)),
    ("ssd", "reset", zeros(2, 8, dtype="bool")),
    ("ssd", "chunk_size", 0),
    ("ssd", "chunk_size", 2.5),
    ("linear_recurrence", "x", zeros(3)),
    ("linear_recurrence", "a", zeros(2, 7, 1)),
    ("linear_recurrence", "a", zeros(7, 3)),
    ("linear_recurrence", "initial_state", zeros(2, 4)),
    ("linear_recurrence", "initial_state", zeros(3)),
    ("linear_recurrence", "reset", zeros(2, 6, dtype="bool")),
    ("linear_recurrence", "reset", zeros(2, 7, dtype="int32")),
    ("causal_conv", "x", zeros(4)),
    ("causal_conv", "weight", zeros(6, 4, 3)),
    ("causal_conv", "weight", zeros(6, 2)),
    ("causal_conv", "weight", zeros(5, 2, 3)),
    ("causal_conv", "weight", zeros(6, 2, 0)),
    ("causal_conv", "bias", zeros(4)),
    ("causal_conv", "initial_state", zeros(2, 3, 4)),
    ("causal_conv", "initial_state", zeros(2, 2, 2)),
    ("causal_conv", "segment_ids", zeros(7, dtype="int32")),
    ("causal_conv", "segment_ids", zeros(2, 7)),
    ("causal_conv", "groups", 3),
    ("causal_conv", "groups", 0),
    ("causal_conv", "dilation", 0),
    ("causal_conv", "dilation", -1),
]


def describe(value):
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, jax.Array) else None


@pytest.mark.parametrize(("operation", "name", "value"), WRONG, ids=describe)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_wrong_argument_is_named(operation, name, value, jitted):
    arguments = good_arguments()[operation] | {name: value}
    static = {n: v for n, v in arguments.items() if isinstance(v, int)}
    arrays = {n: v for n, v in arguments.items() if n not in static}

    def run(known):
        return OPERATIONS[operation](**known, **static)

    # The name stands in backquotes or at the start of a word, never inside another.
    with pytest.raises(ValueError, match=rf"(?<![\w]){name}(?![\w])"):
        (jax.jit(run) if jitted else run)(arrays)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_integers_are_refused(operation):
    """They were cut off without a word: results have the dtype of the input."""
    arguments = good_arguments()[operation]
    floating = [
        name
        for name, x in arguments.items()
        if isinstance(x, jax.Array | np.ndarray)
        and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert len(floating) >= 3
    for name in floating:
        wrong = arguments | {name: jnp.zeros(arguments[name].shape, "int32")}
        with pytest.raises(ValueError, match=f"`{name}` must be floating point"):
            OPERATIONS[operation](**wrong)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("selective_scan", "u"),
        ("linear_recurrence", "x"),
        ("ssd", "x"),
        ("causal_conv", "x"),
    ],
)
def test_a_sequence_of_length_zero_is_refused(operation, name):
    timed = ("u", "delta", "B", "C", "z", "reset", "a", "x", "segment_ids")
    timed += ("log_decay", "coefficient")
    arguments = {
        n: v[:, :0] if n in timed else v for n, v in good_arguments()[operation].items()
    }
    with pytest.raises(ValueError, match=rf"(?<![\w]){name}(?![\w])"):
        OPERATIONS[operation](**arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_implementation_is_answered_with_the_nearest(operation):
    arguments = good_arguments()[operation]
    with pytest.raises(ValueError, match="implementation") as caught:
        OPERATIONS[operation](**arguments, implementation="referense")
    message = str(caught.value)
    assert operation in message
    assert "'referense'" in message
    for name in IMPLEMENTATIONS[operation]:
        assert name in message
    # Named once in the list and once more as the nearest.
    assert message.count("reference") == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_name_inside_a_sequence_is_refused_even_if_another_could_run(
    operation,
):
    arguments = good_arguments()[operation]
    with pytest.raises(ValueError, match="'triton'"):
        OPERATIONS[operation](**arguments, implementation=("xla", "triton"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_implementation_at_all_is_refused(operation):
    with pytest.raises(ValueError, match="implementation"):
        OPERATIONS[operation](**good_arguments()[operation], implementation=())
