import dataclasses
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..internal import check_choice, check_range, check_seed, nearest
from ..kernels._causal_conv.api import BACKENDS as CONV_BACKENDS
from ..kernels._selective_scan.api import BACKENDS as SCAN_BACKENDS
from ._optimizer import OPTIMIZER_BOUNDS


# A model hands one name to both of its kernels.
_IMPLEMENTATIONS = tuple(name for name in SCAN_BACKENDS if name in CONV_BACKENDS)
_EVERY_FILE = "*"
_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "None",
}


def _setting(
    default: Any, help: str, check: Callable[[str, Any], None] | None = None
) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "check": check})


def _range(**bounds: Any) -> Callable[[str, Any], None]:
    return functools.partial(check_range, **bounds)


def _one_of(*choices: str) -> Callable[[str, Any], None]:
    return functools.partial(check_choice, choices=choices)


def _optimizer(name: str) -> Callable[[str, Any], None]:
    return _range(**OPTIMIZER_BOUNDS[name])


def _check_dt_rank(name: str, value: int | str) -> None:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError(
            f"`{name}` must be 'auto' or a positive integer, got {value!r}. 'auto' "
            "gives ceil(d_model / 16)."
        )


_POSITIVE = _range(above=0)
_SHARE = _range(
    least=0, most=1, hint="It is a share of the run, not a number of steps."
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; `config.json` in its folder, the command's flags.

    Each field is described in its metadata, which the command line shows as help.
    Exactly one of `steps` and `seconds` bounds the run.

    **Raises:**

    `ValueError` for a value of another type or out of its range, and for values that
    exclude one another. The names `activation`, `dt_init` and `remat` are checked by
    `build_model`.
    """

    # What is read.
    text: str | None = _setting(None, "text file or folder; none: Python's own library")
    pattern: str = _setting(
        _EVERY_FILE,
        "which file names to read where text is a folder, as '*.md'",
    )
    heldout_fraction: float = _setting(
        0.04,
        "share of the text that is held out",
        _range(above=0, below=1, hint="0.04 holds out one byte of 25."),
    )
    # The model.
    d_model: int = _setting(96, "width of the residual stream", _POSITIVE)
    n_layers: int = _setting(2, "number of blocks", _POSITIVE)
    d_state: int = _setting(16, "states a channel", _POSITIVE)
    d_conv: int = _setting(4, "taps of the convolution", _POSITIVE)
    expand: int = _setting(2, "inner channels over d_model", _POSITIVE)
    dt_rank: int | str = _setting("auto", "rank of the step-size map", _check_dt_rank)
    dt_min: float = _setting(0.001, "smallest step size at initialisation", _POSITIVE)
    dt_max: float = _setting(0.1, "largest step size at initialisation", _POSITIVE)
    dt_init: str = _setting("random", "step-size weights: random or constant")
    dt_scale: float = _setting(1.0, "scale of the step-size weights", _POSITIVE)
    dt_init_floor: float = _setting(
        1e-4,
        "no step size is smaller at initialisation",
        _range(least=0, hint="0 sets no floor."),
    )
    bias: bool = _setting(False, "biases in the input and output maps")
    conv_bias: bool = _setting(True, "bias in the convolution")
    activation: str = _setting("silu", "after the convolution: silu, gelu or relu")
    dropout: float = _setting(
        0.0,
        "probability of dropping a block's output",
        _range(least=0, most=1, hint="0.1 drops one output of ten."),
    )
    tie_embeddings: bool = _setting(True, "use the embedding table as the head")
    scan: bool = _setting(False, "scan over the blocks: compile time of one block")
    remat: str | None = _setting(None, "recompute in the backward pass: full or dots")
    implementation: str | None = _setting(
        None,
        "of the kernels, such as cpu or xla; see capibara info --kernels",
        _one_of(*_IMPLEMENTATIONS),
    )
    # The training.
    steps: int | None = _setting(None, "number of steps", _POSITIVE)
    seconds: float | None = _setting(
        None, "seconds of training, compiling left out", _POSITIVE
    )
    seq_len: int = _setting(256, "bytes of a training window", _POSITIVE)
    batch_size: int = _setting(8, "windows a step", _POSITIVE)
    accumulation: int = _setting(
        1,
        "parts that a batch is cut into to save memory",
        _range(above=0, hint="1 does not cut the batch."),
    )
    learning_rate: float = _setting(4e-3, "highest learning rate", _POSITIVE)
    warmup_fraction: float = _setting(0.05, "share of the run that is warm-up", _SHARE)
    final_fraction: float = _setting(
        0.05,
        "last learning rate over the highest",
        _range(least=0, most=1, hint="It is a share of `learning_rate`."),
    )
    weight_decay: float = _setting(
        0.1, "decay per unit of learning rate", _optimizer("weight_decay")
    )
    clip_norm: float | None = _setting(
        1.0, "largest norm of the gradient", _optimizer("clip_norm")
    )
    b1: float = _setting(0.9, "Adam's decay of the mean", _optimizer("b1"))
    b2: float = _setting(0.95, "Adam's decay of the mean square", _optimizer("b2"))
    eps: float = _setting(1e-8, "Adam's epsilon", _optimizer("eps"))
    compute_dtype: str = _setting(
        "float32", "of the passes: float32 or bfloat16", _one_of("float32", "bfloat16")
    )
    checkpoint_every: int = _setting(
        1000,
        "steps between checkpoints",
        _range(above=0, hint="A number beyond the last step saves only the end."),
    )
    seed: int = _setting(
        0, "of the initial values, the order of data and dropout", check_seed
    )

    def __post_init__(self):
        types = setting_types()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, types[field.name])
            check = field.metadata["check"]
            if check is not None and value is not None:
                check(field.name, value)
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                "Give exactly one of `steps` and `seconds`, got "
                f"steps={self.steps} and seconds={self.seconds}."
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"`accumulation` = {self.accumulation} must divide `batch_size` = "
                f"{self.batch_size}. Choose a divisor of it, or another `batch_size`."
            )
        if self.text is None and self.pattern != _EVERY_FILE:
            raise ValueError(
                f"`pattern` must be {_EVERY_FILE!r} where `text` is None, got "
                f"{self.pattern!r}: it chooses among the files of a folder. Give the "
                "folder as `text` (--text FOLDER), or leave `pattern` out."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON holds them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`.

        **Arguments:**

        - `values`: every field by its name.

        **Returns:**

        The settings.

        **Raises:**

        `ValueError` for something that is no such object, for a name that is unknown
        or missing, and for a value of another type or out of its range.
        """
        if not isinstance(values, dict):
            raise ValueError(
                "The settings must be an object of names and values, got "
                f"{values!r:.60} ({type(values).__name__}). Give what "
                "`RunConfig.to_dict` returned, or start a new run."
            )
        known = [field.name for field in dataclasses.fields(RunConfig)]
        for name in values:
            if name not in known:
                raise ValueError(f"Unknown setting {name!r}.{nearest(name, known)}")
        missing = [name for name in known if name not in values]
        if missing:
            raise ValueError(
                f"Settings are missing: {', '.join(missing)}. Expected all "
                f"{len(known)} that `RunConfig.to_dict` gives, got {len(values)}. "
                "Defaults would describe another model: restore them, or start a new "
                "run."
            )
        return RunConfig(**values)


def setting_types() -> dict[str, tuple[type, ...]]:
    """The types that each field of `RunConfig` takes, `NoneType` among them."""
    hints = typing.get_type_hints(RunConfig)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def _check_type(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """Raise `ValueError` unless `value` is of one of `kinds`; a bool is no integer."""
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
    if not fits:
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(
            f"`{name}` must be {expected}, got {value!r} ({type(value).__name__})."
        )
