"""Random arguments for the kernels, and what their tests share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike
from support import numpy_oracles as oracles
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.kernels import (
    _backends,
    causal_conv,
    linear_recurrence,
    selective_scan,
    ssd,
)
from capibara_eqx.kernels._causal_conv import fused as fused_conv
from capibara_eqx.kernels._ssd import fused as fused_ssd


def fused_kernel() -> str:
    """The fused kernel of the platform that the tests run on."""
    return _backends.PLATFORMS[_backends.platform()]


FUSED = fused_kernel()
# These refuse anything wider.
FLOAT32_ONLY = ("pallas_tpu", "pallas_gpu")
IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {
    "selective_scan": ("reference", "xla", "associative", FUSED),
    "linear_recurrence": ("reference", "xla"),
    "ssd": ("reference", "xla", *{FUSED}.intersection(fused_ssd.NAMES)),
    "causal_conv": ("reference", "xla"),
    # Every channel by itself, which more kernels can.
    "depthwise_conv": ("reference", "xla", *{FUSED}.intersection(fused_conv.NAMES)),
}
# What runs only if it is named: the longer ones of its tests are slow tests.
RARE = ("associative",)
# Cases of a way that only the fused kernel takes; those of the others are slow tests.
FUSED_ONLY = ("selective_scan_rows",)
Arguments = dict[str, np.ndarray]

OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "selective_scan": selective_scan,
    "linear_recurrence": linear_recurrence,
    "ssd": ssd,
    "causal_conv": causal_conv,
}
# What cases may name: an operation, or one in the form that more kernels can.
FUNCTIONS = {**OPERATIONS, "depthwise_conv": causal_conv}
ORACLES: Mapping[str, Callable[..., Any]] = {
    "selective_scan": oracles.selective_scan,
    "linear_recurrence": oracles.linear_recurrence,
    "ssd": oracles.ssd,
    "causal_conv": oracles.causal_conv,
    "depthwise_conv": oracles.causal_conv,
}


def over(
    cases: Mapping[str, Any], *, but: Sequence[str] = (), slow: Sequence[str] = ()
):
    """Parametrise by `case` and `implementation`: every case by all of its operation.

    `cases` are `(operation, ...)` by name; `but` are implementations left out, `slow`
    those of which these are slow tests.
    """
    parameters = [
        pytest.param(
            case,
            implementation,
            id=f"{name}-{implementation}",
            marks=pytest.mark.slow
            if implementation in slow
            or (name in FUSED_ONLY and implementation != FUSED)
            else (),
        )
        for name, case in cases.items()
        for implementation in IMPLEMENTATIONS[case[0]]
        if implementation not in but
    ]
    return pytest.mark.parametrize(("case", "implementation"), parameters)


def each(operation: str, *, slow: Sequence[str] = ()):
    """Parametrise by `implementation`; of those in `slow` these are slow tests."""
    parameters = [
        pytest.param(name, marks=pytest.mark.slow if name in slow else ())
        for name in IMPLEMENTATIONS[operation]
    ]
    return pytest.mark.parametrize("implementation", parameters)


def skip_if_refused(implementation: str, dtype: str) -> None:
    """Skip a test in a dtype that the implementation does not compute in."""
    if dtype == "float64" and implementation in FLOAT32_ONLY:
        pytest.skip(f"{implementation} computes in float32 only")


@functools.cache
def compiled(operation: str, implementation: str | None, **static: Any):
    """The jitted operation; one object a setting, so that cases share compilations."""
    return jax.jit(
        functools.partial(FUNCTIONS[operation], implementation=implementation, **static)
    )


def scan_arguments(
    batch: Sequence[int],
    seq: int,
    d_inner: int,
    d_state: int,
    *,
    options: Sequence[str] = ("D", "z", "delta_bias", "initial_state", "reset"),
    seed: int = 0,
) -> Arguments:
    """Arguments of `selective_scan`; `delta` fits with and without softplus."""
    rng, batch = np.random.default_rng(seed), tuple(batch)
    arguments = {
        "u": rng.standard_normal((*batch, seq, d_inner)),
        "delta": rng.uniform(0.05, 0.8, (*batch, seq, d_inner)),
        "A": -rng.uniform(0.2, 2.0, (d_inner, d_state)),
        "B": rng.standard_normal((*batch, seq, d_state)),
        "C": rng.standard_normal((*batch, seq, d_state)),
        "D": rng.standard_normal((d_inner,)),
        "z": rng.standard_normal((*batch, seq, d_inner)),
        "delta_bias": rng.uniform(0.0, 0.3, (d_inner,)),
        "initial_state": rng.standard_normal((*batch, d_inner, d_state)),
        "reset": rng.random((*batch, seq)) < 0.2,
    }
    always = ("u", "delta", "A", "B", "C")
    return {name: arguments[name] for name in (*always, *options)}


def recurrence_arguments(
    batch: Sequence[int],
    seq: int,
    d: int,
    *,
    options: Sequence[str] = ("initial_state", "reset"),
    is_complex: bool = False,
    seed: int = 0,
) -> Arguments:
    """Arguments of `linear_recurrence`, with |a| < 1."""
    rng, batch = np.random.default_rng(seed), tuple(batch)
    size = rng.uniform(0.3, 0.99, (*batch, seq, d))
    turn = rng.uniform(-np.pi, np.pi, (*batch, seq, d))
    x = rng.standard_normal((2, *batch, seq, d))
    start = rng.standard_normal((2, *batch, d))
    arguments = {
        "a": size * np.exp(1j * turn) if is_complex else size * np.sign(turn),
        "x": x[0] + 1j * x[1] if is_complex else x[0],
        "initial_state": start[0] + 1j * start[1] if is_complex else start[0],
        "reset": rng.random((*batch, seq)) < 0.2,
    }
    return {name: arguments[name] for name in ("a", "x", *options)}


def ssd_arguments(
    batch: Sequence[int],
    seq: int,
    n_heads: int,
    head_dim: int,
    n_groups: int,
    d_state: int,
    *,
    options: Sequence[str] = ("coefficient", "initial_state", "reset"),
    seed: int = 0,
) -> Arguments:
    """Arguments of `ssd`; the coefficient takes both signs."""
    rng, batch = np.random.default_rng(seed), tuple(batch)
    arguments = {
        "x": rng.standard_normal((*batch, seq, n_heads, head_dim)),
        "log_decay": -rng.uniform(0.01, 1.2, (*batch, seq, n_heads)),
        "B": rng.standard_normal((*batch, seq, n_groups, d_state)),
        "C": rng.standard_normal((*batch, seq, n_groups, d_state)),
        "coefficient": rng.standard_normal((*batch, seq, n_heads)),
        "initial_state": rng.standard_normal((*batch, n_heads, head_dim, d_state)),
        "reset": rng.random((*batch, seq)) < 0.2,
    }
    always = ("x", "log_decay", "B", "C")
    return {name: arguments[name] for name in (*always, *options)}


def conv_arguments(
    batch: Sequence[int],
    seq: int,
    c_in: int,
    c_out: int,
    width: int,
    *,
    groups: int = 1,
    dilation: int = 1,
    options: Sequence[str] = ("bias", "initial_state", "segment_ids"),
    seed: int = 0,
) -> Arguments:
    """Arguments of `causal_conv`; about a quarter of the tokens are padding."""
    rng, batch = np.random.default_rng(seed), tuple(batch)
    arguments = {
        "x": rng.standard_normal((*batch, seq, c_in)),
        "weight": rng.standard_normal((c_out, c_in // groups, width)),
        "bias": rng.standard_normal((c_out,)),
        "initial_state": rng.standard_normal((*batch, (width - 1) * dilation, c_in)),
        "segment_ids": random_segment_ids(rng, (*batch, seq)),
    }
    return {name: arguments[name] for name in ("x", "weight", *options)}


def random_segment_ids(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Runs of the ids 0, 1 and 2 in any order, with padding strewn between them."""
    changes = np.cumsum(rng.random(shape) < 0.25, axis=-1)
    ids = (rng.integers(0, 3, shape[:-1])[..., None] + changes) % 3
    return np.where(rng.random(shape) < 0.25, -1 - ids, ids).astype(np.int32)


