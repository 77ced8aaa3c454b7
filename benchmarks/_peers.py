"""Scans, attention and the layer of other libraries, which run on PyTorch.

The scans take NumPy arrays `u, delta (B, L, D)`, `A (D, N)`, `B, C (B, L, N)`, `D
(D,)`. What a peer wants in another layout is laid out before the clock starts.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ._environment import cores
from ._harness import Absent, Prepared
from ._torch_memory import temp_bytes


Array = np.ndarray


def mambapy_pscan(inputs: Sequence[Array], dy: Array | None) -> Prepared:
    """mambapy's parallel scan with what its layer does around it.

    **Arguments:**

    - `inputs`: `u, delta, A, B, C, D`.
    - `dy`: the cotangent of `y`, if gradients are wanted.

    **Raises:**

    `Absent` if torch or mambapy is not installed.
    """
    torch = torch_module()
    return prepared(torch, _mambapy_scan(torch), inputs, dy, lambda array: array)


def torch_attention(inputs: Sequence[Array], dy: Array | None) -> Prepared:
    """PyTorch's causal attention.

    **Arguments:**

    - `inputs`: `q, k, v (B, L, heads, width)`.
    - `dy`: the cotangent of the result, if gradients are wanted.

    **Raises:**

    `Absent` if torch is not installed.
    """
    torch = torch_module()

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return prepared(torch, attend, inputs, dy, lambda array: np.swapaxes(array, 1, 2))


def transformers_scan(inputs: Sequence[Array], dy: Array | None) -> Prepared:
    """The scan that transformers' Mamba runs where no fused kernel is.

    **Arguments:**

    - `inputs`: `u, delta, A, B, C, D`.
    - `dy`: the cotangent of `y`, if gradients are wanted.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = torch_module()
    scan = _mamba_function("mamba_selective_scan")
    return prepared(torch, scan, inputs, dy, _tokens_last)


def transformers_hvp(
    inputs: Sequence[Array], dy: Array, direction: Sequence[Array]
) -> Prepared:
    """A Hessian-vector product through `transformers_scan`, reverse over reverse.

    **Arguments:**

    - `inputs`, `dy`: as of `transformers_scan`.
    - `direction`: what the Hessian of `sum(dy y)` is multiplied by, like `inputs`.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = torch_module()
    scan = _mamba_function("mamba_selective_scan")
    return _second_order(torch, scan, inputs, dy, direction, _tokens_last)


def mambapy_hvp(
    inputs: Sequence[Array], dy: Array, direction: Sequence[Array]
) -> Prepared:
    """The same through `mambapy_pscan`.

    **Raises:**

    `Absent` if torch or mambapy is not installed, or if its scan cannot be
    differentiated twice.
    """
    torch = torch_module()
    scan = _mambapy_scan(torch)
    try:
        return _second_order(torch, scan, inputs, dy, direction, lambda array: array)
    except RuntimeError as error:
        reason = str(error).split(":")[0]
        if "inplace operation" not in reason:
            raise
        raise Absent(f"it cannot be differentiated twice: {reason}") from None


def transformers_update(token: dict[str, Array]) -> Prepared:
    """The update by one token that transformers' Mamba decodes with.

    **Arguments:**

    - `token`: as `_inputs.token_inputs` gives it.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = torch_module()
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

    return Prepared(run, temp_bytes=temp_bytes(torch, run), outputs=outputs)


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
    torch = torch_module()
    if use_mambapy:
        peer_module("mambapy.pscan")
    mixer = _mixer(weights, use_mambapy=use_mambapy)

    def forward(*tensors):
        *parameters, x = tensors
        return torch.func.functional_call(mixer, _named(weights, parameters), (x,))

    inputs = [*(weights[name] for name in sorted(weights)), x]
    return prepared(torch, forward, inputs, dy, lambda array: array)


def transformers_step(weights: dict[str, Array], tokens: Array) -> Prepared:
    """One token through transformers' Mamba layer without its norm, with its cache.

    **Arguments:**

    - `weights`: by the names of the float64 reference.
    - `tokens`: `(B, L, d_model)`; the first is timed, all are judged.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such cache.
    """
    torch = torch_module()
    mixer = _mixer(weights, use_mambapy=False)
    parameters = [torch.from_numpy(weights[name].copy()) for name in sorted(weights)]
    mixer.load_state_dict(_named(weights, parameters))
    inputs = [torch.from_numpy(x[:, None].copy()) for x in tokens.swapaxes(0, 1)]
    cache_of = getattr(peer_module("transformers"), "DynamicCache", None)
    if cache_of is None:
        raise Absent("this version of transformers has no DynamicCache")

    name = cache_argument(mixer)

    def step(x, cache):
        with torch.no_grad():
            return mixer(x, **{name: cache})

    cache = cache_of(config=mixer.config)
    step(inputs[0], cache)

    def outputs(_):
        own = cache_of(config=mixer.config)
        return np.concatenate([step(x, own).numpy() for x in inputs], axis=1)

    def run():
        return step(inputs[0], cache)

    return Prepared(run, temp_bytes=temp_bytes(torch, run), outputs=outputs)


