from typing import Any, NamedTuple

import jax
import numpy as np

from ..layers import Embedding, Mamba, Mamba2, RMSNorm
from ..models import LanguageModel, ResidualBlock, TransformerBlock
from ._mamba2_spec import Mamba2Spec
from ._mamba_spec import MambaSpec
from ._problems import some
from ._structure import BlockSpec, Structure, abstract_model
from ._transformer_spec import TransformerSpec


# The mixer of a residual block, and what describes the block.
RESIDUAL: dict[type, type[BlockSpec]] = {Mamba: MambaSpec, Mamba2: Mamba2Spec}


class Described(NamedTuple):
    """A model as a `Structure`; `None` if `problems` say what it has that none has."""

    structure: Structure | None
    problems: list[str]


def array_leaves(model: LanguageModel) -> dict[str, Any]:
    """Every array of a model, NumPy's too, by its path."""
    kinds = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        if isinstance(leaf, kinds)
    }


def describe(model: LanguageModel) -> Described:
    """The structure of a model, or all in it that no checkpoint has a place for."""
    if not isinstance(model, LanguageModel):
        got = type(model).__name__
        return Described(None, [f"`model` must be a LanguageModel, got {got}"])
    stacked = model.stack.blocks
    blocks = stacked if isinstance(stacked, tuple) else (stacked,)
    specs: list[type[BlockSpec]] = []
    problems: list[str] = []
    for i, block in enumerate(blocks):
        where = f"block {i}" if isinstance(stacked, tuple) else "the scanned block"
        spec = _spec_of(block)
        found = [spec] if isinstance(spec, str) else spec.problems(block)
        problems += [f"{where}: {problem}" for problem in found]
        if not isinstance(spec, str):
            specs.append(spec)
    if type(model.embedding) is not Embedding:
        kind = type(model.embedding).__name__
        problems.append(f"the embedding is {kind}, not the plain Embedding")
    if not isinstance(model.norm, RMSNorm):
        problems.append(f"the last norm is {type(model.norm).__name__}, not RMSNorm")
    if len(set(specs)) > 1:
        kinds = ", ".join(dict.fromkeys(spec.kind for spec in specs))
        problems.append(f"its blocks are of several kinds: {kinds}")
    if problems:
        return Described(None, problems)
    norms = [model.norm, *(norm for block in blocks for norm in specs[0].norms(block))]
    sizes = sorted({norm.eps for norm in norms})
    if len(sizes) > 1:
        problems.append(f"norms have an `eps` of their own: {sizes}")
    described = tuple(map(specs[0].of, blocks))
    structure = Structure(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        eps=sizes[0],
        tie_embeddings=model.head is None,
        blocks=described * (model.stack.num_blocks // len(blocks)),
    )
    differing = sorted(set(structure.differing()) - specs[0].by_layer)
    if differing:
        problems.append(f"the blocks differ in {', '.join(differing)}")
    problems = problems or _foreign_arrays(model, structure)
    return Described(None if problems else structure, problems)


def _spec_of(block: Any) -> type[BlockSpec] | str:
    """What describes such a block, or why nothing does."""
    if type(block) is TransformerBlock:
        return TransformerSpec
    if type(block) is not ResidualBlock:
        return f"{type(block).__name__} is neither TransformerBlock nor ResidualBlock"
    kind = type(block.mixer)
    if kind not in RESIDUAL:
        known = " or ".join(mixer.__name__ for mixer in RESIDUAL)
        return f"the mixer of the ResidualBlock is {kind.__name__}, not {known}"
    return RESIDUAL[kind]


def _foreign_arrays(model: LanguageModel, structure: Structure) -> list[str]:
    """Arrays that a model of this structure does not have, or has in other shapes."""
    scan = not isinstance(model.stack.blocks, tuple)
    expected = array_leaves(abstract_model(structure, scan=scan))
    found = array_leaves(model)
    problems = []
    extra = [path for path in found if path not in expected]
    missing = [path for path in expected if path not in found]
    if extra or missing:
        problems.append(
            "its arrays are not those of plain layers"
            + (f"; there are also: {some(extra)}" if extra else "")
            + (f"; there are not: {some(missing)}" if missing else "")
            + ". Merge or dequantize weights that stand in for others first"
        )
    for path, leaf in found.items():
        shape = expected[path].shape if path in expected else leaf.shape
        if leaf.shape != shape:
            problems.append(f"{path} must have shape {shape}, got {leaf.shape}")
    return problems
