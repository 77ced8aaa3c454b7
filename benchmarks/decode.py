"""One decode step of a Mamba layer, beside dense products of as many weights.

`mamba_step` is the layer's jitted `step`, its cache donated; `transformers_mixer` is
that of transformers on PyTorch. `dense_product` is one matrix with as many elements as
the layer has weights, times a vector a row of the batch; `layer_products` are the
layer's own four matrices, each times its own vector.
"""

from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Mamba

from . import _oracle, _peers
from ._harness import (
    Contender,
    Entry,
    Prepared,
    Settings,
    compile_timed,
    compiled,
    race,
    temp_bytes,
)
from ._inputs import normal
from ._records import Measurement


OPERATION = "mamba_step"

# Tokens whose outputs are compared with the reference, from an empty cache.
_JUDGED = 8


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a contender and batch size."""
    d_model = 16 if settings.quick else 768
    layer = Mamba(d_model, key=jax.random.key(0))
    for batch in (1,) if settings.quick else (1, 8):
        spec = {"name": f"batch_{batch}", "batch": batch, "d_model": d_model}
        tokens, *vectors = normal(
            4,
            (batch, _JUDGED, d_model),
            *((batch, w.shape[1]) for w in _matrices(layer)),
        )
        matrix = _dense(layer)
        weights = [np.asarray(w) for w in _matrices(layer)]
        runners = [
            Entry(
                spec,
                Contender("mamba_step", partial(_prepare_step, layer, tokens)),
                partial(_oracle.mamba, layer_weights(layer), tokens),
            ),
            Entry(
                spec,
                Contender(
                    "transformers_mixer",
                    partial(_peers.transformers_step, layer_weights(layer), tokens),
                ),
                partial(_oracle.mamba, layer_weights(layer), tokens),
            ),
            Entry(
                spec,
                Contender(
                    "dense_product",
                    partial(_prepare_products, [matrix], [vectors[0]]),
                ),
                partial(_products, [matrix], [vectors[0]]),
            ),
            Entry(
                spec,
                Contender(
                    "layer_products", partial(_prepare_products, weights, vectors)
                ),
                partial(_products, weights, vectors),
            ),
        ]
        yield from race(settings, OPERATION, "step", runners)


def layer_weights(layer: Mamba) -> dict[str, np.ndarray]:
    """The parameters of a layer under the names of the float64 reference."""
    named = {
        "in_proj": layer.in_proj.weight,
        "conv": layer.conv.weight,
        "conv_bias": layer.conv.bias,
        "x_proj": layer.x_proj.weight,
        "dt_proj": layer.dt_proj.weight,
        "dt_bias": layer.dt_proj.bias,
        "A_log": layer.A_log,
        "D": layer.D,
        "out_proj": layer.out_proj.weight,
    }
    return {name: np.asarray(value) for name, value in named.items()}


def _matrices(layer: Mamba):
    projections = (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)
    return [projection.weight for projection in projections]


def _dense(layer: Mamba) -> np.ndarray:
    """One matrix of the layer's width with as many elements as all its weights."""
    count = sum(w.size for w in jax.tree.leaves(eqx.filter(layer, eqx.is_array)))
    return normal(5, (-(-count // layer.d_model), layer.d_model))[0]


def _prepare_step(layer: Mamba, tokens: np.ndarray) -> Prepared:
    arrays, static = eqx.partition(layer, eqx.is_array)

    def step(arrays, x, cache):
        return eqx.combine(arrays, static).step(x, cache)

    batch_shape = tokens.shape[:1]
    inputs = [jnp.asarray(tokens[:, t]) for t in range(tokens.shape[1])]
    cache = layer.init_cache(batch_shape)
    executable, compile_ms = compile_timed(step, arrays, inputs[0], cache, donate=(2,))

    def run():
        nonlocal cache
        y, cache = jax.block_until_ready(executable(arrays, inputs[0], cache))
        return y

    def outputs(_):
        own, ys = layer.init_cache(batch_shape), []
        for x in inputs:
            y, own = executable(arrays, x, own)
            ys.append(np.asarray(y))
        return np.stack(ys, axis=1)

    return Prepared(run, compile_ms, temp_bytes(executable), outputs)


def _prepare_products(matrices, vectors) -> Prepared:
    return compiled(
        lambda matrices, vectors: [
            x @ w.T for x, w in zip(vectors, matrices, strict=True)
        ],
        [jnp.asarray(w) for w in matrices],
        [jnp.asarray(x) for x in vectors],
    )


def _products(matrices, vectors):
    wide = [(x.astype(np.float64), w) for x, w in zip(vectors, matrices, strict=True)]
    return [x @ w.astype(np.float64).T for x, w in wide]
