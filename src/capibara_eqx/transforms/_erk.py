import math
import re
from collections.abc import Sequence

from jaxtyping import PyTree

from ._places import Place, places
from ._rules import Rule, choose
from ._unstructured import Unstructured, matrix_axes


def erk_rules(model: PyTree, rules: Sequence[Rule]) -> list[Rule]:
    r"""Rules that share a density out over layers: more to those of few parameters.

    A layer with kernel of sizes $d_1, d_2, \dots$ gets

    $$\rho_l = \min\left(1,\ \varepsilon\,
    \frac{\sum_i d_i}{\prod_i d_i}\right)$$

    with the $\varepsilon$ that leaves the share of the rule over all weights that it
    matches: the Erdős-Rényi-Kernel of Evci et al., *Rigging the Lottery*, arXiv
    1911.11134, after Mocanu et al., arXiv 1707.04780.

    **Arguments:**

    - `model`: any PyTree.
    - `rules`: each `Unstructured` is shared out over what its rule matches first;
        other rules stay.

    **Returns:**

    A rule for each of those weights, where the rule stood.

    **Raises:**

    `ValueError` for a rule that matches nothing or that earlier rules leave nothing.

    !!! example

        ```python
        rules = erk_rules(model, [Rule(r".*weight", Unstructured(0.1))])
        model, _ = sparsify(model, rules)
        ```
    """
    found = places(model)
    weights = {place.path: place for place in found if place.is_matrix}
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose("erk_rules", rules, weights, others)
    shared = []
    for rule in rules:
        if not isinstance(rule.spec, Unstructured):
            shared.append(rule)
            continue
        own = [weights[path] for path, first in chosen.items() if first is rule]
        densities = _densities(own, rule.spec.density)
        shared += [
            Rule(re.escape(place.path), Unstructured(density))
            for place, density in zip(own, densities, strict=True)
        ]
    return shared


def _densities(weights: Sequence[Place], density: float) -> list[float]:
    sizes = [place.value.size for place in weights]
    kernels = [place.value.shape[-matrix_axes(place) :] for place in weights]
    raw = [sum(kernel) / math.prod(kernel) for kernel in kernels]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(weights)) if i not in dense]
        wanted = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = wanted / sum(raw[i] * sizes[i] for i in rest) if rest else 0
        over = {i for i in rest if epsilon * raw[i] > 1}
        if not over:
            break
        dense |= over
    return [1.0 if i in dense else epsilon * raw[i] for i in range(len(weights))]
