"""Whether the state space layers compute here what they should.

The loops are written from the formulas, in NumPy and float64, and share nothing with
what they judge.
"""

from typing import TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..kernels import linear_recurrence, selective_scan, ssd
from ._mixer import AbstractSequenceMixer
from ._s4d import S4D
from ._ssm_config import (
    PARAMETERS,
    SSMConfig,
    SSMHybridLayerConfig,
    create_ssm_config,
)
from ._ssm_factory import create_ssm_layer


# More tokens than a chunk of S4D, whose convolution is to be seen.
_LENGTH = 66
_WIDTH, _STATES = 4, 4
# Roundings of a value on its way through a layer, or through a kernel.
_IN_LAYER, _IN_KERNEL = 16, 8


class SSMStatus(TypedDict):
    """What `validate_ssm_system` found.

    - `mamba_available`, `s4_available`, `hybrid_available`: whether all errors of these
        layers and of what they run on are within their tolerances.
    - `ssm_available`: whether all errors are.
    - `errors`: largest difference of each comparison, relative to the largest value.
    - `tolerances`: what rounding explains, by the same names.
    """

    ssm_available: bool
    mamba_available: bool
    s4_available: bool
    hybrid_available: bool
    errors: dict[str, float]
    tolerances: dict[str, float]


_PARTS = {
    "mamba_available": ("mamba", "mamba2", "selective_scan", "ssd"),
    "s4_available": ("s4", "s4d"),
    "hybrid_available": ("hybrid", "hybrid_ssm", "mamba", "selective_scan"),
}


def validate_ssm_system() -> SSMStatus:
    r"""Run every state space layer of the factory here, and compare it.

    Each layer that `create_ssm_layer` makes reads two short rows, and reads them again
    token by token by `step` (`"<layer_type>.step"`; of `hybrid` the attention there,
    the state space under `"hybrid_ssm.step"`). What they are made of is compared with
    loops in NumPy and float64: `"selective_scan.numpy"` of Mamba, `"ssd.numpy"` of
    Mamba-2, `"linear_recurrence.numpy"` of S5, `"s4d.numpy"`, the kernel of S4D's
    convolution. The default implementations run, as they do in the layers.

    An error is allowed to be $16 \epsilon \sqrt n$ in a layer and $8 \epsilon \sqrt n$
    in a kernel, for sums of $n$ terms, one a token and one a state, with
    $\epsilon = 2^{-23}$ of float32. Of `ultra` what it adds to its input is compared,
    which is computed in bfloat16, but summed in float32: $16 \cdot 2^{-7}$. It takes
    some seconds, most of them to compile.

    **Returns:**

    An `SSMStatus`. A layer that cannot run raises what it raises.

    !!! example

        ```python
        status = validate_ssm_system()
        print(status["mamba_available"], status["errors"]["mamba.step"])
        ```
    """
    errors, tolerances = {}, {}

    def compare(name, got, want, tolerance):
        got, want = _wide(got, want)
        errors[name] = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
        tolerances[name] = tolerance

    rounding = float(jnp.finfo(jnp.float32).eps) * (_LENGTH + _STATES) ** 0.5
    x = _normal(np.random.default_rng(0), 2, _LENGTH, _WIDTH)
    # A generator that compiles in half the time; any numbers do.
    key = jax.random.key(0, impl="unsafe_rbg")
    for name, layer in _layers(key).items():
        got, want = _call(layer, x), _stream(layer, x)
        if name == "ultra":
            narrow = float(jnp.finfo(jnp.bfloat16).eps)
            compare("ultra.step", got - x, want - x, _IN_LAYER * narrow)
        else:
            compare(f"{name}.step", got, want, _IN_LAYER * rounding)
    for name, check in _CHECKS.items():
        compare(name, *check(np.random.default_rng(1)), _IN_KERNEL * rounding)

    def within(parts):
        names = [name for name in errors if name.partition(".")[0] in parts]
        return all(errors[name] <= tolerances[name] for name in names)

    found = {name: within(parts) for name, parts in _PARTS.items()}
    everything = {name.partition(".")[0] for name in errors}
    return SSMStatus(
        ssm_available=within(everything),
        mamba_available=found["mamba_available"],
        s4_available=found["s4_available"],
        hybrid_available=found["hybrid_available"],
        errors=errors,
        tolerances=tolerances,
    )


