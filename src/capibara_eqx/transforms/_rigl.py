from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..internal import check_range, check_size
from ._places import get
from ._rules import Rule
from ._sparse_training import (
    Masks,
    SparseWeight,
    Weights,
    masked_updates,
    sparse_transformation,
    sparse_weights,
    zero_moments,
)
from ._unstructured import Groups, highest


Fraction = Callable[[Int[Array, ""]], Float[Array, ""]]
Growth = Callable[[int, SparseWeight, Int[Array, ""], PyTree], Array]


def rigl(
    inner: optax.GradientTransformation,
    rules: Sequence[Rule],
    alpha: float = 0.3,
    delta_t: int = 100,
    *,
    t_end: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains with a constant number of weights, which move to where gradients are.

    Every `delta_t` updates, before update `t_end`, an update of the weights makes way
    for one of their places. Of the $n$ weights of a matrix the

    $$k = \lfloor \alpha_t n \rfloor, \quad
    \alpha_t = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{T_{end}}\right)$$

    of least size go, and as many grow where the gradient is largest among those that
    do not stay. New weights are zero, and so are the moments that `inner` has of them;
    those that went and grew again keep both. Evci et al., *Rigging the Lottery: Making
    All Tickets Winners*, arXiv 1911.11134. With an `NM` a group grows as many as it
    lost, so that each keeps `n`; what goes is chosen in the whole matrix all the same.

    Weights are zero outside of the masks after every update, so that gradients there
    are those of a dense network. The first masks are those of `sparsify` with the same
    rules; sparsify the model before, so that its first gradients are those of the
    sparse one. Put nothing behind it in an `optax.chain`. Moments are found by the
    path of their parameter: not in a state that flattens or stacks the parameters.

    **Arguments:**

    - `inner`: moves the weights that there are.
    - `rules`: which weights are sparse: `Unstructured`, `NM` or `None`. The first that
        matches counts; what none matches trains dense. `erk_rules` shares a density
        out.
    - `alpha`: the fraction that moves at first, in (0, 1].
    - `delta_t`: updates from one change of places to the next.
    - `t_end`: no place changes from this update on.

    **Returns:**

    An optax transformation, whose `update` needs the parameters.

    **Raises:**

    `ValueError` for an argument out of its range, and at `init` as `sparsify`.

    !!! example

        ```python
        rules = [Rule(r".*weight", Unstructured(0.1))]
        model, _ = sparsify(model, rules)
        optimizer = rigl(optax.adam(1e-3), rules, t_end=7500)
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
        ```
    """
    _check("rigl", alpha, delta_t)
    check_size("t_end", t_end)

    def fraction(step):
        return cosine_fraction(step, alpha, t_end)

    def growth(index, weight, step, gradients):
        del index, step
        return jnp.abs(get(gradients, weight.keys))

    return _moving("rigl", inner, rules, delta_t, t_end, fraction, growth)


def set_training(
    inner: optax.GradientTransformation,
    rules: Sequence[Rule],
    alpha: float = 0.3,
    delta_t: int = 100,
    *,
    t_end: int,
    key: PRNGKeyArray,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains with a constant number of weights, which move to random places.

    Every `delta_t` updates, before update `t_end`, the $\lfloor \alpha n \rfloor$
    weights of least size of a matrix go and as many grow anywhere among those that do
    not stay; all else as in `rigl`. Mocanu et al., *Scalable Training of Artificial
    Neural Networks with Adaptive Sparse Connectivity Inspired by Network Science*,
    arXiv 1707.04780, whose new weights are random; here they start from zero.

    **Arguments:**

    - `inner`, `rules`, `delta_t`, `t_end`: as in `rigl`.
    - `alpha`: the fraction that moves, in (0, 1].
    - `key`: for the places; each change draws its own, by the count of updates.

    **Returns:**

    An optax transformation, whose `update` needs the parameters.

    **Raises:**

    As `rigl`.

    !!! example

        ```python
        rules = [Rule(r".*weight", NM(2, 4))]
        model, _ = sparsify(model, rules)
        optimizer = set_training(optax.adam(1e-3), rules, t_end=7500, key=key)
        ```
    """
    _check("set_training", alpha, delta_t)
    check_size("t_end", t_end)

    def fraction(step):
        del step
        return jnp.asarray(alpha, jnp.float32)

    def growth(index, weight, step, gradients):
        del gradients
        own = jax.random.fold_in(jax.random.fold_in(key, step), index)
        return jax.random.uniform(own, weight.groups.shape)

    return _moving("set_training", inner, rules, delta_t, t_end, fraction, growth)


