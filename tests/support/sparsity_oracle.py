"""Sparsity as loops in float64: groups, RigL, ERK, one number after the other."""

import math
from collections.abc import Mapping

import numpy as np


Array = np.ndarray


def largest(scores, count: int) -> set[int]:
    """Places of the `count` highest scores; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return set(order[:count])


def nm_mask(weight: Array, n: int, m: int) -> Array:
    """The `n` of largest size in every `m` along the last axis."""
    flat = np.asarray(weight, np.float64).reshape(-1, m)
    mask = np.zeros(flat.shape, bool)
    for row, group in enumerate(np.abs(flat)):
        mask[row, list(largest(group, n))] = True
    return mask.reshape(np.shape(weight))


def share_mask(scores: Array, count: int) -> Array:
    """The `count` highest of every matrix, the last two axes."""
    mask = np.zeros(scores.shape, bool)
    for stack in np.ndindex(scores.shape[:-2]):
        flat = np.zeros(scores[stack].size, bool)
        flat[list(largest(np.ravel(scores[stack]), count))] = True
        mask[stack] = flat.reshape(scores[stack].shape)
    return mask


def moved(
    mask: Array, weight: Array, growth: Array, share: float, width: int
) -> tuple[Array, Array, Array]:
    """One change of places in a matrix, by groups of `width` in order.

    Returns the new mask, what stayed of the old one, and what grew.
    """
    flat, size = np.ravel(mask), np.abs(np.ravel(weight))
    ones = [i for i in range(flat.size) if flat[i]]
    leaving = math.floor(share * len(ones))
    ranked = sorted(ones, key=lambda i: (-size[i], i))
    stay = set(ranked[: len(ones) - leaving])
    grown = set()
    for start in range(0, flat.size, width):
        group = range(start, start + width)
        lost = sum(1 for i in group if flat[i] and i not in stay)
        free = [i for i in group if i not in stay]
        free.sort(key=lambda i: (-abs(np.ravel(growth)[i]), i))
        grown |= set(free[:lost])

    def places(found):
        out = np.zeros(flat.size, bool)
        out[list(found)] = True
        return out.reshape(mask.shape)

    return places(stay | grown), places(stay), places(grown)


def cosine_share(step: int, alpha: float, t_end: int) -> float:
    return alpha / 2 * (1 + math.cos(math.pi * step / t_end))


class Rigl:
    """RigL around Adam or SGD with momentum, step by step, for one matrix."""

    def __init__(self, weight, mask, width, settings: Mapping[str, float]):
        self.weight = np.where(mask, np.asarray(weight, np.float64), 0)
        self.mask = mask
        self.width = width
        self.settings = settings
        self.mu = np.zeros(weight.shape)
        self.nu = np.zeros(weight.shape)
        self.step = 0
        self.moves = 0  # updates of the weights, which Adam counts

    def update(self, gradient: Array) -> None:
        own = self.settings
        self.step += 1
        if self.step % own["delta_t"] == 0 and self.step < own["t_end"]:
            share = cosine_share(self.step, own["alpha"], int(own["t_end"]))
            before = self.mask
            self.mask, _, _ = moved(before, self.weight, gradient, share, self.width)
            new = self.mask & ~before
            for values in (self.mu, self.nu):
                values[new] = 0
            self.weight = np.where(self.mask & ~new, self.weight, 0)
            return
        self.moves += 1
        g = np.where(self.mask, gradient, 0)
        self.mu = own["b1"] * self.mu + (1 - own["b1"]) * g
        self.nu = own["b2"] * self.nu + (1 - own["b2"]) * g * g
        mean = self.mu / (1 - own["b1"] ** self.moves)
        square = self.nu / (1 - own["b2"] ** self.moves)
        change = -own["rate"] * mean / (np.sqrt(square) + own["eps"])
        self.weight = np.where(self.mask, self.weight + change, 0)


def erk(kernels: list[tuple[int, ...]], density: float) -> list[float]:
    """Densities by bisection for the factor: an independent way to the same rule."""
    raw = [sum(kernel) / math.prod(kernel) for kernel in kernels]
    sizes = [math.prod(kernel) for kernel in kernels]
    low, high = 0.0, 1 / min(raw)
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1, middle * r) * s for r, s in zip(raw, sizes, strict=True))
        low, high = (middle, high) if kept < density * sum(sizes) else (low, middle)
    return [min(1.0, low * r) for r in raw]


def pruned_count(step: int, begin: int, end: int, size: int, left: int) -> int:
    """What stays of `size` values at a step of the schedule of Zhu and Gupta."""
    share = (step - begin) / (end - begin)
    return left + round((size - left) * (1 - share) ** 3)
