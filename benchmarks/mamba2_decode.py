"""One decode step of a Mamba-2 layer, beside the dense products it must do.

`mamba2_step` is the layer's jitted `step`, its cache donated; `transformers_mixer` is
that of transformers on PyTorch. `layer_products` are the layer's two matrices, each
times its own vector a row of the batch; `dense_product` is one matrix with as many
elements as the layer has weights. `state_update` reads and writes the layer's state
once and does nothing else. 128 states, heads of 64 channels.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Mamba2

from . import _mamba2_peers, _ssd_oracle
from ._harness import Contender, Entry, Prepared, Settings, compile_timed, race
from ._inputs import normal
from ._records import Measurement
from .decode import dense, prepare_products, prepare_step, products


OPERATION = "mamba2_step"

# Tokens whose outputs are compared with the reference, from an empty cache.
_JUDGED = 8


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a contender and batch size."""
    d_model = 64 if settings.quick else 768
    layer = Mamba2(d_model, key=jax.random.key(0))
    weights = layer_weights(layer)
    matrices = [weights["in_proj"], weights["out_proj"]]
    whole = [dense(layer)]
    for batch in (1,) if settings.quick else (1, 8):
        spec = {"name": f"batch_{batch}", "batch": batch, "d_model": d_model}
        tokens, *vectors = normal(
            4,
            (batch, _JUDGED, d_model),
            *((batch, w.shape[1]) for w in matrices),
        )
        layer_output = partial(_ssd_oracle.mamba2, weights, tokens)
        state = normal(6, (batch, layer.n_heads, layer.head_dim, layer.d_state))[0]
        contenders = {
            "mamba2_step": (partial(prepare_step, layer, tokens), layer_output),
            "transformers_mixer": (
                partial(_mamba2_peers.transformers_step, weights, tokens),
                layer_output,
            ),
            "layer_products": (
                partial(prepare_products, matrices, vectors),
                partial(products, matrices, vectors),
            ),
            "dense_product": (
                partial(prepare_products, whole, vectors[:1]),
                partial(products, whole, vectors[:1]),
            ),
            "state_update": (partial(_prepare_update, state), partial(_update, state)),
        }
        runners = [
            Entry(spec, Contender(name, prepare), reference)
            for name, (prepare, reference) in contenders.items()
        ]
        yield from race(settings, OPERATION, "step", runners)


def layer_weights(layer: Mamba2) -> dict[str, np.ndarray]:
    """The parameters of a layer under the names of the float64 reference."""
    named = {
        "in_proj": layer.in_proj.weight,
        "conv": layer.conv.weight,
        "conv_bias": layer.conv.bias,
        "dt_bias": layer.dt_bias,
        "A_log": layer.A_log,
        "D": layer.D,
        "norm": layer.norm.weight,
        "out_proj": layer.out_proj.weight,
    }
    return {name: np.asarray(value) for name, value in named.items()}


def _prepare_update(state: np.ndarray) -> Prepared:
    def update(h):
        h = 0.5 * h + 1.0
        return jnp.sum(h, axis=-1), h

    h = jnp.asarray(state)
    executable, compile_ms = compile_timed(update, h, donate=(0,))

    def run():
        nonlocal h
        y, h = jax.block_until_ready(executable(h))
        return y

    def outputs(_):
        return np.asarray(executable(jnp.asarray(state))[0])

    return Prepared(run, compile_ms, outputs=outputs)


def _update(state):
    return np.sum(0.5 * state.astype(np.float64) + 1.0, axis=-1)
