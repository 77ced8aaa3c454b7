"""Small models of Equinox and ours, for what takes models to compressed ones."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from support.quant_cases import random, wide
from support.tolerances import assert_close

from capibara_eqx.arrays import AbstractWeight
from capibara_eqx.layers import GLU, Embedding, Linear, MixtureOfRookies, MoE
from capibara_eqx.transforms import Affine, Rule, Ternary, quantize


class Tied(eqx.Module):
    """A head that is the table of embeddings."""

    shared: eqx.nn.Shared

    def __init__(self, *, key):
        table = eqx.nn.Embedding(6, 4, key=key)
        head = eqx.nn.Linear(4, 6, use_bias=False, key=key)
        self.shared = eqx.nn.Shared(
            (table, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
        )

    def __call__(self, token):
        table, head = self.shared()
        return head(table(token))


class Own(eqx.Module):
    """Someone's layer, with a matrix and a vector of its own."""

    mixing: jax.Array
    bias: jax.Array

    def __init__(self, *, key):
        self.mixing = jax.random.normal(key, (4, 5))
        self.bias = jnp.ones(4)

    def __call__(self, x):
        return jnp.tanh(self.mixing @ x) + self.bias


part = functools.partial
IDS = jnp.array([0, 5, 2])
# How to make it, how to call it, the shape of its input.
MODELS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "mlp": (part(eqx.nn.MLP, 5, 3, 4, 2), lambda m, x: m(x), (5,)),
    "attention": (
        part(eqx.nn.MultiheadAttention, 2, 4),
        lambda m, x: m(x, x, x),
        (3, 4),
    ),
    "gru": (part(eqx.nn.GRUCell, 5, 3), lambda m, x: m(x, jnp.ones(3)), (5,)),
    "lstm": (
        part(eqx.nn.LSTMCell, 5, 3),
        lambda m, x: m(x, (jnp.ones(3), jnp.ones(3)))[0],
        (5,),
    ),
    "conv1d": (
        part(eqx.nn.Conv1d, 4, 6, 3, groups=2),
        lambda m, x: m(x),
        (4, 7),
    ),
    "conv2d": (part(eqx.nn.Conv2d, 2, 3, (3, 2)), lambda m, x: m(x), (2, 5, 4)),
    "transposed": (
        part(eqx.nn.ConvTranspose2d, 4, 6, 3, groups=2),
        lambda m, x: m(x),
        (4, 5, 3),
    ),
    "embedding": (
        part(eqx.nn.Embedding, 6, 5),
        lambda m, x: jax.vmap(m)(IDS) * x,
        (3, 5),
    ),
    "tied": (Tied, lambda m, x: jax.vmap(m)(IDS) * x, (3, 6)),
    "own": (Own, lambda m, x: m(x), (5,)),
    "our linear": (part(Linear, 5, 3), lambda m, x: m(x), (2, 3, 5)),
    "our embedding": (
        part(Embedding, 6, 5),
        lambda m, x: m.attend(m(IDS)) * x,
        (3, 6),
    ),
    "glu": (part(GLU, 4, 6), lambda m, x: m(x), (2, 4)),
    "experts": (
        part(MoE, 4, 3, 2, 5, implementation="scan"),
        lambda m, x: m(x)[0],
        (6, 4),
    ),
    "rookies": (part(MixtureOfRookies, 4, 3, 5), lambda m, x: m(x)[0], (6, 4)),
}
# All but routers, whose choices jump.
PATTERN = "(?!router).*(weight.*|gate|up|down|mixing)"
SPECS = {"int8": Affine(8), "int4 g3": Affine(4, group_size=3), "ternary": Ternary()}


def rules(spec) -> list[Rule]:
    return [Rule(PATTERN, spec)]


@functools.cache
def model_of(name: str) -> Any:
    return eqx.filter_jit(lambda key: MODELS[name][0](key=key))(jax.random.key(0))


@functools.cache
def call_of(name: str) -> Any:
    return eqx.filter_jit(MODELS[name][1])


@functools.cache
def gradient_of(name: str) -> Any:
    call = MODELS[name][1]
    return eqx.filter_jit(
        eqx.filter_grad(lambda model, x: jnp.sum(jnp.sin(call(model, x))))
    )


def x_of(name: str) -> jax.Array:
    return random(MODELS[name][2])


@functools.cache
def small_of(name: str, spec) -> Any:
    return quantize(model_of(name), rules(spec))[0]


def nodes_of(model) -> list[Any]:
    found = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, AbstractWeight))
    return [node for node in found if isinstance(node, AbstractWeight)]


def arrays_of(tree) -> list[jax.Array]:
    """The smallest first."""
    kinds = jax.Array | np.ndarray
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, kinds)]
    return sorted(leaves, key=lambda leaf: leaf.size)


def close_trees(got, want, length: int = 100, terms: float = 1e-6) -> None:
    """Arrays of the same numbers, by size: `CompressedConv` has another order."""
    got, want = arrays_of(got), arrays_of(want)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        one = np.reshape(wide(one), other.shape)
        assert_close(one, other, dtype="float32", length=length, terms=terms)
