"""The selective scan and the layer of other libraries, which run on PyTorch.

The scans take NumPy arrays `u, delta (B, L, D)`, `A (D, N)`, `B, C (B, L, N)`, `D
(D,)`. What a peer wants in another layout is laid out before the clock starts.
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
    scan = _mamba_function("mamba_selective_scan")

    def tokens_last(array):
        return np.swapaxes(array, 1, 2) if array.ndim == 3 else array

    return _prepared(torch, scan, inputs, dy, tokens_last)


def transformers_update(token: dict[str, Array]) -> Prepared:
    """The update by one token that transformers' Mamba decodes with.

    **Arguments:**

    - `token`: as `_inputs.token_inputs` gives it.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = _torch()
    update = _mamba_function("mamba_selective_state_update")
    first = ("initial_state", "u", "delta", "A", "B", "C", "D")
    tensors = {name: torch.from_numpy(x.copy()) for name, x in token.items()}
    state, *others = (tensors[name] for name in first)
    options = {"z": tensors["z"], "dt_bias": tensors["delta_bias"], "dt_softplus": True}

    def run():
        with torch.no_grad():
            return update(state, *others, **options)

    def outputs(_):
        # The update is in place, and calls before this one have moved the state on.
        own = torch.from_numpy(token["initial_state"].copy())
        return update(own, *others, **options).numpy(), own.numpy()

    return Prepared(run, outputs=outputs)


def transformers_mixer(
    weights: dict[str, Array],
    x: Array,
    dy: Array | None,
    *,
    use_mambapy: bool = False,
) -> Prepared:
    """transformers' Mamba layer without its norm.

    **Arguments:**

    - `weights`: by the names of the float64 reference.
    - `x`: the layer's input.
    - `dy`: the cotangent of its output, if gradients are wanted: in the weights in the
        order of their names, then in `x`.
    - `use_mambapy`: whether it scans by mambapy's `pscan`.

    **Raises:**

    `Absent` if torch, transformers or mambapy is not installed.
    """
    torch = _torch()
    if use_mambapy:
        _module("mambapy.pscan")
    module = _module("transformers.models.mamba.modeling_mamba")
    (d_inner, d_state), d_model = weights["A_log"].shape, x.shape[-1]
    config = module.MambaConfig(
        hidden_size=d_model,
        expand=d_inner // d_model,
        state_size=d_state,
        conv_kernel=weights["conv"].shape[-1],
        time_step_rank=weights["dt_proj"].shape[1],
        num_hidden_layers=1,
        use_mambapy=use_mambapy,
    )
    mixer = module.MambaMixer(config, layer_idx=0).eval()
    names = [_MIXER_NAMES[name] for name in sorted(weights)]

    def forward(*tensors):
        *parameters, x = tensors
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(mixer, values, (x,))

    inputs = [*(weights[name] for name in sorted(weights)), x]
    return _prepared(torch, forward, inputs, dy, lambda array: array)


_MIXER_NAMES = {
    "in_proj": "in_proj.weight",
    "conv": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj": "x_proj.weight",
    "dt_proj": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj": "out_proj.weight",
}


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


def _mamba_function(name: str) -> Callable[..., Any]:
    module = _module("transformers.models.mamba.modeling_mamba")
    if not hasattr(module, name):
        raise Absent(f"this version of transformers has no {name}")
    return getattr(module, name)


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
