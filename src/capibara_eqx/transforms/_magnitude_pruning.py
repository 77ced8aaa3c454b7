from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..internal import check_range, check_size
from ._rules import Rule
from ._sparse_training import Masks, Weights, sparse_transformation, sparse_weights


def magnitude_pruning(
    inner: optax.GradientTransformation,
    rules: Sequence[Rule],
    delta_t: int = 100,
    *,
    begin: int = 0,
    end: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a dense network, whose smallest weights go little by little.

    Every `delta_t` updates from `begin` to `end`, and at `end`, the largest weights of
    every group stay, of $m$ values

    $$n + \mathrm{round}\left((m - n)
    \left(1 - \frac{t - t_{begin}}{t_{end} - t_{begin}}\right)^3\right)$$

    $m$ and $n$ are those of an `NM`, or the size of a matrix and what `Unstructured`
    leaves of it. Zhu and Gupta, *To prune, or not to prune: exploring the efficacy of
    pruning for model compression*, arXiv 1710.01878. What is zero stays zero. Put
    nothing behind it in an `optax.chain`.

    **Arguments:**

    - `inner`: moves the weights that there are.
    - `rules`: what is left in the end: `Unstructured`, `NM` or `None`. The first that
        matches counts; what none matches stays dense.
    - `delta_t`: updates from one choice to the next.
    - `begin`, `end`: the first and the last update that may choose.

    **Returns:**

    An optax transformation, whose `update` needs the parameters.

    **Raises:**

    `ValueError` for an argument out of its range, and at `init` as `sparsify`.

    !!! example

        ```python
        rules = [Rule(r".*weight", Unstructured(0.1))]
        optimizer = magnitude_pruning(optax.adam(1e-3), rules, begin=1000, end=5000)
        ```
    """
    check_size("delta_t", delta_t)
    check_range("begin", begin, least=0)
    check_size("end", end)
    check_range("end", end, above=begin, hint="Pruning ends after it begins.")

    def first_masks(weights: Weights) -> Masks:
        return {
            path: jnp.ones(weight.groups.shape, jnp.bool_)
            for path, weight in weights.items()
        }

    def step(count, gradients, masks, state, params, weights, descend):
        del gradients, params

        def prune():
            left = cubic_left(count, begin, end)
            return {path: _pruned(masks[path], w, left) for path, w in weights.items()}

        due = (count >= begin) & ((count - begin) % delta_t == 0) & (count <= end)
        masks = jax.lax.cond(due | (count == end), prune, lambda: masks)
        moved, state = descend(masks, state)
        return moved, masks, state

    def choose_weights(params):
        return sparse_weights("magnitude_pruning", params, rules)

    return sparse_transformation(inner, choose_weights, first_masks, step)


def cubic_left(step: Int[Array, ""], begin: int, end: int) -> Float[Array, ""]:
    """The share that has not gone yet of all that will: from 1 down to 0 at `end`."""
    share = (step - begin).astype(jnp.float32) / (end - begin)
    return (1 - jnp.clip(share, 0, 1)) ** 3


def _pruned(mask, weight, left):
    groups = weight.groups
    more = jnp.round(left * (groups.width - groups.count)).astype(jnp.int32)
    size = jnp.where(mask, jnp.abs(weight.value), -1)
    return groups.largest(size, groups.count + more) & mask
