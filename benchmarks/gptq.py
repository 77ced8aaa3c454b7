"""GPTQ of one matrix of 1024 by 1024, whose inputs are correlated, to four bits.

`gptq` is the library's, from the weight and the Hessian to packed codes. `torch_gptq`
is the paper's algorithm (arXiv 2210.17323) on PyTorch, written for this file: the
factor of the inverse, blocks of 128 columns, a rank-one update of the block after each
column and a product of matrices after each block. Errors are those of the loss, the
squared error of the outputs, in units of the loss that a loop in float64 comes to:
where a value lies between two codes, the last digit decides, and then all later
columns.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from capibara_eqx.transforms import Affine, Hessians, Rule, gptq

from ._environment import cores
from ._harness import Contender, Prepared, Settings, compiled, entries, race
from ._peers import torch_module
from ._records import Measurement


OPERATION = "gptq"

_BITS = 4
_BLOCK = 128
_DAMPING = 0.01
# Of four bits in a full range.
_LIMITS = (-8, 7)
_LARGEST = 7.5


class Spec(NamedTuple):
    """A weight, and how many of its columns share a step; `None` for all."""

    name: str
    out_features: int
    in_features: int
    group_size: int | None = None


SPECS = (
    Spec("square_1024", 1024, 1024),
    Spec("square_1024_g128", 1024, 1024, 128),
)
_QUICK = (Spec("tiny", 12, 40), Spec("tiny_groups", 12, 40, 8))


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation and shape."""
    for spec in _QUICK if settings.quick else SPECS:
        weight, hessian = _inputs(spec)
        contenders = [
            Contender("gptq", partial(_ours, weight, hessian, spec)),
            Contender("torch_gptq", partial(_torch, weight, hessian, spec)),
        ]
        reference = partial(_expected, weight, hessian, spec)
        runners = entries(spec._asdict(), contenders, reference)
        yield from race(settings, OPERATION, "forward", runners)


def _inputs(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the second moments of 4 tokens an input, of a falling spectrum."""
    rng = np.random.default_rng(0)
    size = spec.in_features
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    spectrum = np.arange(1, size + 1) ** -0.5
    tokens = rng.normal(size=(4 * size, size)) * spectrum @ basis
    weight = rng.normal(size=(spec.out_features, size)) / size**0.5
    return weight.astype(np.float32), (tokens.T @ tokens).astype(np.float32)


def _ours(weight: np.ndarray, hessian: np.ndarray, spec: Spec) -> Prepared:
    rules = [Rule("weight", Affine(_BITS, group_size=spec.group_size))]

    def run(weight, hessian):
        tokens = jnp.asarray(4 * spec.in_features, jnp.int32)
        stats = Hessians({"weight": hessian}, {"weight": tokens})
        return gptq({"weight": weight}, stats, rules, block_size=_BLOCK)[0]["weight"]

    prepared = compiled(run, jnp.asarray(weight), jnp.asarray(hessian))
    outputs = lambda node: _loss(weight, hessian, np.asarray(node.dense()))
    return Prepared(prepared.run, prepared.compile_ms, prepared.temp_bytes, outputs)


def _torch(weight: np.ndarray, hessian: np.ndarray, spec: Spec) -> Prepared:
    torch = torch_module()
    arrays = [torch.from_numpy(x.copy()) for x in (weight, hessian)]

    def run():
        torch.set_num_threads(cores())
        with torch.no_grad():
            return _torch_gptq(torch, *arrays, spec.group_size or spec.in_features)

    return Prepared(run, outputs=lambda q: _loss(weight, hessian, q.numpy()))


def _torch_gptq(torch: Any, weight: Any, hessian: Any, group: int) -> Any:
    weight, rounded = weight.clone(), torch.empty_like(weight)
    size = weight.shape[1]
    damp = _DAMPING * torch.mean(torch.diagonal(hessian))
    damped = hessian + damp * torch.eye(size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = torch.ones(weight.shape[0])
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        block = weight[:, start:end].clone()
        errors = torch.zeros_like(block)
        own = factor[start:end, start:end]
        for j in range(end - start):
            if (start + j) % group == 0:
                members = block[:, j : j + group]
                if group > _BLOCK:
                    members = weight[:, start : start + group]
                scale = torch.amax(torch.abs(members), dim=1) / _LARGEST
            column = block[:, j]
            nearest = scale * torch.clamp(torch.round(column / scale), *_LIMITS)
            error = (column - nearest) / own[j, j]
            block[:, j:] -= torch.outer(error, own[j, j:])
            rounded[:, start + j] = nearest
            errors[:, j] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return rounded


def _expected(weight: np.ndarray, hessian: np.ndarray, spec: Spec) -> np.ndarray:
    """The loss of a loop over columns in float64."""
    current, exact = weight.astype(np.float64), hessian.astype(np.float64)
    group = spec.group_size or spec.in_features
    damped = exact + _DAMPING * np.mean(np.diag(exact)) * np.eye(len(exact))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded, scale = np.empty_like(current), np.ones(len(current))
    for j in range(spec.in_features):
        if j % group == 0:
            scale = np.max(np.abs(current[:, j : j + group]), axis=1) / _LARGEST
        rounded[:, j] = scale * np.clip(np.round(current[:, j] / scale), *_LIMITS)
        error = (current[:, j] - rounded[:, j]) / factor[j, j]
        current[:, j:] -= np.outer(error, factor[j, j:])
    return _loss(weight, hessian, rounded)


def _loss(weight: np.ndarray, hessian: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    change = weight.astype(np.float64) - rounded
    return np.sum((change @ hessian.astype(np.float64)) * change)
