import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..arrays import LoRA
from ._config_entries import Entries


CONFIG = "adapter_config.json"
# Entries that are read, or that change no result of an adapter that is there.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights")
_READ += ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_WITHOUT_EFFECT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")
_WITHOUT_EFFECT += ("inference_mode", "peft_version", "runtime_config")
_WITHOUT_EFFECT += ("megatron_config", "megatron_core", "qalora_group_size")
# Which modules have adapters, which the names of the tensors say, and how they began.
_WITHOUT_EFFECT += ("target_modules", "exclude_modules", "layers_to_transform")
_WITHOUT_EFFECT += ("layers_pattern", "loftq_config", "eva_config", "corda_config")
_WITHOUT_EFFECT += ("lora_ga_config",)
# Beginnings that leave the weights under the adapter as they are.
_INNOCENT = (True, False, None, "gaussian")


class AdapterConfig(NamedTuple):
    """What an adapter_config.json says of the adapters."""

    rank: int
    alpha: float
    dropout: float
    rs: bool
    dora: bool
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]

    def spec(self, module: str) -> LoRA:
        """The adapter of a module, by its name in transformers.

        **Raises:**

        `ValueError` for values that no adapter has.
        """
        return LoRA(
            rank=_by_pattern(self.ranks, module, self.rank),
            alpha=_by_pattern(self.alphas, module, self.alpha),
            dropout=self.dropout,
            rs=self.rs,
            dora=self.dora,
        )


def read_adapter_config(
    entries: Mapping[str, Any], problems: list[str]
) -> AdapterConfig:
    """Reads the entries and collects what is wrong with them."""
    config = Entries(entries, problems, CONFIG)
    if config.get("peft_type") != "LORA":
        config.refuse(f"`peft_type` must be 'LORA', got {config.get('peft_type')!r}")
    if config.get("bias") not in (None, "none"):
        config.refuse(
            f"`bias` {config.get('bias')!r} is not supported, only 'none': trained "
            "biases belong into the model. Merge them with peft"
        )
    if config.get("modules_to_save"):
        config.refuse(
            f"`modules_to_save` {config.get('modules_to_save')!r} is not supported: "
            "layers that are whole belong into the model. Merge them with peft"
        )
    initial = config.get("init_lora_weights")
    if initial not in _INNOCENT:
        config.refuse(
            f"`init_lora_weights` {initial!r} may have changed the weights under the "
            "adapter. Save it with peft's `path_initial_model_for_weight_conversion`"
        )
    known = {*_READ, *_WITHOUT_EFFECT, "modules_to_save"}
    for name, value in entries.items():
        if name not in known and value:
            config.refuse(f"`{name}` {value!r} is not supported")
    return AdapterConfig(
        rank=config.size("r"),
        alpha=config.number("lora_alpha", above=0),
        dropout=config.number("lora_dropout", 0.0),
        rs=config.flag("use_rslora", False),
        dora=config.flag("use_dora", False),
        ranks=_patterns(config, "rank_pattern"),
        alphas=_patterns(config, "alpha_pattern"),
    )


def write_adapter_config(
    specs: Mapping[str, LoRA], targets: list[str], problems: list[str]
) -> dict[str, Any]:
    """The entries for adapters of modules, by their names in transformers."""
    for field in ("rs", "dora", "dropout"):
        values = sorted({getattr(spec, field) for spec in specs.values()})
        if len(values) > 1:
            problems.append(
                f"adapters differ in `{field}`, of which a folder has one: {values}"
            )
    ranks = {module: spec.rank for module, spec in specs.items()}
    alphas = {module: _number(spec.alpha) for module, spec in specs.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    spec = next(iter(specs.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "rank_pattern": _others(ranks, rank),
        "alpha_pattern": _others(alphas, alpha),
        "use_rslora": spec.rs,
        "use_dora": spec.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": targets,
        "base_model_name_or_path": None,
        "task_type": "CAUSAL_LM",
    }


def _patterns(config: Entries, name: str) -> Mapping[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        config.refuse(f"`{name}` must be an object, got {patterns!r}")
        return {}
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            config.refuse(f"`{name}`: {pattern!r} is no regular expression ({error})")
            return {}
    return patterns


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """As peft reads them: the first that matches the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _others(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Whole names, which as patterns match themselves alone."""
    return {name: value for name, value in values.items() if value != common}


def _number(value: float | None) -> int | float | None:
    """A whole one as JSON and peft write it."""
    return int(value) if value is not None and float(value).is_integer() else value
