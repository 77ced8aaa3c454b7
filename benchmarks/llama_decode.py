"""Tokens from a small Llama, the best one each time: a prompt, then one after another.

`generate` is the library's, compiled, with caches of keys and values. `transformers` is
the `generate` of its `LlamaForCausalLM` on PyTorch with the cache that it takes by
default, `transformers_static` with one of fixed size, `transformers_1_thread` the first
on one core: so small a product may be slower on two. All have the same weights; an
error of zero means that all tokens are those of a Llama in float64. `weight_products`
multiplies every weight matrix with a vector a row, once a token, and does nothing else.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from capibara_eqx.layers import Attention, Embedding, SwiGLU
from capibara_eqx.models import (
    LanguageModel,
    TransformerBlock,
    generate,
    transformer_language_model,
)

from . import _llama_oracle, _llama_peer
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


OPERATION = "llama_decode"

_SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "d_model": 256,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 688,
}
_QUICK_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 24,
}

# Of the prompts: the best score is always ahead of the next by 1e-4 and more, which is
# above the rounding of float32.
_SEED = 12
# On the weights of the blocks as they are drawn, with which the last token alone would
# decide, and the same few tokens would come again and again.
_GAIN = 4.0


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement a contender and batch size."""
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    prompt_len, count = (5, 6) if settings.quick else (64, 256)
    model = _model(sizes)
    weights = llama_weights(model)
    rng = np.random.default_rng(_SEED)
    for batch in (1,) if settings.quick else (1, 8):
        prompt = rng.integers(sizes["vocab_size"], size=(batch, prompt_len))
        lengths = {"batch": batch, "prompt": prompt_len, "new_tokens": count}
        spec = {"name": f"batch_{batch}", **lengths, **sizes}
        spec["tokens_per_call"] = batch * count
        peer = partial(_llama_peer.generate, weights, sizes, prompt, count)
        greedy = [
            Contender("generate", partial(_prepare, model, prompt, count)),
            Contender("transformers", peer),
            Contender("transformers_static", partial(peer, cache="static")),
            Contender("transformers_1_thread", partial(peer, threads=1)),
        ]
        reference = partial(
            _llama_oracle.greedy, weights, sizes["n_heads"], prompt, count
        )
        runners = [Entry(spec, contender, reference) for contender in greedy]
        matrices, vectors = _matrices(weights), _vectors(weights, count, batch)
        runners.append(
            Entry(
                spec,
                Contender(
                    "weight_products", partial(_prepare_products, matrices, vectors)
                ),
                partial(_products, matrices, vectors),
            )
        )
        yield from race(settings, OPERATION, "generate", runners)


def _model(sizes: dict[str, Any]) -> LanguageModel:
    model = transformer_language_model(**sizes, key=jax.random.key(0))

    def larger(leaf):
        return leaf * _GAIN if eqx.is_array(leaf) and leaf.ndim == 2 else leaf

    return eqx.tree_at(
        lambda model: model.stack, model, replace_fn=lambda s: jax.tree.map(larger, s)
    )


def llama_weights(model: LanguageModel) -> dict[str, np.ndarray]:
    """The parameters of a model under their names in a checkpoint of Llama."""
    assert isinstance(model.stack.blocks, tuple)
    assert isinstance(model.embedding, Embedding)
    assert model.head is not None
    named = {
        "model.embed_tokens": model.embedding.weight,
        "model.norm": model.norm.weight,
        "lm_head": model.head.weight,
    }
    for i, block in enumerate(model.stack.blocks):
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.mixer, block.feed_forward
        assert isinstance(attention, Attention)
        assert isinstance(feed_forward, SwiGLU)
        own = {
            "input_layernorm": block.mixer_norm,
            "self_attn.q_proj": attention.q_proj,
            "self_attn.k_proj": attention.k_proj,
            "self_attn.v_proj": attention.v_proj,
            "self_attn.o_proj": attention.o_proj,
            "post_attention_layernorm": block.feed_forward_norm,
            "mlp.gate_proj": feed_forward.gate_proj,
            "mlp.up_proj": feed_forward.up_proj,
            "mlp.down_proj": feed_forward.down_proj,
        }
        for name, part in own.items():
            named[f"model.layers.{i}.{name}"] = part.weight
    return {f"{name}.weight": np.asarray(value) for name, value in named.items()}


def _prepare(model: LanguageModel, prompt: np.ndarray, count: int) -> Prepared:
    arrays, static = eqx.partition(model, eqx.is_array)

    def run_all(arrays, prompt):
        model = eqx.combine(arrays, static)
        return generate(model, prompt, max_new_tokens=count, temperature=0).tokens

    tokens = jnp.asarray(prompt, jnp.int32)
    executable, compile_ms = compile_timed(run_all, arrays, tokens)
    return Prepared(
        lambda: jax.block_until_ready(executable(arrays, tokens)),
        compile_ms,
        temp_bytes(executable),
    )


def _matrices(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
    """All that a token is multiplied with; of the embedding it takes one row."""
    return [
        w for name, w in weights.items() if w.ndim == 2 and "embed_tokens" not in name
    ]


def _vectors(weights, count: int, batch: int) -> list[np.ndarray]:
    shapes = [(count, batch, w.shape[1]) for w in _matrices(weights)]
    return list(normal(10, *shapes))


def _prepare_products(matrices, vectors) -> Prepared:
    def products(matrices, vectors):
        def token(sums, xs):
            added = [
                total + x @ w.T for total, x, w in zip(sums, xs, matrices, strict=True)
            ]
            return added, None

        shapes = [
            (x.shape[1], w.shape[0]) for x, w in zip(vectors, matrices, strict=True)
        ]
        start = [jnp.zeros(shape, jnp.float32) for shape in shapes]
        return jax.lax.scan(token, start, vectors)[0]

    return compiled(
        products, [jnp.asarray(w) for w in matrices], [jnp.asarray(x) for x in vectors]
    )


def _products(matrices, vectors) -> Any:
    sums = [np.sum(x, axis=0, dtype=np.float64) for x in vectors]
    return [x @ w.astype(np.float64).T for x, w in zip(sums, matrices, strict=True)]
