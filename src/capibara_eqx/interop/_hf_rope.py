import math
from typing import Any

from ..layers import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, YaRNScaling
from ._config_entries import Entries


KINDS = ("default", "linear", "llama3", "yarn")


def read_rope(config: Entries, default_base: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, from a config of any age.

    The order of precedence is that of transformers: `rope_scaling`, the older name,
    before `rope_parameters`, and what stands in them before what stands beside them.
    """
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    base = config.number("rope_theta", default_base, above=0)
    if rope is None:
        _check_partial(config)
        return base, None
    base = rope.number("rope_theta", base, above=0)
    _check_partial(rope if rope.get("partial_rotary_factor") is not None else config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    scaling = None
    if kind == "linear":
        scaling = LinearScaling(rope.number("factor", above=0))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            rope.number("factor", above=0),
            rope.number("low_freq_factor", above=0),
            rope.number("high_freq_factor", above=0),
            _original_length(config, rope),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            rope.refuse("`high_freq_factor` must be above `low_freq_factor`")
    elif kind == "yarn":
        scaling = _read_yarn(config, rope)
    elif kind != "default":
        rope.refuse(
            f"`rope_type` {kind!r} is not supported, only {', '.join(KINDS)}; nothing "
            "else here computes the same positions"
        )
    return base, scaling


def _check_partial(entries: Entries) -> None:
    share = entries.number("partial_rotary_factor", 1.0)
    if share != 1:
        entries.refuse(
            f"`partial_rotary_factor` {share} is not supported: rotary positions turn "
            "all channels of a head, it must be 1"
        )


def _original_length(config: Entries, rope: Entries) -> int:
    for entries, name in (
        (config, "original_max_position_embeddings"),
        (rope, "original_max_position_embeddings"),
        (config, "max_position_embeddings"),
    ):
        if entries.get(name) is not None:
            return entries.size(name)
    return rope.size("original_max_position_embeddings")


def _read_yarn(config: Entries, rope: Entries) -> YaRNScaling:
    length = _original_length(config, rope)
    if rope.get("factor") is None and config.get("max_position_embeddings") is not None:
        factor = config.size("max_position_embeddings") / length
    else:
        factor = rope.number("factor", above=0)
    # Zero counts as absent there.
    fast = rope.number("beta_fast", None) or 32.0
    slow = rope.number("beta_slow", None) or 1.0
    size = rope.number("attention_factor", None, above=0)
    over, under = (rope.number(name, None) for name in ("mscale", "mscale_all_dim"))
    if size is None and over and under:
        grown = 0.1 * math.log(max(factor, 1))
        size = (grown * over + 1) / (grown * under + 1)
    if rope.get("truncate") not in (None, True):
        rope.refuse("yarn with `truncate` false is not supported: it must be true")
    # Where the ramp is empty, implementations differ.
    if not 0 < slow <= fast or length < 2 * math.pi * slow:
        rope.refuse(
            f"yarn's ramp is empty for `beta_fast` {fast}, `beta_slow` {slow} and "
            f"`original_max_position_embeddings` {length}"
        )
    return YaRNScaling(factor, length, fast, slow, size)


def without_ntk(
    base: float, scaling: RopeScaling | None, head_dim: int
) -> tuple[float, RopeScaling | None]:
    """The same positions without `NTKScaling`, which is nothing but another base."""
    if not isinstance(scaling, NTKScaling):
        return base, scaling
    if head_dim > 2:
        base = base * scaling.factor ** (head_dim / (head_dim - 2))
    return base, None


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Entries of config.json, under the names of transformers 5 and the older ones.

    A transformers before 5 does not know `rope_parameters` and would take its default
    base without a word.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    extra: dict[str, Any] = {}
    if isinstance(scaling, LinearScaling):
        rope = {"rope_type": "linear", "factor": float(scaling.factor)}
    elif isinstance(scaling, Llama3Scaling):
        rope = {
            "rope_type": "llama3",
            "factor": float(scaling.factor),
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": int(scaling.original_max_len),
        }
    elif isinstance(scaling, YaRNScaling):
        rope = {
            "rope_type": "yarn",
            "factor": float(scaling.factor),
            "original_max_position_embeddings": int(scaling.original_max_len),
            "beta_fast": float(scaling.beta_fast),
            "beta_slow": float(scaling.beta_slow),
        }
        if scaling.attention_factor is not None:
            rope["attention_factor"] = float(scaling.attention_factor)
    if isinstance(scaling, Llama3Scaling | YaRNScaling):
        longest = int(scaling.original_max_len * scaling.factor)
        extra["max_position_embeddings"] = longest
    base = float(base)
    return {
        "rope_parameters": {**rope, "rope_theta": base},
        "rope_theta": base,
        "rope_scaling": None if scaling is None else rope,
        **extra,
    }
