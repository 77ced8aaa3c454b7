from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._observe import observe
from ._rules import Rule
from ._tally import SecondMoments


class Hessians(eqx.Module):
    r"""Second moments of the inputs of weights, by path; see `collect_hessian`.

    - `matrices`: $\sum_t x_t x_t^T$, `(*stack, in, in)`, in float32 or wider, with the
        axes that the weight has in front.
    - `tokens`: how many inputs that is the sum of, `(*stack,)`.

    !!! example

        ```python
        stats = collect_hessian(model, forward, batches, [".*weight"])
        stats.matrices["head/weight"].shape            # (64, 64)
        print(stats)
        ```
    """

    matrices: dict[str, Float[Array, "*_ _in _in"]]
    tokens: dict[str, Int[Array, "*_"]]

    @property
    def unseen(self) -> tuple[str, ...]:
        """Paths of weights that no input reached, or not all that are stacked."""
        return unseen(self.tokens)

    def __str__(self) -> str:
        return "\n".join(["second moments of inputs", *lines(self.tokens)])


def collect_hessian(
    model: PyTree,
    forward: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    rules: Sequence[Rule] | Sequence[str],
) -> Hessians:
    r"""What the inputs of each weight have in common, for `gptq`.

    Of a weight that multiplies inputs $x_t$ the squared error of its outputs is
    $\mathrm{tr}(\Delta H \Delta^T)$ for any change $\Delta$, with

    $$H = \sum_t x_t x_t^T.$$

    The model runs as it is: where a chosen weight is multiplied, nothing is added to
    the numbers, but the gradient of an array of zeros is $H$. So `vmap`, `scan`, `jit`
    and `checkpoint` may stand around a layer, weights in a stack get a matrix each,
    and experts one of the tokens that chose them. The rest of a backward pass is not
    computed, but the model must be differentiable: what stands in front of
    `stop_gradient`, of rounding, or is not in the output at all, is not seen. Nor are
    convolutions, tables of embeddings where rows are looked up, and weights that a
    module of yours uses in other ways than `weight @ x`.

    **Arguments:**

    - `model`: any PyTree.
    - `forward`: `forward(model, batch)` runs the model on a batch; it returns the
        output, the loss, or any PyTree that depends on all that is to be seen. For
        `equinox.nn` layers that is often `jax.vmap(model)(batch)`.
    - `batches`: what `forward` takes, any number of it. Batches of one shape are
        compiled once.
    - `rules`: which weights, as for `gptq`; or patterns alone.

    **Returns:**

    `Hessians`.

    **Raises:**

    `ValueError` for no batches, a `forward` without floating point output, or a rule
    that matches nothing.

    !!! example

        ```python
        rules = [Rule(r".*embedding.*", None), Rule(r".*weight", Affine(4))]
        stats = collect_hessian(model, lambda model, x: model(x), batches, rules)
        stats.unseen                                   # () if all are used
        ```
    """

    def zeros(stack, size, dtype):
        return SecondMoments(jnp.zeros(stack), jnp.zeros((*stack, size, size), dtype))

    found, hidden = observe("collect_hessian", model, forward, batches, rules, zeros)
    matrices = {path: tally.matrix for path, tally in found.items()}
    return Hessians(matrices, token_counts(found, hidden))


def token_counts(
    found: Mapping[str, Any], hidden: Mapping[str, tuple[int, ...]]
) -> dict[str, Int[Array, "*_"]]:
    """Of what was seen, and of what cannot be, which is none."""
    none = {path: jnp.zeros(stack, jnp.int32) for path, stack in hidden.items()}
    counts = {p: jnp.round(t.tokens).astype(jnp.int32) for p, t in found.items()}
    return counts | none


def unseen(tokens: Mapping[str, Int[Array, "*_"]]) -> tuple[str, ...]:
    return tuple(path for path, count in tokens.items() if not jnp.all(count > 0))


def lines(tokens: Mapping[str, Int[Array, "*_"]]) -> list[str]:
    """How many tokens reached each weight, in words."""
    width = max(map(len, tokens), default=0)
    missing = unseen(tokens)
    found = []
    for path, count in tokens.items():
        number = f"{int(jnp.min(count)):,}"
        if count.ndim and jnp.min(count) != jnp.max(count):
            number += f" to {int(jnp.max(count)):,}"
        words = "  NOT SEEN" if path in missing else ""
        found.append(f"  {path.ljust(width)}  {number} tokens{words}")
    return found
