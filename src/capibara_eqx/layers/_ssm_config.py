import dataclasses
from collections.abc import Mapping
from typing import Any

from ..internal import check_choice, check_flag, check_keys, check_size


_MAMBA = (
    *("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init"),
    *("dt_scale", "bias", "conv_bias", "use_fast_path"),
)
_S4D = ("d_state", "dt_min", "dt_max", "use_fast_path", "dropout")
# Beside `d_model`, which every layer has.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "mamba": _MAMBA,
    "mamba2": tuple(
        name for name in _MAMBA if name not in ("dt_rank", "dt_init", "dt_scale")
    ),
    "s4": _S4D,
    "s4d": _S4D,
    "s5": ("d_state", "dt_min", "dt_max", "dropout"),
    "linear": ("d_state", "d_conv", "dt_min", "dt_max", "use_fast_path", "dropout"),
    "hybrid": _MAMBA,
    "ultra": (*_MAMBA, "dropout"),
}


@dataclasses.dataclass(frozen=True)
class SSMConfig:
    """What `create_ssm_layer` builds a layer from, see `create_ssm_config`.

    **Raises:**

    `ValueError` for an unknown `layer_type`, a parameter that is not one of its layer's
    and has another value than its default, or a flag that is no boolean. The layer
    itself checks the values.

    !!! example

        ```python
        config = SSMConfig("mamba", d_model=64, d_state=8)
        layer = create_ssm_layer(config, key=jax.random.key(0))
        ```
    """

    layer_type: str
    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    bias: bool = False
    conv_bias: bool = True
    use_fast_path: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        check_choice("layer_type", self.layer_type, PARAMETERS)
        check_size("d_model", self.d_model)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                check_flag(field.name, value)
            elif isinstance(field.default, int):
                check_size(field.name, value)
            if value != field.default:
                _check_used(field.name, self.layer_type)


@dataclasses.dataclass(frozen=True)
class SSMHybridLayerConfig:
    """What `create_ssm_layer` builds a `HybridSSM` from that switches by length.

    Rows of more than `ssm_threshold` tokens go to the state space, the others to
    attention; `use_mamba` and `use_transformer` say which of the two there is. See
    `HybridSSM`, which checks the values.

    !!! example

        ```python
        config = SSMHybridLayerConfig(d_model=64, ssm_threshold=4)
        y = create_ssm_layer(config, key=jax.random.key(0))(x)  # five tokens: the ssm
        ```
    """

    d_model: int
    ssm_threshold: int = 2048
    use_mamba: bool = True
    use_transformer: bool = True

    def __post_init__(self):
        check_flag("use_mamba", self.use_mamba)
        check_flag("use_transformer", self.use_transformer)


def create_ssm_config(
    layer_type: str,
    d_model: int,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    dt_rank: int | str = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    bias: bool = False,
    conv_bias: bool = True,
    use_fast_path: bool = True,
    dropout: float = 0.0,
    **unknown: Any,
) -> SSMConfig:
    """The configuration of a state space layer, for `create_ssm_layer`.

    | `layer_type` | layer | takes, beside `d_model` |
    | --- | --- | --- |
    | `mamba` | `Mamba` | all but `dropout` |
    | `mamba2` | `Mamba2` | all but `dropout`, `dt_rank`, `dt_init`, `dt_scale` |
    | `s4`, `s4d` | `S4D` | `d_state`, `dt_min`, `dt_max`, `use_fast_path`, `dropout` |
    | `s5` | `S5` | `d_state`, `dt_min`, `dt_max`, `dropout` |
    | `linear` | `LinearSSM` | as `s4`, and `d_conv` |
    | `hybrid` | `HybridSSM` of a Mamba and attention | as `mamba`, for the Mamba |
    | `ultra` | `UltraSSM` around a Mamba | as `mamba`, and `dropout` |

    **Arguments:**

    - `layer_type`: one of the table.
    - `d_model`: width of input and output.
    - `d_state`: states a channel; of a head in `mamba2`; of all channels in `s5` and
        `linear`. Even in `s4`, `s4d` and `s5`.
    - `d_conv`: taps of the convolution, in tokens.
    - `expand`: channels inside, `expand * d_model`.
    - `dt_rank`: rank of the map that gives the step sizes; `"auto"` is
        `ceil(d_model / 16)`.
    - `dt_min`, `dt_max`: range of the step sizes at initialisation.
    - `dt_init`, `dt_scale`: `"random"` or `"constant"`, and the size of the step-size
        weights, see `Mamba`.
    - `bias`: whether the input and output maps have biases.
    - `conv_bias`: whether the convolution has one.
    - `use_fast_path`: whether the fused kernels of the platform may run
        (`implementation=None`), or the portable form alone (`"xla"`). In `s4` and `s4d`
        whether a row is read as one convolution or token by token. The values are the
        same up to rounding.
    - `dropout`: probability of dropping an element; an active one needs a `key` in
        the call.
    - `unknown`: there are no others.

    **Returns:**

    An immutable `SSMConfig`.

    **Raises:**

    `ValueError` for an unknown parameter or `layer_type`, with the nearest that there
    is, or for a parameter that was set and is not one of the layer's.

    !!! example

        ```python
        config = create_ssm_config(layer_type="s4", d_model=64, d_state=32, dropout=0.1)
        layer = create_ssm_layer(config, key=jax.random.key(0))
        y = layer(x, key=jax.random.key(1))            # (*batch, seq, 64)
        ```
    """
    names = [field.name for field in dataclasses.fields(SSMConfig)]
    check_keys("create_ssm_config", unknown, names)
    return SSMConfig(
        layer_type,
        d_model,
        d_state,
        d_conv,
        expand,
        dt_rank,
        dt_min,
        dt_max,
        dt_init,
        dt_scale,
        bias,
        conv_bias,
        use_fast_path,
        dropout,
    )


def _check_used(name: str, layer_type: str) -> None:
    if name not in PARAMETERS[layer_type]:
        users = [repr(kind) for kind, names in PARAMETERS.items() if name in names]
        raise ValueError(
            f"`{name}` would not be used: layer_type {layer_type!r} has no such "
            f"parameter, only {', '.join(users)} have. Leave it out."
        )
