import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from ..internal import (
    check_choice,
    check_positive,
    check_probability,
    nearest,
)


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; `config.json` in its folder, the command's flags.

    Each field is described in its metadata, which the command line shows as help.
    Exactly one of `steps` and `seconds` bounds the run.
    """

    # What is read.
    text: str | None = _setting(None, "text file or folder; none: Python's own library")
    pattern: str = _setting("*", "which file names of a folder to read")
    heldout_fraction: float = _setting(0.04, "share of the text that is held out")
    # The model.
    d_model: int = _setting(96, "width of the residual stream")
    n_layers: int = _setting(2, "number of blocks")
    d_state: int = _setting(16, "states a channel")
    d_conv: int = _setting(4, "taps of the convolution")
    expand: int = _setting(2, "inner channels over d_model")
    dt_rank: int | str = _setting("auto", "rank of the step-size map")
    dt_min: float = _setting(0.001, "smallest step size at initialisation")
    dt_max: float = _setting(0.1, "largest step size at initialisation")
    dt_init: str = _setting("random", "step-size weights: random or constant")
    dt_scale: float = _setting(1.0, "scale of the step-size weights")
    dt_init_floor: float = _setting(1e-4, "no step size is smaller at initialisation")
    bias: bool = _setting(False, "biases in the input and output maps")
    conv_bias: bool = _setting(True, "bias in the convolution")
    activation: str = _setting("silu", "after the convolution: silu, gelu or relu")
    dropout: float = _setting(0.0, "probability of dropping a block's output")
    tie_embeddings: bool = _setting(True, "use the embedding table as the head")
    scan: bool = _setting(False, "scan over the blocks: compile time of one block")
    remat: str | None = _setting(None, "recompute in the backward pass: full or dots")
    implementation: str | None = _setting(None, "of the kernels: xla or reference")
    # The training.
    steps: int | None = _setting(None, "number of steps")
    seconds: float | None = _setting(None, "seconds of training, compiling left out")
    seq_len: int = _setting(256, "bytes of a training window")
    batch_size: int = _setting(8, "windows a step")
    accumulation: int = _setting(1, "parts that a batch is cut into to save memory")
    learning_rate: float = _setting(4e-3, "highest learning rate")
    warmup_fraction: float = _setting(0.05, "share of the run that is warm-up")
    final_fraction: float = _setting(0.05, "last learning rate over the highest")
    weight_decay: float = _setting(0.1, "decay per unit of learning rate")
    clip_norm: float | None = _setting(1.0, "largest norm of the gradient")
    b1: float = _setting(0.9, "Adam's decay of the mean")
    b2: float = _setting(0.95, "Adam's decay of the mean square")
    eps: float = _setting(1e-8, "Adam's epsilon")
    compute_dtype: str = _setting("float32", "of the passes: float32 or bfloat16")
    checkpoint_every: int = _setting(1000, "steps between checkpoints")
    seed: int = _setting(0, "of the initial values, the order of data and dropout")

    def __post_init__(self):
        positive = (
            "d_model n_layers d_state d_conv expand seq_len batch_size accumulation "
            "learning_rate checkpoint_every dt_min dt_max"
        )
        for name in positive.split():
            check_positive(name, getattr(self, name))
        for name in ("dropout", "warmup_fraction", "final_fraction"):
            check_probability(name, getattr(self, name))
        check_choice("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(
                "Give exactly one of `steps` and `seconds`, got "
                f"steps={self.steps} and seconds={self.seconds}."
            )
        bound = "seconds" if self.steps is None else "steps"
        check_positive(bound, getattr(self, bound))
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"`accumulation` = {self.accumulation} must divide `batch_size` = "
                f"{self.batch_size}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON holds them."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`; an unknown name raises `ValueError`."""
        known = [field.name for field in dataclasses.fields(RunConfig)]
        for name in values:
            if name not in known:
                raise ValueError(f"Unknown setting {name!r}.{nearest(name, known)}")
        return RunConfig(**values)


def setting_types() -> dict[str, tuple[type, ...]]:
    """The types that each field of `RunConfig` takes, `NoneType` among them."""
    hints = typing.get_type_hints(RunConfig)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}
