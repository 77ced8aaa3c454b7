from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..internal import check_choice, check_flag, check_range, check_size
from ._selection import split


class SGDState(NamedTuple):
    """How many steps `sgd` has made."""

    count: Int[Array, ""]


def sgd(
    rates: float | PyTree[Float[Array, "..."]], *, per_step: bool = False
) -> optax.GradientTransformation:
    r"""Gradient descent whose rates can be learned.

    $$\theta \leftarrow \theta - \alpha \odot \nabla L$$

    Outer gradients reach the rates: one for all (Finn et al., arXiv 1703.03400), one a
    weight (Meta-SGD: Li et al., arXiv 1707.09835), or one a layer and step (MAML++:
    Antoniou et al., arXiv 1810.09502).

    **Arguments:**

    - `rates`: a number, or a PyTree like the parameters that are optimised, each leaf
        of a shape that broadcasts to that of its parameter; see `rates_like`.
    - `per_step`: whether every leaf has a leading axis of steps, so that a single
        array is `(steps,)`. Steps beyond its end take the last rate.

    **Returns:**

    An `optax.GradientTransformation`.

    **Raises:**

    `ValueError` for `rates` that are no numbers, and from `init` if they do not fit the
    parameters; the message names the leaves.

    !!! example

        ```python
        adapt(loss, model, support, optimizer=sgd(0.1), steps=5)
        rates = rates_like(model, 0.1, steps=5)
        adapt(loss, model, support, optimizer=sgd(rates, per_step=True), steps=5)
        ```
    """
    check_flag("per_step", per_step)
    rates = jtu.tree_map_with_path(_as_rate, rates)

    def init(params):
        _check(rates, params, per_step)
        return SGDState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params

        def scaled(rate, gradient):
            if per_step:
                rate = rate[jnp.minimum(state.count, rate.shape[0] - 1)]
            return -jnp.broadcast_to(rate.astype(gradient.dtype), gradient.shape) * (
                gradient
            )

        if _is_single(rates):
            updates = jax.tree.map(lambda gradient: scaled(rates, gradient), updates)
        else:
            updates = jax.tree.map(scaled, rates, updates)
        return updates, SGDState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def rates_like(
    model: PyTree,
    rate: float,
    *,
    where: PyTree = eqx.is_inexact_array,
    per: str = "leaf",
    steps: int | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Equal rates for every parameter that adapts, to be learned.

    **Arguments:**

    - `model`: as `adapt` gets it.
    - `rate`: what all begin with.
    - `where`: as `adapt` gets it.
    - `per`: `"leaf"`, one for an array of parameters, or `"element"`, one for each
        parameter.
    - `steps`: length of a leading axis of steps; none if not given.

    **Returns:**

    A PyTree like `model`, of rates where a leaf adapts and `None` elsewhere.

    **Raises:**

    `ValueError` for a `rate` that is no number, a `where` that chooses nothing, an
    unknown `per` or `steps` that are not positive.

    !!! example

        ```python
        rates = rates_like(model, 0.1, per="element")           # Meta-SGD
        rates = rates_like(model, 0.1, per="leaf", steps=5)     # MAML++
        ```
    """
    check_range("rate", rate)
    check_choice("per", per, ("leaf", "element"))
    if steps is not None:
        check_size("steps", steps)
    axis = () if steps is None else (steps,)
    params, _ = split("rates_like", model, where)

    def rates(param):
        real = jnp.finfo(param.dtype).dtype
        return jnp.full(axis + (param.shape if per == "element" else ()), rate, real)

    return jax.tree.map(rates, params)


def _as_rate(path, rate: Any) -> Array:
    number = isinstance(rate, float | int) and not isinstance(rate, bool)
    if number or jnp.issubdtype(getattr(rate, "dtype", bool), jnp.floating):
        return jnp.asarray(rate)
    raise ValueError(
        f"sgd: `rates`{_at(_name(path))} must be a number or an array of floating "
        f"point, got {_described(rate)}. For rates that differ from step to step pass "
        "an array of them and per_step=True."
    )


def _described(rate: Any) -> str:
    if callable(rate):
        return "a function"
    return f"an array of {rate.dtype}" if eqx.is_array(rate) else repr(rate)


def _is_single(rates: PyTree) -> bool:
    return eqx.is_array(rates)


def _check(rates: PyTree, params: PyTree, per_step: bool) -> None:
    found = {_name(path): leaf for path, leaf in jtu.tree_leaves_with_path(rates)}
    wanted = {_name(path): leaf for path, leaf in jtu.tree_leaves_with_path(params)}
    if not _is_single(rates):
        _check_paths(found, wanted)
    lengths = {path: rate.shape[0] for path, rate in found.items() if rate.ndim}
    if per_step and len(set(lengths.values())) > 1:
        raise ValueError(
            "sgd: with per_step=True the leaves of `rates` must have a leading axis of "
            f"as many steps each, got {lengths}. Make them with `meta.rates_like(..., "
            "steps=5)`, or pass per_step=False for rates that stay the same."
        )
    for path, rate in found.items():
        shape = rate.shape
        if per_step and (rate.ndim == 0 or shape[0] == 0):
            raise ValueError(
                f"sgd: `rates`{_at(path)} must have a leading axis of one or more "
                f"steps, got shape {shape}. Pass per_step=False for rates that stay "
                "the same."
            )
        kept = shape[1:] if per_step else shape
        for name in wanted if _is_single(rates) else [path]:
            if not _broadcasts(kept, wanted[name].shape):
                hint = (
                    ""
                    if per_step
                    else " If its first axis is of steps, pass per_step=True."
                )
                raise ValueError(
                    f"sgd: `rates`{_at(path)} must broadcast to the parameter "
                    f"{name!r} of shape {wanted[name].shape}, got shape {kept}"
                    f"{' after the axis of steps' if per_step else ''}.{hint}"
                )
    # Last: sizes of layers are part of the nodes, and shapes say more.
    if not _is_single(rates) and jax.tree.structure(rates) != jax.tree.structure(
        params
    ):
        raise ValueError(
            "sgd: `rates` must be a PyTree like the parameters that adapt; the leaves "
            "have the same names, the nodes around them are others. Make them of this "
            "model, with `meta.rates_like`."
        )


def _check_paths(found: dict, wanted: dict) -> None:
    missing = [path for path in wanted if path not in found]
    extra = [path for path in found if path not in wanted]
    if missing or extra:
        parts = [
            f"{what} {', '.join(repr(path) for path in paths)}"
            for what, paths in (("no rate for", missing), ("a rate for", extra))
            if paths
        ]
        raise ValueError(
            "sgd: `rates` must have a leaf for every parameter that adapts and no "
            f"other; there is {' and '.join(parts)}. Make them with "
            "`meta.rates_like`, with the `where` that `adapt` gets."
        )


def _name(path) -> str:
    return jtu.keystr(path, simple=True, separator="/")


def _at(path: str) -> str:
    return f" of {path!r}" if path else ""


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    if len(shape) > len(to):
        return False
    ends = to[len(to) - len(shape) :]
    return all(size in (1, end) for size, end in zip(shape, ends, strict=True))