def cache_argument(mixer: Any) -> str:
    """By what name a layer of transformers takes its cache, which has changed."""
    names = inspect.signature(type(mixer).forward).parameters
    return "cache" if "cache" in names else "cache_params"


def _mixer(weights: dict[str, Array], *, use_mambapy: bool) -> Any:
    """A layer of the sizes of these weights, not yet with their values."""
    module = peer_module("transformers.models.mamba.modeling_mamba")
    d_inner, d_state = weights["A_log"].shape
    d_model = weights["in_proj"].shape[1]
    config = module.MambaConfig(
        hidden_size=d_model,
        expand=d_inner // d_model,
        state_size=d_state,
        conv_kernel=weights["conv"].shape[-1],
        time_step_rank=weights["dt_proj"].shape[1],
        num_hidden_layers=1,
        use_mambapy=use_mambapy,
    )
    return module.MambaMixer(config, layer_idx=0).eval()


def _named(weights: dict[str, Array], values: Sequence[Any]) -> dict[str, Any]:
    """`values`, one a weight in the order of their names, under the layer's names."""
    names = [_MIXER_NAMES[name] for name in sorted(weights)]
    return dict(zip(names, values, strict=True))


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


def _tokens_last(array: Array) -> Array:
    return np.swapaxes(array, 1, 2) if array.ndim == 3 else array


def _mambapy_scan(torch: Any) -> Callable[..., Any]:
    pscan = peer_module("mambapy.pscan").pscan

    def scan(u, delta, A, B, C, D):
        decay = torch.exp(delta.unsqueeze(-1) * A)
        entering = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        states = pscan(decay, entering)
        return (states @ C.unsqueeze(-1)).squeeze(3) + D * u

    return scan


def _second_order(
    torch: Any,
    scan: Callable[..., Any],
    inputs: Sequence[Array],
    dy: Array,
    direction: Sequence[Array],
    layout: Callable[[Array], Array],
) -> Prepared:
    def tensor(array):
        return torch.from_numpy(np.array(layout(array), order="C"))

    tensors = [tensor(array).requires_grad_() for array in inputs]
    cotangent, along = tensor(dy), [tensor(array) for array in direction]

    def run():
        y = scan(*tensors)
        first = torch.autograd.grad(y, tensors, cotangent, create_graph=True)
        return torch.autograd.grad(first, tensors, along)

    def outputs(result):
        return tuple(layout(x.numpy()) for x in result)

    return Prepared(run, temp_bytes=temp_bytes(torch, run), outputs=outputs)


def prepared(
    torch: Any,
    scan: Callable[..., Any],
    inputs: Sequence[Array],
    dy: Array | None,
    layout: Callable[[Array], Array] = lambda array: array,
) -> Prepared:
    """A function of tensors, ready to be timed, with its gradients if `dy` is given.

    **Arguments:**

    - `torch`: the module.
    - `scan`: takes the inputs as tensors.
    - `inputs`, `dy`: NumPy arrays.
    - `layout`: from the layout of NumPy's arrays to that of the tensors, and back.
    """

    def tensor(array):
        return torch.from_numpy(np.array(layout(array), order="C"))

    tensors = [tensor(array).requires_grad_(dy is not None) for array in inputs]
    if dy is None:

        def run():
            with torch.no_grad():
                return scan(*tensors)

        return Prepared(
            run,
            temp_bytes=temp_bytes(torch, run),
            outputs=lambda y: layout(y.numpy()),
        )
    cotangent = tensor(dy)

    def run_backward():
        y = scan(*tensors)
        return y.detach(), torch.autograd.grad(y, tensors, cotangent)

    def outputs(result):
        y, gradients = result
        return layout(y.numpy()), tuple(layout(g.numpy()) for g in gradients)

    return Prepared(
        run_backward, temp_bytes=temp_bytes(torch, run_backward), outputs=outputs
    )


def _mamba_function(name: str) -> Callable[..., Any]:
    module = peer_module("transformers.models.mamba.modeling_mamba")
    if not hasattr(module, name):
        raise Absent(f"this version of transformers has no {name}")
    return getattr(module, name)


def torch_module() -> Any:
    torch = peer_module("torch")
    torch.set_num_threads(cores())
    return torch


def peer_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(
            f"{error.name} is not installed: pip install 'capibara-eqx[peers]'"
        ) from None
