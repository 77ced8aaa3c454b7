"""Steps of meta-training through a Mamba layer: second derivatives of the scan.

Four tasks of four rows each to learn from and to be judged by; the layer adapts in one
inner step of rate 0.1 to targets for every token. By the implementation of the scan;
`default` is what the layer takes by itself. A call is a step with Adam, and errors are
differences of loss and gradients from `reference` in float64, which is a plain loop.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara_eqx.layers import Mamba
from capibara_eqx.meta import (
    Task,
    init_meta_state,
    make_meta_step,
    maml,
    meta_value_and_grad,
    sgd,
)

from ._harness import Contender, Prepared, Settings, compile_timed, entries, race
from ._harness import temp_bytes as temporaries
from ._inputs import normal
from ._records import Measurement
from .meta_step import squared_error


OPERATION = "meta_mamba"

_RATE = 0.1
_SHARE = 0.1
IMPLEMENTATIONS = {"default": None, "xla": "xla", "reference": "reference"}


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation."""
    d_model, seq, rows, tasks = (2, 5, 1, 2) if settings.quick else (64, 128, 4, 4)
    spec = {"name": "mamba", "d_model": d_model, "seq": seq, "rows": rows}
    spec |= {"tasks": tasks, "tokens_per_call": 2 * tasks * rows * seq}
    arrays = normal(0, *[(tasks, rows, seq, d_model)] * 4)
    contenders = [
        Contender(name, partial(_prepare, d_model, implementation, arrays))
        for name, implementation in IMPLEMENTATIONS.items()
    ]
    reference = partial(_expected, d_model, arrays)
    runners = entries(spec, contenders, reference)
    yield from race(settings, OPERATION, "train", runners)


def _layer(d_model: int, implementation: str | None) -> Mamba:
    return Mamba(d_model, implementation=implementation, key=jax.random.key(0))


def _tasks(arrays: tuple[Any, ...]) -> Task:
    x, y, x_query, y_query = (jnp.asarray(a) for a in arrays)
    return Task((x, y), (x_query, y_query))


def _task_loss():
    return maml(squared_error, optimizer=sgd(_RATE), steps=1)


def _prepare(
    d_model: int, implementation: str | None, arrays: tuple[np.ndarray, ...]
) -> Prepared:
    optimizer = optax.adam(1e-3)
    step = make_meta_step(optimizer, _task_loss())
    state = init_meta_state(_layer(d_model, implementation), optimizer)
    tasks = _tasks(arrays)
    executable, compile_ms = compile_timed(lambda *args: step(*args), state, tasks)

    def outputs(result):
        state, value = result
        # Adam's first average is a share of the first gradient.
        averages = jax.tree.leaves(state.opt_state[0].mu)
        return value, [average / _SHARE for average in averages]

    return Prepared(
        lambda: jax.block_until_ready(executable(state, tasks)),
        compile_ms,
        temporaries(executable),
        outputs,
    )


def _expected(d_model: int, arrays: tuple[np.ndarray, ...]) -> Any:
    """Loss and gradients of the plain loop in float64."""
    layer = _layer(d_model, "reference")
    # Where it was before jax 0.8.
    home = jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")
    with home.enable_x64(True):
        wide = lambda leaf: jnp.asarray(np.asarray(leaf, np.float64))
        layer = jax.tree.map(wide, layer)
        tasks = _tasks(tuple(np.asarray(a, np.float64) for a in arrays))
        value, found = jax.jit(
            lambda layer: meta_value_and_grad(_task_loss(), tasks)(layer)
        )(layer)
        return jax.tree.map(np.asarray, (value, jax.tree.leaves(found)))
