"""Mamba-2 of transformers, which runs on PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._harness import Absent, Prepared
from ._peers import cache_argument, peer_module, prepared, torch_module
from ._torch_memory import temp_bytes


Array = np.ndarray


def transformers_ssd(
    inputs: Sequence[Array], dy: Array | None, chunk_size: int
) -> Prepared:
    """The scan that transformers' Mamba-2 runs where no fused kernel is.

    **Arguments:**

    - `inputs`: `x, dt, A, B, C` as `_ssd_oracle.ssd` takes them.
    - `dy`: the cotangent of `y`, if gradients are wanted.
    - `chunk_size`: 256 is its default.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such function.
    """
    torch = torch_module()
    scan = getattr(_modeling(), "mamba2_chunk_scan", None)
    if scan is None:
        raise Absent("this version of transformers has no mamba2_chunk_scan")

    def run(*tensors):
        return scan(*tensors, chunk_size=chunk_size)

    return prepared(torch, run, inputs, dy)


def transformers_step(weights: dict[str, Array], tokens: Array) -> Prepared:
    """One token through transformers' Mamba-2 layer and its cache.

    The layer is measured without the norm of its block.

    **Arguments:**

    - `weights`: by the names of the float64 reference.
    - `tokens`: `(B, L, d_model)`; the first is timed, all are judged.

    **Raises:**

    `Absent` if torch or transformers is not installed, or has no such cache.
    """
    torch = torch_module()
    mixer, config = _mixer(torch, weights)
    inputs = [torch.from_numpy(x[:, None].copy()) for x in tokens.swapaxes(0, 1)]
    cache_of = getattr(peer_module("transformers"), "DynamicCache", None)
    if cache_of is None:
        raise Absent("this version of transformers has no DynamicCache")

    name = cache_argument(mixer)

    def step(x, cache):
        with torch.no_grad():
            return mixer(x, **{name: cache})

    cache = cache_of(config=config)
    step(inputs[0], cache)

    def outputs(_):
        own = cache_of(config=config)
        return np.concatenate([step(x, own).numpy() for x in inputs], axis=1)

    def run():
        return step(inputs[0], cache)

    return Prepared(run, temp_bytes=temp_bytes(torch, run), outputs=outputs)


def _modeling() -> Any:
    return peer_module("transformers.models.mamba2.modeling_mamba2")


def _mixer(torch: Any, weights: dict[str, Array]) -> tuple[Any, Any]:
    """The layer with these weights, and its configuration."""
    module = _modeling()
    n_heads, d_inner = weights["A_log"].shape[0], weights["out_proj"].shape[1]
    d_model = weights["in_proj"].shape[1]
    config = module.Mamba2Config(
        hidden_size=d_model,
        expand=d_inner // d_model,
        num_heads=n_heads,
        head_dim=d_inner // n_heads,
        state_size=(weights["conv"].shape[0] - d_inner) // 2,
        conv_kernel=weights["conv"].shape[-1],
        n_groups=1,
        num_hidden_layers=1,
    )
    mixer = module.Mamba2Mixer(config, layer_idx=0).eval()
    values = {_NAMES[name]: torch.from_numpy(x.copy()) for name, x in weights.items()}
    mixer.load_state_dict(values)
    return mixer, config


_NAMES = {
    "in_proj": "in_proj.weight",
    "conv": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm": "norm.weight",
    "out_proj": "out_proj.weight",
}
