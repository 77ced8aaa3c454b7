"""Which leaves of a model an inner or outer loop changes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import PyTree


def only(model: PyTree, part: Callable[[Any], Any]) -> PyTree:
    """A filter that chooses a part of a model, for `where`.

    **Arguments:**

    - `model`: any PyTree.
    - `part`: the part, or a sequence of parts, as for `equinox.tree_at`.

    **Returns:**

    A PyTree of booleans like `model`, true for the floating point arrays of the part.

    **Raises:**

    `ValueError` if there are none.

    !!! example

        ```python
        head = only(model, lambda model: model.head)        # ANIL
        model = adapt(loss, model, support, optimizer=sgd(0.1), steps=5, where=head)
        ```
    """
    nothing = jax.tree.map(lambda _: False, model)
    chosen = eqx.tree_at(
        part,
        nothing,
        replace_fn=lambda node: jax.tree.map(lambda _: True, node),
    )
    mask = jax.tree.map(
        lambda leaf, choice: choice and eqx.is_inexact_array(leaf), model, chosen
    )
    split("only", model, mask, argument="part")
    return mask


def split(
    function: str, model: PyTree, where: PyTree, *, argument: str = "where"
) -> tuple[PyTree, PyTree]:
    """What `where` chooses of the floating point arrays of `model`, and the rest.

    `ValueError` if that is nothing; the message names what could be chosen.
    """
    guarded = jax.tree.map(
        lambda choose: (
            _guarded(function, argument, choose) if callable(choose) else choose
        ),
        where,
    )
    try:
        chosen, _ = eqx.partition(model, guarded)
    except ValueError as error:
        if isinstance(error, _ChoiceError):
            raise
        raise ValueError(
            f"{function}: `{argument}` must be a function of a leaf, or a PyTree of "
            "booleans that begins like the model, and is neither. Make it with "
            "`meta.only(model, lambda model: model.head)`."
        ) from error
    params = eqx.filter(chosen, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        floats = [
            jtu.keystr(path, simple=True, separator="/")
            for path, leaf in jtu.tree_leaves_with_path(model)
            if eqx.is_inexact_array(leaf)
        ]
        raise ValueError(
            f"{function}: `{argument}` must choose at least one floating point array, "
            f"it chooses none. The model has {_listed(floats)}."
        )
    rest = jax.tree.map(
        lambda leaf, param: leaf if param is None else None,
        model,
        params,
        is_leaf=lambda node: node is None,
    )
    return params, rest


class _ChoiceError(ValueError):
    """A `where` that failed on a leaf."""


def _guarded(
    function: str, argument: str, choose: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """`choose`, asked about nothing but floating point arrays."""

    def guarded(leaf):
        if not eqx.is_inexact_array(leaf):
            return False
        try:
            return choose(leaf)
        except (AttributeError, TypeError) as error:
            raise _ChoiceError(
                f"{function}: `{argument}` is called with every floating point array "
                f"of the model, and failed on one of shape {leaf.shape}: {error}. A "
                "part of the model is chosen by `meta.only(model, lambda model: "
                "model.head)`."
            ) from error

    return guarded


_SHOWN = 12


def _listed(paths: list[str]) -> str:
    if not paths:
        return "none"
    more = len(paths) - _SHOWN
    return ", ".join(paths[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