# Compiled, since outside of `jit` every operation is compiled by itself.
@eqx.filter_jit
def _layers(key: PRNGKeyArray) -> dict[str, AbstractSequenceMixer]:
    configs: dict[str, SSMConfig | SSMHybridLayerConfig] = {
        kind: create_ssm_config(kind, _WIDTH, d_state=_STATES) for kind in PARAMETERS
    }
    # One token more than attention is given.
    configs["hybrid_ssm"] = SSMHybridLayerConfig(_WIDTH, ssm_threshold=_LENGTH - 1)
    return {name: create_ssm_layer(config, key=key) for name, config in configs.items()}


@eqx.filter_jit
def _call(layer, x):
    return layer(x)


@eqx.filter_jit
def _stream(layer, x):
    def read(cache, x):
        y, cache = layer.step(x, cache)
        return cache, y

    cache = layer.init_cache(x.shape[:1], max_len=x.shape[1])
    return jnp.moveaxis(jax.lax.scan(read, cache, jnp.moveaxis(x, 1, 0))[1], 0, 1)


def _normal(rng: np.random.Generator, *shape: int) -> Float[Array, "..."]:
    return jnp.asarray(rng.standard_normal(shape), "float32")


def _wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def _check_selective_scan(rng):
    u, delta = _normal(rng, _LENGTH, _WIDTH), _normal(rng, _LENGTH, _WIDTH)
    A = -jnp.exp(_normal(rng, _WIDTH, _STATES))
    B, C = _normal(rng, _LENGTH, _STATES), _normal(rng, _LENGTH, _STATES)
    got, _ = jax.jit(lambda *args: selective_scan(*args, delta_softplus=True))(
        u, delta, A, B, C
    )
    u, delta, A, B, C = _wide(u, delta, A, B, C)
    dt, h, want = np.logaddexp(0.0, delta), np.zeros(A.shape), []
    for t in range(_LENGTH):
        h = np.exp(dt[t, :, None] * A) * h + (dt[t] * u[t])[:, None] * B[t]
        want.append(h @ C[t])
    return got, np.stack(want)


def _check_ssd(rng):
    x, decay = _normal(rng, _LENGTH, 2, _WIDTH), -jnp.abs(_normal(rng, _LENGTH, 2))
    B, C = _normal(rng, _LENGTH, 1, _STATES), _normal(rng, _LENGTH, 1, _STATES)
    got, _ = jax.jit(ssd)(x, decay, B, C)
    x, decay, B, C = _wide(x, decay, B, C)
    h, want = np.zeros((2, _WIDTH, _STATES)), []
    for t in range(_LENGTH):
        h = np.exp(decay[t])[:, None, None] * h + x[t][..., None] * B[t]
        want.append(h @ C[t, 0])
    return got, np.stack(want)


def _check_linear_recurrence(rng):
    a, x = jax.nn.sigmoid(_normal(rng, _LENGTH, _WIDTH)), _normal(rng, _LENGTH, _WIDTH)
    got, _ = jax.jit(linear_recurrence)(a, x)
    a, x = _wide(a, x)
    h, want = np.zeros(_WIDTH), []
    for t in range(_LENGTH):
        h = a[t] * h + x[t]
        want.append(h)
    return got, np.stack(want)


def _check_s4d(rng):
    key = jax.random.key(int(rng.integers(2**31)))
    layer = eqx.filter_jit(lambda key: S4D(_WIDTH, _STATES, key=key))(key)
    got = eqx.filter_jit(lambda layer: layer.kernel(_LENGTH))(layer)
    C, log_decay, A_imag, log_dt = _wide(
        layer.C, layer.log_A_real, layer.A_imag, layer.log_dt
    )
    A = -np.exp(log_decay) + 1j * A_imag
    A_bar = np.exp(np.exp(log_dt)[:, None] * A)
    h, want = (A_bar - 1) / A, []
    for _ in range(_LENGTH):
        want.append(2 * np.real(np.sum((C[..., 0] + 1j * C[..., 1]) * h, -1)))
        h = A_bar * h
    return got, np.stack(want)


_CHECKS = {
    "selective_scan.numpy": _check_selective_scan,
    "ssd.numpy": _check_ssd,
    "linear_recurrence.numpy": _check_linear_recurrence,
    "s4d.numpy": _check_s4d,
}
