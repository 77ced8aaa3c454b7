from typing import Any, Literal

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    accumulate,
    check_choice,
    check_last_axis,
    check_segment_ids,
    check_sequence,
    check_size,
    split_or_none,
    zero_padding,
)
from ._attention import Attention
from ._linear import Linear
from ._mamba import Mamba
from ._mixer import AbstractSequenceMixer, check_mixed, check_mixer


Branch = Literal["ssm", "attention"]
_BRANCHES: tuple[Branch, ...] = ("ssm", "attention")
_MODES = ("switch", "mix")


class HybridCache(eqx.Module):
    """The cache of each branch, `None` of the one that is not read."""

    ssm: Any
    attention: Any


class HybridSSM(AbstractSequenceMixer):
    r"""A state space and attention side by side: one of them by length, or both.

    With `mode="switch"` rows of more than `ssm_threshold` tokens go to the state space,
    whose work is linear in their number, and the others to attention. The length is
    static, so only the chosen branch is compiled and run. With `mode="mix"` both run,

    $$y = g \odot \mathrm{ssm}(x) + (1 - g) \odot \mathrm{attention}(x), \quad
    g = \sigma(W_g x + b_g),$$

    with a gate for each token and channel that is learned with them. Both kinds of
    mixing in one layer: Dong et al., *Hymba: A Hybrid-head Architecture for Small
    Language Models*, arXiv 2411.13676.

    A branch is only as good as the lengths that it was trained on: in a switch a batch
    trains the branch of its length and leaves the other as it was, so train with rows
    on both sides of the threshold, or mix.

    A cache keeps the branch that it was made for, by its `max_len`, so that streaming
    equals the call on a row of that length. The length of a packed row is not that of
    its documents: with `segment_ids` a switch needs `branch`, or a cache.

    !!! example

        ```python
        layer = HybridSSM(64, ssm_threshold=1024, key=jax.random.key(0))
        layer.select_branch(1024), layer.select_branch(1025)  # "attention", "ssm"
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,), max_len=4096))
        y_t, cache = layer.step(x_t, cache)            # one token more, by the ssm
        mixed = HybridSSM(64, mode="mix", key=jax.random.key(0))(x)
        ```
    """

    ssm: AbstractSequenceMixer | None
    attention: AbstractSequenceMixer | None
    gate: Linear | None
    d_model: int = eqx.field(static=True)
    ssm_threshold: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        ssm_threshold: int = 2048,
        use_mamba: bool = True,
        use_transformer: bool = True,
        mode: str = "switch",
        ssm: AbstractSequenceMixer | None = None,
        attention: AbstractSequenceMixer | None = None,
        n_heads: int | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of input and output.
        - `ssm_threshold`: tokens of the longest row that a switch gives to attention.
            It is of a switch between two branches alone: a mix, or one branch, takes
            rows of any length.
        - `use_mamba`, `use_transformer`: whether there is a state space, and whether
            there is attention. One of them alone takes every row.
        - `mode`: `"switch"` or `"mix"`, the latter of two branches.
        - `ssm`, `attention`: the branches, any mixers from `d_model` to `d_model` that
            return their output alone; if not given `Mamba(d_model)` and
            `Attention(d_model, n_heads, rope_enabled=True)`.
        - `n_heads`: of the attention that is built here; if not given heads of 64
            channels, or one where these do not divide `d_model`.
        - `dtype`: of the parameters made here; float32 if not given.
        - `key`: for their initial values.

        **Raises:**

        `ValueError` for a size that is not positive, an unknown `mode`, no branch at
        all, a mix of one, a branch that is no mixer of this width, or a branch or
        `n_heads` that would not be used.
        """
        check_size("d_model", d_model)
        check_size("ssm_threshold", ssm_threshold)
        check_choice("mode", mode, _MODES)
        if not (use_mamba or use_transformer):
            raise ValueError(
                "`use_mamba` and `use_transformer` are both False, which leaves "
                "nothing to mix with. Set one of them."
            )
        both = use_mamba and use_transformer
        if mode == "mix" and not both:
            raise ValueError(
                '`mode="mix"` mixes two branches, but `use_mamba` or `use_transformer` '
                "is False. Set both, or leave out `mode`."
            )
        _check_branch("ssm", ssm, d_model, "use_mamba", use_mamba)
        _check_branch(
            "attention", attention, d_model, "use_transformer", use_transformer
        )
        builds_attention = use_transformer and attention is None
        if n_heads is not None and not builds_attention:
            raise ValueError(
                "`n_heads` is of the attention that is built here, but "
                "`attention` was given or `use_transformer` is False. Leave it out."
            )
        ssm_key, attention_key, gate_key = jax.random.split(key, 3)
        if use_mamba and ssm is None:
            ssm = Mamba(d_model, dtype=dtype, key=ssm_key)
        if builds_attention:
            if n_heads is None:
                n_heads = d_model // 64 if d_model % 64 == 0 else 1
            attention = Attention(
                d_model, n_heads, rope_enabled=True, dtype=dtype, key=attention_key
            )
        self.ssm = ssm
        self.attention = attention
        self.gate = (
            Linear(d_model, d_model, dtype=dtype, key=gate_key)
            if mode == "mix"
            else None
        )
        self.d_model = d_model
        self.ssm_threshold = ssm_threshold

    @property
    def mode(self) -> str:
        """`"mix"` if both branches run, `"switch"` if one does."""
        return "switch" if self.gate is None else "mix"

    @property
    def has_choice(self) -> bool:
        """Whether the length of a row decides between two branches."""
        has_both = self.ssm is not None and self.attention is not None
        return has_both and self.gate is None

    def select_branch(self, length: int) -> Branch:
        """The branch that reads rows of this length.

        **Arguments:**

        - `length`: tokens of a row, or that a cache is made for.

        **Returns:**

        `"ssm"` above `ssm_threshold`, else `"attention"`; the only one if there is one.

        **Raises:**

        `ValueError` for a mix, where both do.
        """
        if self.gate is not None:
            raise ValueError(
                'HybridSSM: `mode="mix"` reads every row with both branches; there is '
                'none to select. Build it with mode="switch".'
            )
        if self.ssm is None or self.attention is None:
            return "attention" if self.ssm is None else "ssm"
        return "ssm" if length > self.ssm_threshold else "attention"

    @jax.named_scope("capibara_eqx.layers.HybridSSM")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        branch: Branch | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """See `AbstractSequenceMixer.__call__`.

        **Arguments:**

        - `x`, `segment_ids`: as there.
        - `branch`: `"ssm"` or `"attention"`, where the length of the row is not to
            decide. A switch needs it beside `segment_ids`.
        - `key`: for branches that draw random numbers.

        **Raises:**

        `ValueError` for an input that does not fit, a `branch` that the layer cannot
        choose, or packed rows in a switch without it.
        """
        check_sequence("HybridSSM", "x", x, self.d_model)
        check_segment_ids("HybridSSM", segment_ids, x.shape[:-1])
        if branch is None and segment_ids is not None and self.has_choice:
            raise ValueError(
                "HybridSSM: a switch chooses by the length of a row, but a row with "
                "`segment_ids` holds documents of other lengths, or padding. Pass "
                '`branch="ssm"` or `branch="attention"`, or build the layer with '
                '`mode="mix"`.'
            )
        x = zero_padding(x, segment_ids)
        names = self._chosen(branch, x.shape[-2])
        keys = (key,) if len(names) == 1 else split_or_none(key, len(names))
        outputs = {
            name: getattr(self, name)(x, segment_ids=segment_ids, key=branch_key)
            for name, branch_key in zip(names, keys, strict=True)
        }
        return self._combine(x, outputs)

    def init_cache(
        self,
        batch_shape: tuple[int, ...] = (),
        *,
        max_len: int | None = None,
        branch: Branch | None = None,
    ) -> HybridCache:
        """See `AbstractSequenceMixer.init_cache`.

        **Arguments:**

        - `batch_shape`: batch axes of what will be read.
        - `max_len`: tokens that will be read, prompt and new ones together; a switch
            chooses by it. It is passed on to the branches.
        - `branch`: `"ssm"` or `"attention"`, where `max_len` is not to decide.

        **Raises:**

        `ValueError` for a `branch` that the layer cannot choose, or in a switch
        without either.
        """
        if branch is None and max_len is None and self.has_choice:
            raise ValueError(
                "HybridSSM: `max_len` is needed: a switch chooses its branch by the "
                "number of tokens that a cache is made for, since it cannot change it "
                "while they come in. Pass it to `init_cache`, or pass `branch`."
            )
        caches = {
            name: getattr(self, name).init_cache(batch_shape, max_len=max_len)
            for name in self._chosen(branch, max_len or 0)
        }
        return HybridCache(caches.get("ssm"), caches.get("attention"))

    @jax.named_scope("capibara_eqx.layers.HybridSSM.prefill")
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: HybridCache,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_model"], HybridCache]:
        """See `AbstractSequenceMixer.prefill`; the branch of the cache reads.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_sequence("HybridSSM", "x", x, self.d_model)
        check_segment_ids("HybridSSM", segment_ids, x.shape[:-1])
        x = zero_padding(x, segment_ids)
        return self._continue(
            lambda mixer, held: mixer.prefill(x, held, segment_ids=segment_ids),
            x,
            cache,
        )

    @jax.named_scope("capibara_eqx.layers.HybridSSM.step")
    def step(
        self, x: Float[Array, "*batch d_model"], cache: HybridCache
    ) -> tuple[Float[Array, "*batch d_model"], HybridCache]:
        """See `AbstractSequenceMixer.step`; the branch of the cache reads.

        **Raises:**

        `ValueError` for an input or a cache that does not fit.
        """
        check_last_axis("HybridSSM.step", "x", x, self.d_model)
        return self._continue(lambda mixer, held: mixer.step(x, held), x, cache)

    def _chosen(self, branch: Branch | None, length: int) -> tuple[Branch, ...]:
        """The branches that read a row of this length."""
        if branch is None:
            return (self.select_branch(length),) if self.gate is None else _BRANCHES
        check_choice("branch", branch, _BRANCHES)
        if self.gate is not None:
            raise ValueError(
                f'HybridSSM: `branch` is {branch!r}, but `mode="mix"` reads with both. '
                "Leave it out."
            )
        if getattr(self, branch) is None:
            raise ValueError(
                f"HybridSSM: `branch` is {branch!r}, which the layer was built "
                "without. Leave it out."
            )
        return (branch,)

    def _continue(self, read, x, cache):
        held = self._held(cache)
        outputs, caches = {}, {}
        for name, branch_cache in held.items():
            mixer = getattr(self, name)
            outputs[name], caches[name] = read(mixer, branch_cache)
        y = self._combine(x, outputs)
        return y, HybridCache(caches.get("ssm"), caches.get("attention"))

    def _held(self, cache) -> dict[str, Any]:
        """The caches that hold something; `ValueError` if they are of another layer."""
        made = "Make it with this layer's `init_cache`."
        if not isinstance(cache, HybridCache):
            raise ValueError(
                "HybridSSM: `cache` must be a HybridCache, got "
                f"{type(cache).__name__}. {made}"
            )
        held = {"ssm": cache.ssm, "attention": cache.attention}
        held = {name: part for name, part in held.items() if part is not None}
        fits = len(held) == (1 if self.gate is None else 2)
        if not fits or any(getattr(self, name) is None for name in held):
            raise ValueError(
                f"HybridSSM: `cache` is of a layer with other branches: it holds "
                f"{sorted(held)}. {made}"
            )
        return held

    def _combine(self, x, outputs):
        for name, y in outputs.items():
            check_mixed("HybridSSM", name, x, y)
        if self.gate is None:
            (y,) = outputs.values()
            return y
        g = jax.nn.sigmoid(accumulate(self.gate(x)))
        ssm, attention = (accumulate(outputs[name]) for name in _BRANCHES)
        return (g * ssm + (1 - g) * attention).astype(x.dtype)


def _check_branch(
    name: str,
    branch: AbstractSequenceMixer | None,
    d_model: int,
    flag: str,
    used: bool,
) -> None:
    if branch is None:
        return
    check_mixer("HybridSSM", name, branch, d_model)
    if not used:
        raise ValueError(
            f"`{name}` was given, but `{flag}` is False, so that it would not be used. "
            "Leave out either."
        )
