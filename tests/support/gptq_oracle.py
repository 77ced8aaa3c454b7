"""GPTQ in float64, column by column, as arXiv 2210.17323 writes it.

With the factor of the inverse Hessian and a rank-one update of all later columns after
each one, where the library has the factor of the Hessian itself and looks back.
"""

import dataclasses

import numpy as np

from capibara_eqx.arrays import Affine


@dataclasses.dataclass
class Result:
    """Steps from zero, `(out, in)`; steps and zero points of groups, `(out, groups)`.

    `errors` are those of the columns, in the order `order`, divided by the diagonal of
    the factor; `damped` is the Hessian that they are of.
    """

    steps: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    order: np.ndarray
    damped: np.ndarray


def grid(weight, spec: Affine):
    """Step and zero point of every row, of the smallest and the largest value."""
    half = 2 ** (spec.bits - 1)
    if spec.symmetric:
        largest = np.max(np.abs(weight), axis=1)
        scale = largest / (half - 1 if spec.is_narrow else half - 0.5)
        return np.where(scale > 0, scale, 1.0), np.zeros(len(weight))
    low = np.minimum(np.min(weight, axis=1), 0)
    high = np.maximum(np.max(weight, axis=1), 0)
    scale = (high - low) / (2 * half - 1)
    scale = np.where(scale > 0, scale, 1.0)
    return scale, np.clip(np.round(-low / scale), 0, 2 * half - 1)


def limits(spec: Affine) -> tuple[int, int]:
    half = 2 ** (spec.bits - 1)
    if not spec.symmetric:
        return 0, 2 * half - 1
    return (1 - half if spec.is_narrow else -half), half - 1


def nearest(column, scale, zero, spec: Affine):
    low, high = limits(spec)
    return np.clip(np.round(column / scale), low - zero, high - zero)


def damped_hessian(hessian, damping: float):
    used = np.diag(hessian) > 0
    mean = np.mean(np.diag(hessian)[used])
    damped = hessian + damping * mean * np.eye(len(hessian))
    # Any number will do: nothing else is in that row.
    damped[~used, ~used] = mean
    return damped


def column_order(hessian, group: int, act_order: bool, static_groups: bool):
    size = len(hessian)
    if not act_order:
        return np.arange(size)
    importance = np.diag(hessian)
    if static_groups or group >= size:
        return np.argsort(-importance, kind="stable")
    groups = [np.arange(size)[i : i + group] for i in range(0, size, group)]
    groups = [g[np.argsort(-importance[g], kind="stable")] for g in groups]
    groups.sort(key=lambda g: -importance[g[0]])
    return np.concatenate(groups)


def inverse_factor(damped):
    """Upper triangular, its transpose times itself the inverse."""
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(
    weight,
    hessian,
    spec: Affine,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
) -> Result:
    weight, size = np.array(weight, np.float64), weight.shape[1]
    hessian = np.array(hessian, np.float64)
    group = min(spec.group_size or size, size)
    weight[:, np.diag(hessian) == 0] = 0
    of_groups = [grid(weight[:, i : i + group], spec) for i in range(0, size, group)]
    order = column_order(hessian, group, act_order, static_groups)
    damped = damped_hessian(hessian, damping)
    factor = inverse_factor(damped[np.ix_(order, order)])
    current = weight[:, order].copy()
    steps, values = np.zeros_like(weight), np.zeros_like(weight)
    errors, reached = np.zeros_like(weight), set()
    for j, column in enumerate(order):
        g = column // group
        if not static_groups and g not in reached:
            members = [i for i, c in enumerate(order) if c // group == g]
            of_groups[g] = grid(current[:, members], spec)
            reached.add(g)
        scale, zero = of_groups[g]
        steps[:, column] = nearest(current[:, j], scale, zero, spec)
        values[:, column] = steps[:, column] * scale
        errors[:, j] = (current[:, j] - values[:, column]) / factor[j, j]
        current[:, j:] -= np.outer(errors[:, j], factor[j, j:])
    scale, zero = (np.stack(parts, axis=1) for parts in zip(*of_groups, strict=True))
    return Result(steps, scale, zero, values, errors, order, damped)


def problem(seed: int, out: int, size: int, tokens: int | None = None, dead=()):
    """A weight, and the second moments of inputs that go together."""
    rng = np.random.default_rng(seed)
    tokens = 3 * size if tokens is None else tokens
    mixing = rng.normal(size=(size, size)) + 2 * rng.normal(size=(1, size))
    inputs = rng.normal(size=(tokens, size)) @ mixing / size**0.5
    inputs = inputs * np.exp(rng.normal(size=size))
    inputs[:, list(dead)] = 0
    return rng.normal(size=(out, size)), inputs.T @ inputs
