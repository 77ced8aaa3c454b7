import re

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from ..arrays import NM, FakeQuantArray, SparseArray, as_array
from ..internal import (
    check_last_axis,
    check_segment_ids,
    check_sequence,
    check_size,
    zero_padding,
)
from ._attention import Attention
from ._kv_cache import KVCache
from ._linear import Linear
from ._mixer import AbstractSequenceMixer
from ._mlp import MLP
from ._norm import RMSNorm


class SparseBlock(eqx.Module):
    """A pre-norm residual around attention, then one around a feed-forward."""

    mixer_norm: RMSNorm
    mixer: Attention
    feed_forward_norm: RMSNorm
    feed_forward: MLP


class SparseCapibara(AbstractSequenceMixer):
    r"""A stack of transformer blocks, all of whose maps are N:M sparse.

    $$h = x + W_o\,[\mathrm{attend}(W_q u, W_k u, W_v u)]_\mathrm{heads}, \;
    u = \mathrm{norm}(x); \quad y = h + W_2\,\mathrm{gelu}(W_1\,\mathrm{norm}(h))$$

    where of every $M$ neighbours along the input of each $W$ at most $N$ are other
    than zero, always: the sparsity is $1 - N/M$ at the start, while training and
    after. Mishra et al., *Accelerating Sparse Deep Neural Networks*, arXiv 2104.08378;
    pre-norm as in Xiong et al., arXiv 2002.04745; causal, with rotary positions.

    Fixed sparsity keeps the largest initial values of each group and their places,
    2 bits a place for groups of four, and trains those values alone. Dynamic sparsity
    keeps every value and chooses the largest anew at each step, while gradients reach
    all of them: Zhou et al., *Learning N:M Fine-grained Structured Sparse Neural
    Networks From Scratch*, arXiv 2102.04010. Train it with `transforms.sr_ste` in
    front of the optimiser; `transforms.convert` then makes its sparsity fixed. On
    today's backends the products are dense ones: what is saved is memory.

    Padding keeps its residual stream: the output there is the input.

    !!! example

        ```python
        layer = SparseCapibara(64, 2, "2:4", n_heads=4, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        sparsity = (layer.get_weights() == 0).mean()   # 0.5
        ```
    """

    blocks: tuple[SparseBlock, ...]
    d_model: int = eqx.field(static=True)
    sparsity_pattern: str = eqx.field(static=True)

    def __init__(
        self,
        d_model: int = 768,
        num_layers: int = 12,
        sparsity_pattern: str = "2:4",
        use_dynamic_sparsity: bool = False,
        n_heads: int = 12,
        d_ff: int | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of the residual stream; the groups must divide it.
        - `num_layers`: number of blocks.
        - `sparsity_pattern`: `"N:M"`, how many of how many neighbours stay.
        - `use_dynamic_sparsity`: whether the choice is made anew at every step.
        - `n_heads`: of attention, in each block.
        - `d_ff`: width inside the feed-forward, which the groups must divide too;
            4 `d_model` if not given.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values, see `Linear`.

        **Raises:**

        `ValueError` for a size that is not positive or that does not fit, or a
        `sparsity_pattern` of another form.
        """
        spec = _pattern(sparsity_pattern)
        check_size("num_layers", num_layers)
        check_size("d_model", d_model)
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_size("d_ff", d_ff)
        for name, size in (("d_model", d_model), ("d_ff", d_ff)):
            if size % spec.m:
                raise ValueError(
                    f"`{name}` must be a multiple of the {spec.m} neighbours of "
                    f"`sparsity_pattern` {sparsity_pattern!r}, got {size}."
                )
        compress = FakeQuantArray.of if use_dynamic_sparsity else SparseArray.compress

        def sparse(layer):
            if not isinstance(layer, Linear):
                return layer
            weight = compress(as_array(layer.weight), spec)
            return eqx.tree_at(lambda m: m.weight, layer, weight)

        blocks = []
        for block_key in jax.random.split(key, num_layers):
            k1, k2 = jax.random.split(block_key)
            block = SparseBlock(
                mixer_norm=RMSNorm(d_model, dtype=dtype),
                mixer=Attention(
                    d_model, n_heads, rope_enabled=True, dtype=dtype, key=k1
                ),
                feed_forward_norm=RMSNorm(d_model, dtype=dtype),
                feed_forward=MLP(d_model, d_ff, use_bias=False, dtype=dtype, key=k2),
            )
            blocks.append(jax.tree.map(sparse, block, is_leaf=_is_linear))
        self.blocks = tuple(blocks)
        self.d_model = d_model
        self.sparsity_pattern = sparsity_pattern

    def get_weights(self) -> Float[Array, " weights"]:
        """The weights of all maps one after the other, with their exact zeros."""
        linears = jax.tree.leaves(self.blocks, is_leaf=_is_linear)
        weights = [m.weight for m in linears if isinstance(m, Linear)]
        return jnp.concatenate([as_array(weight).ravel() for weight in weights])

    @jax.named_scope("capibara_eqx.layers.SparseCapibara")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`; where an id is negative, `x` stays.

        **Raises:**

        `ValueError` for an input that does not fit.
        """
        del key
        self._check(x, segment_ids)
        for block in self.blocks:
            seen = block.mixer_norm(zero_padding(x, segment_ids))
            x = x + block.mixer(seen, segment_ids=segment_ids)
            x = x + _feed_forward(block, zero_padding(x, segment_ids))
        return x

    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> tuple[KVCache, ...]:
        """The caches of attention, see `AbstractSequenceMixer.init_cache`."""
        return tuple(
            block.mixer.init_cache(batch_shape, max_len=max_len)
            for block in self.blocks
        )

    @jax.named_scope("capibara_eqx.layers.SparseCapibara.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: tuple[KVCache, ...],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], tuple[KVCache, ...]]:
        """See `AbstractSequenceMixer.prefill`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        self._check(x, segment_ids)
        caches = []
        for block, held in zip(self.blocks, self._caches(cache), strict=True):
            seen = block.mixer_norm(zero_padding(x, segment_ids))
            y, held = block.mixer.prefill(seen, held, segment_ids=segment_ids)
            x = x + y
            x = x + _feed_forward(block, zero_padding(x, segment_ids))
            caches.append(held)
        return x, tuple(caches)

    @jax.named_scope("capibara_eqx.layers.SparseCapibara.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: tuple[KVCache, ...]
    ) -> tuple[Float[Array, "*batch d_model"], tuple[KVCache, ...]]:
        """See `AbstractSequenceMixer.step`.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("SparseCapibara.step", "x", x, self.d_model)
        caches = []
        for block, held in zip(self.blocks, self._caches(cache), strict=True):
            y, held = block.mixer.step(block.mixer_norm(x), held)
            x = x + y
            x = x + _feed_forward(block, x)
            caches.append(held)
        return x, tuple(caches)

    def _check(self, x, segment_ids):
        check_sequence("SparseCapibara", "x", x, self.d_model)
        check_segment_ids("SparseCapibara", segment_ids, x.shape[:-1])

    def _caches(self, cache: PyTree) -> tuple[KVCache, ...]:
        if not isinstance(cache, tuple) or len(cache) != len(self.blocks):
            raise ValueError(
                f"SparseCapibara: `cache` does not fit {len(self.blocks)} blocks: it "
                "is of another layer. Make it with this layer's `init_cache`."
            )
        return cache


def _feed_forward(block: SparseBlock, x: Array) -> Array:
    # Without biases it leaves padding zero.
    return block.feed_forward(block.feed_forward_norm(x))


def _is_linear(node: object) -> bool:
    return isinstance(node, Linear)


def _pattern(pattern: str) -> NM:
    found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if found is None:
        raise ValueError(
            '`sparsity_pattern` must be "N:M", as "2:4" for two of every four '
            f"neighbours, got {pattern!r}."
        )
    return NM(int(found[1]), int(found[2]))