def cosine_fraction(step: Int[Array, ""], alpha: float, t_end: int) -> Float[Array, ""]:
    """The fraction of weights that move: from `alpha` down to 0 at `t_end`."""
    share = step.astype(jnp.float32) / t_end
    return alpha / 2 * (1 + jnp.cos(jnp.pi * share))


def exchange(
    mask: Bool[Array, "*shape"],
    weight: Float[Array, "*shape"],
    growth: Float[Array, "*shape"],
    fraction: Float[Array, ""],
    groups: Groups,
) -> tuple[Bool[Array, "*shape"], Bool[Array, "*shape"]]:
    """The mask after a change of places, and where it has weights that are new.

    **Arguments:**

    - `mask`: before.
    - `weight`: the smallest under the mask go, wherever in the matrix they lie.
    - `growth`: the highest grow, as many in a group as it lost.
    - `fraction`: of the weights under the mask that go, rounded down.
    - `groups`: of the weight.
    """
    split = groups.split(mask)
    count = groups.per_matrix * groups.count
    leave = jnp.floor(fraction * count).astype(jnp.int32)
    size = jnp.where(split, jnp.abs(groups.split(weight)), -1)
    flat = size.reshape(*size.shape[:-2], -1)
    stay = highest(flat, count - leave).reshape(split.shape) & split
    lost = jnp.sum(split & ~stay, axis=-1, keepdims=True)
    grown = highest(jnp.where(stay, -1, groups.split(growth)), lost)
    return groups.join(stay | grown), groups.join(grown & ~split)


def _moving(
    function: str,
    inner: optax.GradientTransformation,
    rules: Sequence[Rule],
    delta_t: int,
    t_end: int,
    fraction: Fraction,
    growth: Growth,
) -> optax.GradientTransformationExtraArgs:
    def choose_weights(params):
        return sparse_weights(function, params, rules)

    def first_masks(weights: Weights) -> Masks:
        return {
            path: weight.groups.largest(jnp.abs(weight.value))
            for path, weight in weights.items()
        }

    def step(count, gradients, masks, state, params, weights, descend):
        def train():
            moved, new_state = descend(masks, state)
            return moved, masks, new_state

        def move():
            new_masks, fresh = {}, {}
            for index, (path, weight) in enumerate(weights.items()):
                wanted = growth(index, weight, count, gradients)
                parts = (masks[path], weight.value, wanted, fraction(count))
                new_masks[path], new = exchange(*parts, weight.groups)
                fresh[weight.keys] = new
            # No update but that of places, in the dtypes of the other branch.
            none = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), shapes[0])
            kept = {path: masks[path] & new_masks[path] for path in masks}
            moved = masked_updates(none, weights, kept)
            return moved, new_masks, zero_moments(state, params, fresh)

        shapes = jax.eval_shape(train)
        due = (count % delta_t == 0) & (count < t_end)
        return jax.lax.cond(due, move, train)

    return sparse_transformation(inner, choose_weights, first_masks, step)


def _check(function: str, alpha: float, delta_t: int) -> None:
    check_range("alpha", alpha, above=0, most=1, hint=f"A usual one in {function}: 0.3")
    check_size("delta_t", delta_t)
