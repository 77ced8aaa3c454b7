"""A Llama in float64 NumPy, from its parameters under their names in a checkpoint."""

import numpy as np


Array = np.ndarray

_EPS, _BASE = 1e-5, 10000.0


def greedy(weights: dict[str, Array], n_heads: int, prompt: Array, count: int) -> Array:
    """The best token, `count` times, each read before the next is chosen.

    **Arguments:**

    - `weights`: by name; the widths of the heads follow from their shapes.
    - `n_heads`: query heads.
    - `prompt`: ids, `(batch, length)`.
    - `count`: number of tokens.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    cache: list[tuple[Array, Array]] = []
    found, read = [], prompt
    for _ in range(count):
        best = np.argmax(_scores(w, n_heads, read, cache)[:, -1], axis=-1)
        found.append(best)
        read = best[:, None]
    return np.stack(found, axis=1)


def _scores(w, n_heads, tokens, cache):
    """Scores after new tokens; `cache` holds the keys and values of every layer."""
    x = w["model.embed_tokens.weight"][tokens]
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in w:
        own = f"model.layers.{layer}."
        seen = _rms_norm(x, w[f"{own}input_layernorm.weight"])
        x = x + _attention(w, f"{own}self_attn.", n_heads, seen, cache, layer)
        seen = _rms_norm(x, w[f"{own}post_attention_layernorm.weight"])
        gate = seen @ w[f"{own}mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (seen @ w[f"{own}mlp.up_proj.weight"].T)
        x = x + inner @ w[f"{own}mlp.down_proj.weight"].T
        layer += 1
    return _rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _attention(w, own, n_heads, x, cache, layer):
    width = w[f"{own}q_proj.weight"].shape[0] // n_heads

    def heads(name):
        y = x @ w[f"{own}{name}_proj.weight"].T
        return y.reshape(*y.shape[:2], -1, width).swapaxes(1, 2)

    before = cache[layer][0].shape[2] if layer < len(cache) else 0
    positions = before + np.arange(x.shape[1])
    q, k = _turn(heads("q"), positions), _turn(heads("k"), positions)
    v = heads("v")
    if layer < len(cache):
        pairs = zip(cache[layer], (k, v), strict=True)
        k, v = (np.concatenate(pair, axis=2) for pair in pairs)
        cache[layer] = (k, v)
    else:
        cache.append((k, v))
    k, v = (np.repeat(y, n_heads // y.shape[1], axis=1) for y in (k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(width)
    ahead = np.arange(k.shape[2]) > positions[:, None]
    scores = np.where(ahead, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = (weights @ v).swapaxes(1, 2)
    return y.reshape(*y.shape[:2], -1) @ w[f"{own}o_proj.weight"].T


def _turn(x, positions):
    """Channel i of the first half and of the second as one complex number, turned."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * _BASE ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + _EPS) * weight
