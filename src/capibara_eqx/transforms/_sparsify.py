from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._places import Place, places, replace
from ._quantize import require_finite
from ._report import Entry, Report, quality, report
from ._rules import Rule, choose
from ._unstructured import Groups


def sparsify(
    model: PyTree, rules: Sequence[Rule], scores: PyTree | None = None
) -> tuple[PyTree, Report]:
    r"""The model with zeros in some of its weights.

    $$w_i \leftarrow w_i \cdot [\,s_i \text{ is among the highest of its group}\,]$$

    with $s = |w|$ if no scores are given; of equal scores the first stays. A group is
    a matrix for `Unstructured`, `m` neighbours along the input for `NM`; axes in
    front of a matrix, of layers or experts in a stack, are kept, so that each of them
    gets its share. Weights stay plain arrays of the same shape, ready for training
    with `rigl` and its kin. For an `NM`, `quantize` with the same rules keeps only
    what is not zero.

    Scores of Sun et al., *A Simple and Effective Pruning Approach for Large Language
    Models* (Wanda), arXiv 2306.11695, are $|w_{ij}|\, \lVert x_j \rVert$, see the
    example; random ones start the training of a sparse network from scratch.

    **Arguments:**

    - `model`: any PyTree.
    - `rules`: which weight keeps what, an `Unstructured`, an `NM` or `None`. The first
        that matches counts.
    - `scores`: what stays, by size: a PyTree with an array of the same shape at the
        path of each of those weights.

    **Returns:**

    `(model, report)`: bytes in the report are those of the arrays, zeros included.

    **Raises:**

    `ValueError` for a rule that matches nothing or that earlier rules leave nothing,
    a weight that is no plain array, is not finite, or whose inputs `m` does not
    divide, or scores that do not fit.

    !!! example

        ```python
        rules = [Rule(r".*weight", NM(2, 4))]
        sparse, _ = sparsify(linear, rules)
        small, found = quantize(sparse, rules)
        norms = jnp.linalg.norm(x, axis=0)             # of the inputs, for Wanda
        wanda = eqx.tree_at(
            lambda m: m.weight, linear, jnp.abs(linear.weight) * norms[None]
        )
        sparse, _ = sparsify(linear, rules, wanda)
        ```
    """
    found = places(model)
    weights = [place for place in found if place.is_matrix]
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose("sparsify", rules, [place.path for place in weights], others)
    given = None if scores is None else {p.path: p.value for p in places(scores)}
    new, entries = {}, {}
    for place in weights:
        rule = chosen.get(place.path)
        if rule is None or rule.spec is None:
            continue
        groups = Groups.of("sparsify", place, rule.spec)
        weight = require_finite("sparsify", place)
        score = jnp.abs(weight) if given is None else _score(place, given)
        sparse = jnp.where(groups.largest(score), weight, jnp.zeros_like(weight))
        new[place.keys] = sparse
        density, sqnr = quality(sparse, place.value)
        entries[place.path] = Entry(
            path=place.path,
            scheme=str(rule.spec),
            shape=sparse.shape,
            nbytes=sparse.nbytes,
            original_bytes=sparse.nbytes,
            density=density,
            sqnr=sqnr,
        )
    model = replace(model, new)
    whole = report(model)
    left = tuple(row for row in whole.left_alone if row[0] not in entries)
    return model, Report((*entries.values(), *whole.entries), left)


def _score(place: Place, given: dict[str, Array]) -> Array:
    score = given.get(place.path)
    if score is None or score.shape != place.value.shape:
        found = "nothing" if score is None else f"shape {score.shape}"
        raise ValueError(
            f"sparsify: `scores` must have an array of shape {place.value.shape} at "
            f"{place.path!r}, it has {found}. Make them of the model itself, as with "
            "`jax.tree.map`."
        )
    return score
