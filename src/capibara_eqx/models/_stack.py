from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..internal import check_choice, split_or_none
from ._block import AbstractBlock


# What is kept of a block's forward pass for its backward pass.
_POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(eqx.Module):
    """Blocks one after the other, as a list or as one scanned block.

    A list may hold blocks of different kinds. Blocks that are alike but for the values
    of their parameters can be scanned: their parameters are stacked along a leading
    layer axis and one compiled block runs over them, so that compile time does not
    grow with depth. The caches of a scanned stack travel in the carry of the loop and
    are updated in place.

    !!! example

        ```python
        keys = jax.random.split(jax.random.key(0), 8)
        blocks = [ResidualBlock(Mamba(64, key=key), 64) for key in keys]
        stack = Stack(blocks, scan=True, remat="full")
        y, aux = stack(x)                              # (*batch, seq, 64)
        y, caches = stack.prefill(x, stack.init_cache((2,)))
        ```
    """

    blocks: tuple[AbstractBlock, ...] | AbstractBlock
    num_blocks: int = eqx.field(static=True)
    remat: str | Callable[..., bool] | None = eqx.field(static=True)

    def __init__(
        self,
        blocks: Sequence[AbstractBlock],
        *,
        scan: bool = False,
        remat: str | Callable[..., bool] | None = None,
    ):
        """**Arguments:**

        - `blocks`: at least one; first in the sequence, first applied.
        - `scan`: whether to stack the parameters and scan over them. The blocks must
            then be equal in everything but the values of their arrays.
        - `remat`: what the backward pass keeps of a block: `None` everything,
            `"full"` only its input, `"dots"` its input and its matrix products, or
            any policy of `jax.checkpoint_policies`.

        **Raises:**

        `ValueError` without blocks, for an unknown `remat`, or for blocks that differ
        where `scan` needs them alike.
        """
        if len(blocks) == 0:
            raise ValueError("`blocks` must hold at least one block, got none.")
        if isinstance(remat, str):
            check_choice("remat", remat, _POLICIES)
        self.blocks = _stack_blocks(blocks) if scan else tuple(blocks)
        self.num_blocks = len(blocks)
        self.remat = remat

    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """**Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `segment_ids`: document of each token, `(*batch, seq)`; negative is padding.
        - `key`: split over the blocks.

        **Returns:**

        `(y, aux)`: aux is a tuple of what each block reports.
        """
        if isinstance(self.blocks, tuple):
            reports = []
            keys = split_or_none(key, self.num_blocks)
            for block, block_key in zip(self.blocks, keys, strict=True):
                x, aux = self._run(block, x, segment_ids, block_key)
                reports.append(aux)
            return x, tuple(reports)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        keys = None if key is None else jax.random.split(key, self.num_blocks)

        def body(x, layer):
            arrays, key = layer
            return self._run(eqx.combine(arrays, static), x, segment_ids, key)

        x, stacked = jax.lax.scan(body, x, (arrays, keys))
        # One report a block again, so that nobody sums over a layer axis by mistake.
        layers = range(self.num_blocks)
        return x, tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in layers
        )

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> PyTree:
        """Caches of all blocks: a tuple, or one with a leading layer axis if scanned.

        See `AbstractSequenceMixer.init_cache`.
        """

        def fresh(block):
            return block.init_cache(batch_shape, max_len=max_len)

        if isinstance(self.blocks, tuple):
            return tuple(fresh(block) for block in self.blocks)
        return eqx.filter_vmap(fresh)(self.blocks)

    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: PyTree,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], PyTree]:
        """See `AbstractSequenceMixer.prefill`."""
        return self._with_cache(
            lambda block, x, cache: block.prefill(x, cache, segment_ids=segment_ids),
            x,
            cache,
        )

    def step(
        self, x: Float[Array, "*batch d_model"], cache: PyTree
    ) -> tuple[Float[Array, "*batch d_model"], PyTree]:
        """See `AbstractSequenceMixer.step`."""
        return self._with_cache(lambda block, x, cache: block.step(x, cache), x, cache)

    def _run(self, block, x, segment_ids, key):
        def run(block, x, segment_ids, key):
            return block(x, segment_ids=segment_ids, key=key)

        if self.remat is not None:
            policy = (
                _POLICIES[self.remat] if isinstance(self.remat, str) else self.remat
            )
            run = eqx.filter_checkpoint(run, policy=policy)
        return run(block, x, segment_ids, key)

    def _with_cache(self, read, x, cache):
        self._check_cache(cache)
        if isinstance(self.blocks, tuple):
            caches = []
            for block, block_cache in zip(self.blocks, cache, strict=True):
                x, block_cache = read(block, x, block_cache)
                caches.append(block_cache)
            return x, tuple(caches)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def body(carry, layer):
            # In the carry, not scanned over: XLA then updates the caches in place.
            x, cache = carry
            arrays, i = layer
            one = jax.tree.map(
                lambda c: jax.lax.dynamic_index_in_dim(c, i, keepdims=False), cache
            )
            x, one = read(eqx.combine(arrays, static), x, one)
            cache = jax.tree.map(
                lambda c, new: jax.lax.dynamic_update_index_in_dim(c, new, i, 0),
                cache,
                one,
            )
            return (x, cache), None

        layers = (arrays, jnp.arange(self.num_blocks))
        (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return x, cache

    def _check_cache(self, cache: Any) -> None:
        scanned = not isinstance(self.blocks, tuple)
        if scanned:
            sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(cache)}
            fits = not isinstance(cache, tuple) and sizes == {(self.num_blocks,)}
        else:
            fits = isinstance(cache, tuple) and len(cache) == self.num_blocks
        if not fits:
            kind = "a scanned stack" if scanned else "a list"
            raise ValueError(
                f"Stack: `cache` does not fit {kind} of {self.num_blocks} blocks: it "
                "is of another model. Make it with this model's `init_cache`."
            )


def _stack_blocks(blocks: Sequence[AbstractBlock]) -> AbstractBlock:
    """One block whose arrays carry a leading layer axis."""

    def kind(block):
        arrays, rest = eqx.partition(block, eqx.is_array)
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arrays)]
        return jax.tree.structure(arrays), shapes, jax.tree.leaves(rest)

    first = kind(blocks[0])
    for index, block in enumerate(blocks[1:], start=1):
        if kind(block) != first:
            raise ValueError(
                "`blocks` must be alike in everything but the values of their arrays "
                f"to be scanned; block {index} differs from block 0. Pass scan=False."
            )
    parts = [eqx.partition(block, eqx.is_array) for block in blocks]
    arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p[0] for p in parts))
    return eqx.combine(arrays, parts[0][1])