def cast(arguments: Arguments, dtype: str) -> dict[str, Any]:
    """The arguments as JAX arrays, the real ones in `dtype`, complex ones as wide."""
    cast_arguments = {}
    for name, values in arguments.items():
        if np.issubdtype(values.dtype, np.complexfloating):
            wanted = "complex128" if dtype == "float64" else "complex64"
            cast_arguments[name] = jnp.asarray(values, wanted)
        elif np.issubdtype(values.dtype, np.floating):
            cast_arguments[name] = jnp.asarray(values, dtype)
        else:
            cast_arguments[name] = jnp.asarray(values)
    return cast_arguments


def rounded(arguments: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """What the arguments are worth after rounding, for the oracle."""
    known = {}
    for name, values in arguments.items():
        array = np.asarray(values)
        exact = array.dtype == bool or np.issubdtype(array.dtype, np.integer)
        known[name] = array if exact else oracles.wide(array)
    return known


def smooth_loss(xp: ModuleType, outputs: Sequence[Any]) -> Any:
    """A real number that depends on every output value smoothly and non-linearly."""
    total = 0.0
    for output in outputs:
        weights = xp.asarray(np.cos(1.0 + np.arange(output.size))).reshape(output.shape)
        if xp.iscomplexobj(output):
            real, imaginary = xp.real(output), xp.imag(output)
            values = xp.sin(real) + real * imaginary + xp.cos(imaginary)
        else:
            values = xp.sin(output) + 0.3 * output * output
        total = total + xp.sum(weights * values)
    return total


def loss_pair(operation: str, implementation: str, fixed: Arguments, **static: Any):
    """The same loss on the operation and on its oracle, as functions of a dictionary.

    `fixed` are the arguments that are not differentiated, such as `reset`.
    """

    def function(arrays: Mapping[str, jax.Array]) -> jax.Array:
        known = {name: jnp.asarray(values) for name, values in fixed.items()}
        run = functools.partial(FUNCTIONS[operation], implementation=implementation)
        return smooth_loss(jnp, run(**arrays, **known, **static))

    def oracle(point: Mapping[str, np.ndarray]) -> float:
        return float(smooth_loss(np, ORACLES[operation](**point, **fixed, **static)))

    return function, oracle


def split_fixed(arguments: Arguments) -> tuple[Arguments, Arguments]:
    """The arguments that can be differentiated, and those that cannot."""
    smooth = {n: v for n, v in arguments.items() if v.dtype.kind in "fc"}
    fixed = {n: v for n, v in arguments.items() if v.dtype.kind not in "fc"}
    return smooth, fixed


def check_in_float32(
    derivatives: Callable[..., Any],
    case: tuple[str, Arguments, dict[str, Any]],
    implementation: str,
    order: int,
) -> None:
    """Derivatives of a kernel of float32, against those of the reference in float64.

    **Arguments:**

    - `derivatives`: from a loss, a function of its arguments with any results.
    - `case`: operation, arguments, static arguments.
    - `order`: of the highest derivative, a sum over as many tokens each.
    """
    operation, arguments, static = case
    smooth, fixed = split_fixed(arguments)
    inputs = cast(smooth, "float32")
    function, _ = loss_pair(operation, implementation, fixed, **static)
    got = jax.jit(derivatives(function))(inputs)
    with enable_x64(True):
        function, _ = loss_pair(operation, "reference", fixed, **static)
        want = jax.jit(derivatives(function))(cast(rounded(inputs), "float64"))
    length = max(values.size for values in smooth.values()) ** order
    assert_all_close(got, want, length)


def assert_all_close(got: Any, want: Any, length: int) -> None:
    """Every array of one PyTree, in float32; numbers as they are in all of it."""
    numbers = [np.max(np.abs(x)) for x in jax.tree.leaves(want) if x.ndim == 0]
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, expected), value in zip(paths, jax.tree.leaves(got), strict=True):
        # A number is a sum whose terms may cancel.
        terms = max(numbers) if expected.ndim == 0 else 1e-30
        name = jax.tree_util.keystr(path)
        assert_close(
            *(value, expected), dtype="float32", length=length, terms=terms, name=name
        )
