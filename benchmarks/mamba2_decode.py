"""Tokens through a Mamba-2 layer one by one, beside the dense products it must do.

`mamba2_step` is the layer's `step` in a loop of 64 tokens, as `generate` runs it: one
program, the cache handed on. `layer_products` are the layer's two matrices, each times
its own vector a row of the batch, in the same loop. `transformers_mixer` is the layer
of transformers on PyTorch, one token a call. All are times of one token; 128 states,
heads of 64 channels.
"""

from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Mamba2

from . import _mamba2_peers, _ssd_oracle
from ._harness import Contender, Entry, Prepared, Settings, compiled, race
from ._inputs import normal
from ._records import Measurement


OPERATION = "mamba2_step"

# So many that the copy of the state into the loop, once, is a small share.
_TOKENS = 64


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a contender and batch size."""
    d_model = 64 if settings.quick else 768
    layer = Mamba2(d_model, key=jax.random.key(0))
    weights = layer_weights(layer)
    matrices = [weights["in_proj"], weights["out_proj"]]
    for batch in (1,) if settings.quick else (1, 8):
        spec = {"name": f"batch_{batch}", "batch": batch, "d_model": d_model}
        tokens, *vectors = normal(
            4, *((_TOKENS, batch, w.shape[1]) for w in (matrices[0], *matrices))
        )
        rows = tokens.swapaxes(0, 1)
        of_layer = partial(_ssd_oracle.mamba2, weights, rows)
        of_products = partial(_products, matrices, vectors)
        runners = [
            Entry(
                spec,
                Contender("mamba2_step", partial(_prepare_steps, layer, tokens)),
                of_layer,
            ),
            Entry(
                spec,
                Contender(
                    "layer_products", partial(_prepare_products, matrices, vectors)
                ),
                of_products,
            ),
            Entry(
                spec,
                Contender(
                    "transformers_mixer",
                    partial(_mamba2_peers.transformers_step, weights, rows),
                ),
                of_layer,
            ),
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


def _prepare_steps(layer: Mamba2, tokens: np.ndarray) -> Prepared:
    arrays, static = eqx.partition(layer, eqx.is_array)

    def steps(arrays, tokens, cache):
        def step(cache, x):
            y, cache = eqx.combine(arrays, static).step(x, cache)
            return cache, y

        cache, y = jax.lax.scan(step, cache, tokens)
        return jnp.swapaxes(y, 0, 1), cache

    cache = layer.init_cache(tokens.shape[1:2])
    return _one_token(
        compiled(steps, arrays, jnp.asarray(tokens), cache), lambda result: result[0]
    )


def _prepare_products(matrices, vectors) -> Prepared:
    def products(matrices, vectors):
        def one(carry, token):
            pairs = zip(token, matrices, strict=True)
            return carry, [x @ matrix.T for x, matrix in pairs]

        return jax.lax.scan(one, 0, vectors)[1]

    arrays = ([jnp.asarray(x) for x in group] for group in (matrices, vectors))
    return _one_token(compiled(products, *arrays))


def _one_token(loop: Prepared, outputs=None) -> Prepared:
    return Prepared(loop.run, loop.compile_ms, loop.temp_bytes, outputs, _TOKENS)


def _products(matrices, vectors):
    wide = [(x.astype(np.float64), w) for x, w in zip(vectors, matrices, strict=True)]
    return [x @ w.astype(np.float64).T for x, w in wide]
