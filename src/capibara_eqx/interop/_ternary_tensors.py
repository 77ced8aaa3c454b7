"""Weights of BitNet on disk: packed bytes and a scale, or floats to be rounded."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import FakeQuantArray, Ternary, TernaryArray
from ._checkpoint_files import StoredTensor
from ._config_entries import Entries


PACKED = "U8"
_PLANES = 4  # rows in a byte
_SPEC = Ternary(activations="int8")
_WEIGHT = re.compile(r"stack\.blocks\..*_proj\.weight")
Tensors = Mapping[str, StoredTensor]


class TernaryTensors(NamedTuple):
    """How the ternary weights of a checkpoint are kept.

    `scale`: what the layer of transformers does with the tensor `weight_scale`:
    `BitLinear` divides a product by it, `AutoBitLinear` multiplies, for the same
    tensors (microsoft/BitNet#616). Without one the weights are floats, which are
    rounded wherever they are used, and still learn.
    """

    scale: Literal["divides", "multiplies"] | None

    def is_kept(self, path: str) -> bool:
        """Whether the weight at this path of a model is kept so: any map in a block."""
        return _WEIGHT.fullmatch(path) is not None

    def shapes(
        self, shapes: Mapping[str, tuple[int, ...]], found: Tensors
    ) -> dict[str, tuple[int, ...]]:
        """Shapes on disk of some weights, and of their scales."""
        if self.scale is None:
            return dict(shapes)
        stored: dict[str, tuple[int, ...]] = {}
        for name, (rows, *rest) in shapes.items():
            if not self._is_plain(name, found):
                rows = -(-rows // _PLANES)
            stored |= {name: (rows, *rest), scale_of(name): (1,)}
        return stored

    def of_dtype(self, path: str, names: Iterable[str]) -> list[str]:
        """The tensors among `names` that say which dtype the weight stands for."""
        scaled = self.is_kept(path) and self.scale is not None
        return [name for name in names if name.endswith("_scale") or not scaled]

    def packed(self, names: Mapping[str, Any], found: Tensors) -> set[str]:
        """The tensors among `names` that must be bytes."""
        if self.scale is None:
            return set()
        weights = [name for name in names if name.endswith(".weight")]
        return {name for name in weights if not self._is_plain(name, found)}

    def read(
        self,
        parts: Mapping[tuple[int, ...], str],
        found: Tensors,
        shape: tuple[int, ...],
        dtype: Any,
        problems: list[str],
    ) -> TernaryArray:
        """The weight of one layer, or of several that are scanned."""
        nodes = {
            index: self._read_matrix(name, found, shape[-2], dtype, problems)
            for index, name in parts.items()
        }
        if () in nodes:
            return nodes[()]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes.values())

    def _is_plain(self, name: str, found: Tensors) -> bool:
        """Whether -1, 0 and 1 are floats, as `AutoBitLinear` is saved again."""
        return (
            self.scale == "multiplies" and name in found and found[name].dtype != PACKED
        )

    def _read_matrix(
        self, name: str, found: Tensors, rows: int, dtype: Any, problems: list[str]
    ) -> TernaryArray:
        where = f"{name} in {found[name].source}"
        stored, factor = found[name].read(name), np.float32(1)
        if stored.dtype == np.uint8:
            codes = _unpacked(stored)[:rows]
            if np.any(codes > 1):
                problems.append(
                    f"{where} is damaged: it holds the code 3, which stands for no "
                    "weight. Download or copy it again"
                )
        else:
            wide = stored.astype(np.float32)
            codes = (wide > 0).astype(np.int8) - (wide < 0).astype(np.int8)
            sizes = np.abs(wide)
            factor = np.max(sizes, initial=0) or factor
            if not np.all((sizes == 0) | (sizes == factor)) or factor == np.inf:
                problems.append(
                    f"{where} holds other values than -1, 0 and 1 times one number, "
                    "which `quantization_mode` 'offline' means. Weights that are not "
                    "rounded yet are 'online'"
                )
        scale = self._multiplier(scale_of(name), found, problems) * factor
        return TernaryArray.from_codes(
            jnp.asarray(codes), jnp.full((1, 1), scale, jnp.float32), _SPEC, dtype
        )

    def _multiplier(self, name: str, found: Tensors, problems: list[str]) -> Any:
        scale = found[name].read(name).astype(np.float32)[0]
        with np.errstate(divide="ignore", over="ignore"):
            factor = np.float32(1) / scale if self.scale == "divides" else scale
        if not (np.isfinite(scale) and 0 < factor < np.inf):
            problems.append(
                f"{name} in {found[name].source} must be positive and finite, got "
                f"{scale}. Download or copy it again"
            )
            return np.float32(1)
        return factor


def fake_ternary(weight: jax.Array) -> FakeQuantArray:
    """A float weight that is rounded wherever it is used."""
    return FakeQuantArray.of(weight, _SPEC)


def read_ternary(config: Entries) -> TernaryTensors | None:
    """How `quantization_config` says that weights are kept; `None` with a problem."""
    entries = config.section("quantization_config")
    if entries is None or entries.get("quant_method") != "bitnet":
        config.refuse(
            "`quantization_config`: the weights are quantized in another way than "
            "BitNet's. Dequantize them with transformers and save the model again"
        )
        return None
    kind = entries.get("linear_class") or "bitlinear"
    mode = entries.get("quantization_mode") or "offline"
    if kind not in ("bitlinear", "autobitlinear"):
        entries.refuse(f"`linear_class` must be bitlinear or autobitlinear: {kind!r}")
    if mode not in ("offline", "online"):
        entries.refuse(f"`quantization_mode` must be offline or online: {mode!r}")
    if entries.flag("use_rms_norm", False):
        entries.refuse("`use_rms_norm` true is not supported: a norm in each map")
    kept = entries.get("modules_to_not_convert")
    if kept not in (None, ["lm_head"]):
        entries.refuse(
            f"`modules_to_not_convert` {kept!r} is not supported: every map is ternary "
            "but for the head, ['lm_head']"
        )
    if kind == "bitlinear":
        return TernaryTensors("divides")
    return TernaryTensors("multiplies" if mode == "offline" else None)


def scale_of(name: str) -> str:
    """The tensor with the scale of a weight."""
    return f"{name}_scale"


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """-1, 0 and 1, and 2 for what stands for none.

    A byte holds the rows `r`, `r + n`, `r + 2n` and `r + 3n` of a column, from its low
    bits on, where `n` is the number of rows of bytes.
    """
    planes = [(packed >> 2 * i) & 3 for i in range(_PLANES)]
    return np.concatenate(planes).astype(np.int8) - np.int8(1)
