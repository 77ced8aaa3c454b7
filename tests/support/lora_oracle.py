"""Adapters of low rank from their formulas, in NumPy and float64."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from support.tolerances import as_wide

from capibara_eqx.arrays import LoRAArray, as_array


class Adapter(NamedTuple):
    """A weight and its adapter as float64; no `m` without DoRA."""

    weight: np.ndarray
    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    scale: float


def adapter_of(node: LoRAArray) -> Adapter:
    spec = node.spec
    alpha = spec.rank if spec.alpha is None else spec.alpha
    scale = alpha / (np.sqrt(spec.rank) if spec.rs else spec.rank)
    m = None if node.magnitude is None else as_wide(node.magnitude)
    parts = (as_wide(as_array(node.base)), as_wide(node.a), as_wide(node.b))
    return Adapter(*parts, m, float(scale))


def whole(adapter: Adapter) -> np.ndarray:
    """The weight with its update, row by row."""
    weight, a, b, m, scale = adapter
    result = np.empty_like(weight)
    for index in np.ndindex(weight.shape[:-1]):
        stack = index[:-1]
        row = weight[index].copy()
        for r in range(a.shape[-2]):
            row += scale * b[(*index, r)] * a[(*stack, r)]
        if m is not None:
            length = np.sqrt(np.sum(row**2))
            row *= m[index] / (length or 1)
        result[index] = row
    return result


def gradients(adapter: Adapter, x: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
    """Of `sum(g * y)` for the product `y` of one matrix with rows `x`."""
    weight, a, b, m, scale = adapter
    total = weight + scale * b @ a
    factor = np.ones(len(weight))
    found = {}
    if m is not None:
        lengths = np.linalg.norm(total, axis=-1)
        # The length is a constant: it has no gradient of its own.
        factor = m / lengths
        found["magnitude"] = np.sum(g * (x @ total.T), axis=0) / lengths
    of_total = (g * factor).T @ x
    return found | {
        "a": scale * b.T @ of_total,
        "b": scale * of_total @ a.T,
        "base": of_total,
        "x": (g * factor) @ total,
    }


def moved_adapters(model: Any, seed: int, size: float = 0.5) -> Any:
    """A model whose adapters are zero nowhere; all else stays."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        noise = size * rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise, leaf.dtype)

    def move(node):
        if not isinstance(node, LoRAArray):
            return node
        a, b, *magnitude = map(noisy, node.adapter)
        node = eqx.tree_at(lambda n: (n.a, n.b), node, (a, b))
        if magnitude:
            node = eqx.tree_at(lambda n: n.magnitude, node, magnitude[0])
        return node

    return jax.tree.map(move, model, is_leaf=lambda n: isinstance(n, LoRAArray))
