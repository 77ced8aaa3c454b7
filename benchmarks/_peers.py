"""The selective scan of other libraries, which run on PyTorch.

All take NumPy arrays `u, delta (B, L, D)`, `A (D, N)`, `B, C (B, L, N)`, `D (D,)`. What
a peer wants in another layout is laid out before the clock starts.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ._environment import cores
from ._harness import Absent, Prepared


Array = np.ndarray


def mambapy_pscan(inputs: Sequence[Array], dy: Array | None) -> Prepared:
    """mambapy's parallel scan with what its layer does around it.

    **Arguments:**

    - `inputs`: `u, delta, A, B, C, D`.
    - `dy`: the cotangent of `y`, if gradients are wanted.

    **Raises:**

    `Absent` if torch or mambapy is not installed.
    """
    torch = _torch()
    pscan = _module("mambapy.pscan").pscan

    def scan(u, delta, A, B, C, D):
        decay = torch.exp(delta.unsqueeze(-1) * A)
        entering = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        states = pscan(decay, entering)
        return (states @ C.unsqueeze(-1)).squeeze(3) + D * u

    return _prepared(torch, scan, inputs, dy, lambda array: array)


def transformers_scan(inputs: Sequence[Array], dy: Array | None) -> Prepared:
    """The scan that transformers' Mamba runs where no fused kernel is.

    **Arguments:**

    - `inputs`: `u, delta, A, B, C, D`.
    - `dy`: the cotangent of `y`, if gradients are wanted.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = _torch()
    module = _module("transformers.models.mamba.modeling_mamba")
    if not hasattr(module, "mamba_selective_scan"):
        raise Absent("this version of transformers has no mamba_selective_scan")

    def tokens_last(array):
        return np.swapaxes(array, 1, 2) if array.ndim == 3 else array

    return _prepared(torch, module.mamba_selective_scan, inputs, dy, tokens_last)


def _prepared(
    torch: Any,
    scan: Callable[..., Any],
    inputs: Sequence[Array],
    dy: Array | None,
    layout: Callable[[Array], Array],
) -> Prepared:
    def tensor(array):
        return torch.from_numpy(np.array(layout(array), order="C"))

    tensors = [tensor(array).requires_grad_(dy is not None) for array in inputs]
    if dy is None:

        def run():
            with torch.no_grad():
                return scan(*tensors)

        return Prepared(run, outputs=lambda y: layout(y.numpy()))
    cotangent = tensor(dy)

    def run_backward():
        y = scan(*tensors)
        return y.detach(), torch.autograd.grad(y, tensors, cotangent)

    def outputs(result):
        y, gradients = result
        return layout(y.numpy()), tuple(layout(g.numpy()) for g in gradients)

    return Prepared(run_backward, outputs=outputs)


def _torch() -> Any:
    torch = _module("torch")
    torch.set_num_threads(cores())
    return torch


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(
            f"{error.name} is not installed: pip install 'capibara-eqx[peers]'"
        ) from None
