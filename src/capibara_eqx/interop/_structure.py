import abc
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
from jaxtyping import DTypeLike, PRNGKeyArray

from ..layers import GatedRMSNorm, RMSNorm
from ..models import AbstractBlock, LanguageModel


@dataclass(frozen=True)
class BlockSpec(abc.ABC):
    """Everything that decides the structure of a block, but for width and `eps`.

    `kind`: what errors call such a block. `by_layer`: the fields that may differ from
    layer to layer.
    """

    kind: ClassVar[str]
    by_layer: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    @abc.abstractmethod
    def problems(cls, block: Any) -> list[str]:
        """What `block` has that no spec of this kind says."""

    @classmethod
    @abc.abstractmethod
    def of(cls, block: Any) -> "BlockSpec":
        """The spec of a block without problems."""

    @staticmethod
    @abc.abstractmethod
    def norms(block: Any) -> list[RMSNorm | GatedRMSNorm]:
        """All norms of the block, which have one `eps`."""

    @abc.abstractmethod
    def build(
        self,
        d_model: int,
        eps: float,
        *,
        implementation: str | None,
        dtype: DTypeLike | None,
        key: PRNGKeyArray,
    ) -> AbstractBlock:
        """The block. Raises what the layers say to sizes that do not go together."""

    @classmethod
    def names(cls) -> list[str]:
        """Names of the fields."""
        return [field.name for field in fields(cls)]


class Structure(NamedTuple):
    """Everything that decides the structure of a language model.

    It lies between a config.json and a `LanguageModel`: both are made from it and
    both are read into it. `blocks` has one entry a layer, all of one kind.
    """

    vocab_size: int
    d_model: int
    eps: float
    tie_embeddings: bool
    blocks: tuple[BlockSpec, ...]

    def differing(self) -> list[str]:
        """The fields in which blocks differ."""
        return [
            name
            for name in self.blocks[0].names()
            if len({getattr(block, name) for block in self.blocks}) > 1
        ]

    def entries(self) -> dict[str, Any]:
        """All fields by name, those of blocks too: a tuple where they may differ."""
        entries: dict[str, Any] = self._asdict()
        blocks = entries.pop("blocks")
        for name in blocks[0].names():
            values = tuple(getattr(block, name) for block in blocks)
            entries[name] = values if name in blocks[0].by_layer else values[0]
        return entries | {"n_layers": len(blocks)}


def abstract_model(
    structure: Structure,
    *,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> LanguageModel:
    """The model with `jax.ShapeDtypeStruct`s for arrays: nothing is computed.

    **Raises:**

    `ValueError`: what the layers say to sizes that do not go together.
    """

    def build(key):
        # Traced once for each kind of block, however many layers there are.
        built = {
            block: block.build(
                structure.d_model,
                structure.eps,
                implementation=implementation,
                dtype=dtype,
                key=key,
            )
            for block in dict.fromkeys(structure.blocks)
        }
        return LanguageModel(
            structure.vocab_size,
            structure.d_model,
            [built[block] for block in structure.blocks],
            scan=scan,
            remat=remat,
            tie_embeddings=structure.tie_embeddings,
            eps=structure.eps,
            dtype=dtype,
            key=key,
        )

    return eqx.filter_eval_shape(build, jax.random.key(0))
