"""Optimisers of optax as inner loops, and where their outer gradients are NaN."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.derivatives import quick_jit

from capibara_eqx.meta import adapt, safe_adam


def home(value: Any) -> str:
    """The module of a function; that of `nadam` is in the `partial` that it is."""
    return getattr(getattr(value, "func", value), "__module__", "")


# All that optax has, so that a new one is noticed.
ALIASES: dict[str, Callable[..., Any]] = {
    name: value
    for name, value in inspect.getmembers(optax, callable)
    if home(value).endswith("optax._src.alias")
}
# The docstring of `safe_adam` names these.
UNSAFE = {
    "adafactor",
    "adam",
    "adamw",
    "amsgrad",
    "lamb",
    "nadam",
    "nadamw",
    "optimistic_adam",
    "optimistic_adam_v2",
    "radam",
}
# Their line search is a `while` loop, which has no derivative in reverse mode.
NO_REVERSE = {"lbfgs"}
RNG = np.random.default_rng(0)


def model():
    """Three units, of which the last is off for all positive inputs."""
    weight = np.abs(RNG.standard_normal((3, 2))) + 0.1
    bias = np.ones(3)
    weight[-1], bias[-1] = -1, -1
    head = RNG.standard_normal(3)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), (weight, bias, head))


def loss(model, batch, *, key=None):
    weight, bias, head = model
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ weight.T + bias[None]) @ head - y) ** 2)


MODEL = model()
SUPPORT, QUERY = (
    (
        jnp.asarray(RNG.uniform(0.1, 1, (4, 2)), "float32"),
        jnp.asarray(RNG.standard_normal(4), "float32"),
    )
    for _ in range(2)
)


def gradient(optimizer):
    def after(model):
        adapted = adapt(loss, model, SUPPORT, optimizer=optimizer, steps=3)
        return loss(adapted, QUERY), adapted

    return quick_jit(jax.grad(after, has_aux=True))(MODEL)


def is_finite(tree) -> bool:
    return all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def made(name: str):
    options = {"key": 0} if name == "noisy_sgd" else {}
    return ALIASES[name](0.01, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(set(ALIASES) - NO_REVERSE))
def test_outer_gradients_with_a_unit_that_is_off(name):
    outer, adapted = gradient(made(name))
    assert is_finite(adapted)
    assert is_finite(outer) == (name not in UNSAFE)


@pytest.mark.slow
def test_a_root_without_anything_added():
    optimizer = optax.rmsprop(0.01, eps_in_sqrt=False)
    outer, adapted = gradient(optimizer)
    assert is_finite(adapted)
    assert not is_finite(outer)


@pytest.mark.slow
@pytest.mark.parametrize("eps_root", [1e-16, 1e-8])
def test_a_root_that_is_safe(eps_root):
    assert is_finite(gradient(safe_adam(0.01, eps_root=eps_root)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NO_REVERSE))
def test_a_line_search_adapts_but_has_no_reverse_mode(name):
    adapted = adapt(loss, MODEL, SUPPORT, optimizer=made(name), steps=3)
    assert float(loss(adapted, SUPPORT)) < float(loss(MODEL, SUPPORT))
    with pytest.raises(ValueError, match="while_loop"):
        gradient(made(name))


def test_docstring_and_page_name_what_is_unsafe():
    assert UNSAFE <= set(ALIASES)
    page = (Path(__file__).parents[2] / "docs" / "meta.md").read_text()
    named = re.findall(r"Of optax .* have NaN there: ([^.]*)\.", page, re.DOTALL)
    assert [set(re.findall(r"`(\w+)`", text)) for text in named] == [UNSAFE]
    text = inspect.getdoc(safe_adam)
    assert text is not None
    named = re.findall(r"NaN in ([^.]*),\s+unless", text.replace("`optax.", "`"))
    assert [set(re.findall(r"`(\w+)`", text)) for text in named] == [UNSAFE]
