import re
from typing import Any, NamedTuple

import equinox as eqx

from ..models import LanguageModel
from ..transforms import dequantize, merge
from ..transforms._places import Place, places
from ._describe import describe
from ._hf_config import ARCHITECTURES
from ._hf_names import tensor_names
from ._problems import refuse


PREFIX = "base_model.model."
# Of a mixture transformers has no layers that an adapter could be put on; of Mamba it
# takes the weights of two without calling the layers, which peft refuses or leaves out.
_NO_MODULE = re.compile(r"block_sparse_moe|^backbone\..*\.(out_proj|dt_proj)\.")


class Module(NamedTuple):
    """A layer of transformers and the weight here that it is, or is a part of.

    `index`: where in a stack of layers. `is_table`: whether it looks rows up.
    """

    place: Place
    index: tuple[int, ...]
    is_table: bool


class TensorName(NamedTuple):
    """What the name of a tensor in an adapter's file says.

    `part`: `"a"`, `"b"`, `"magnitude"`, or `"weight"` of the layer itself.
    """

    module: str
    part: str
    is_table: bool


_NAMES = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+?)\.(?:lora_(?P<matrix>[AB])\.weight"
    + r"|lora_embedding_(?P<table>[AB])"
    + r"|(?P<magnitude>lora_magnitude_vector(?:\.weight)?)"
    + r"|(?:base_layer\.)?weight)"
)


def parse_name(name: str) -> TensorName | None:
    """`None` for a name that no part of an adapter has."""
    match = _NAMES.fullmatch(name)
    if match is None:
        return None
    letter = match["matrix"] or match["table"]
    part = "magnitude" if match["magnitude"] else "weight"
    return TensorName(
        match["module"], letter.lower() if letter else part, match["table"] is not None
    )


def write_name(module: str, part: str, is_table: bool) -> str:
    """The name of the tensor of a part, `"a"`, `"b"` or `"magnitude"`."""
    if part == "magnitude":
        return f"{PREFIX}{module}.lora_magnitude_vector"
    if is_table:
        return f"{PREFIX}{module}.lora_embedding_{part.upper()}"
    return f"{PREFIX}{module}.lora_{part.upper()}.weight"


def modules_of(function: str, model: LanguageModel) -> dict[str, Module]:
    """Every layer that can have an adapter, by its name in transformers.

    **Raises:**

    `ValueError` for a model that no architecture of transformers describes.
    """
    plain: Any = eqx.filter_eval_shape(_as_plain, model)
    structure, problems = describe(plain)
    refuse(function, "this model has no place in a checkpoint", problems)
    assert structure is not None  # or there was a problem
    block = structure.blocks[0]
    names = next(a.names for a in ARCHITECTURES.values() if isinstance(block, a.spec))
    found = {}
    for place in places(model):
        if not place.is_matrix:
            continue
        path = place.path.replace("/", ".")
        for index, name in tensor_names(names, path, place.value.shape).items():
            if not _NO_MODULE.search(name):
                is_table = path == "embedding.weight"
                module = name.removesuffix(".weight")
                found[module] = Module(place, index, is_table)
    return found


def _as_plain(model):
    adapted = any(place.adapter is not None for place in places(model))
    return dequantize(merge(model) if adapted else model)
