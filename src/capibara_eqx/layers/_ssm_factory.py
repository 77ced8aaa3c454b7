from collections.abc import Callable, Mapping

import jax
from jaxtyping import PRNGKeyArray

from ._hybrid_ssm import HybridSSM
from ._linear_ssm import LinearSSM
from ._mamba import Mamba
from ._mamba2 import Mamba2
from ._mixer import AbstractSequenceMixer
from ._s4d import S4D
from ._s5 import S5
from ._ssm_config import SSMConfig, SSMHybridLayerConfig
from ._ultra_ssm import UltraSSM


# As in the paper, unless it does not divide the channels.
_LARGEST_HEAD = 64
# Tokens that `ultra` reads at once: longer rows take memory for so many.
_CHUNK = 2048


def create_ssm_layer(
    config: SSMConfig | SSMHybridLayerConfig, *, key: PRNGKeyArray | None = None
) -> AbstractSequenceMixer:
    """The state space layer of a configuration.

    What a configuration does not say has the default of the layer, but for:

    - `mamba2`: heads of 64 channels, or as many below as divide `expand * d_model`.
    - `hybrid`: switches at 2048 tokens; pass an `SSMHybridLayerConfig` for another
        threshold, whose Mamba has its own defaults, or build a `HybridSSM`.
    - `ultra`: computes in bfloat16 with a state in float32, rematerialises under
        derivatives, reads 2048 tokens at once, and drops elements of the mixer's
        output.

    **Arguments:**

    - `config`: from `create_ssm_config`, or an `SSMHybridLayerConfig`.
    - `key`: for the initial values. Without one it is `jax.random.key(0)`, so that all
        layers of one configuration made without a key are equal: pass one of its own to
        each layer of a model.

    **Returns:**

    A sequence mixer from `d_model` to `d_model`.

    **Raises:**

    `ValueError` for something that is no configuration, or values that do not fit the
    layer.

    !!! example

        ```python
        config = create_ssm_config(layer_type="mamba", d_model=64, d_state=16)
        layer = create_ssm_layer(config, key=jax.random.key(0))
        y = layer(x)                                   # (*batch, seq, 64)
        y, cache = layer.prefill(x, layer.init_cache((2,)))
        ```
    """
    if key is None:
        key = jax.random.key(0)
    if isinstance(config, SSMHybridLayerConfig):
        return HybridSSM(
            config.d_model,
            config.ssm_threshold,
            config.use_mamba,
            config.use_transformer,
            key=key,
        )
    if not isinstance(config, SSMConfig):
        raise ValueError(
            "`config` must be what `create_ssm_config` returns, or an "
            f"SSMHybridLayerConfig; got {config!r}."
        )
    return _BUILDERS[config.layer_type](config, key)


def _implementation(config: SSMConfig) -> str | None:
    return None if config.use_fast_path else "xla"


def _mamba(config: SSMConfig, key: PRNGKeyArray) -> Mamba:
    return Mamba(
        config.d_model,
        config.d_state,
        config.d_conv,
        config.expand,
        config.dt_rank,
        config.dt_min,
        config.dt_max,
        config.dt_init,
        config.dt_scale,
        bias=config.bias,
        conv_bias=config.conv_bias,
        implementation=_implementation(config),
        key=key,
    )


def _mamba2(config: SSMConfig, key: PRNGKeyArray) -> Mamba2:
    return Mamba2(
        config.d_model,
        config.d_state,
        config.d_conv,
        config.expand,
        _head_dim(config),
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        bias=config.bias,
        conv_bias=config.conv_bias,
        implementation=_implementation(config),
        key=key,
    )


def _head_dim(config: SSMConfig) -> int:
    for size in range(_LARGEST_HEAD, 1, -1):
        if config.expand * config.d_model % size == 0:
            return size
    return 1


def _s4d(config: SSMConfig, key: PRNGKeyArray) -> S4D:
    return S4D(
        config.d_model,
        config.d_state,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dropout_rate=config.dropout,
        mode="convolution" if config.use_fast_path else "recurrent",
        key=key,
    )


def _s5(config: SSMConfig, key: PRNGKeyArray) -> S5:
    return S5(
        config.d_model,
        config.d_state,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dropout_rate=config.dropout,
        key=key,
    )


def _linear(config: SSMConfig, key: PRNGKeyArray) -> LinearSSM:
    return LinearSSM(
        config.d_model,
        config.d_model,
        config.d_state,
        config.d_conv,
        config.dropout,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        implementation=_implementation(config),
        key=key,
    )


def _hybrid(config: SSMConfig, key: PRNGKeyArray) -> HybridSSM:
    ssm_key, key = jax.random.split(key)
    return HybridSSM(config.d_model, ssm=_mamba(config, ssm_key), key=key)


def _ultra(config: SSMConfig, key: PRNGKeyArray) -> UltraSSM:
    mixer_key, key = jax.random.split(key)
    return UltraSSM(
        _mamba(config, mixer_key),
        config.d_model,
        dropout_rate=config.dropout,
        remat=True,
        chunk_size=_CHUNK,
        key=key,
    )


_BUILDERS: Mapping[str, Callable[[SSMConfig, PRNGKeyArray], AbstractSequenceMixer]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "s4": _s4d,
    "s4d": _s4d,
    "s5": _s5,
    "linear": _linear,
    "hybrid": _hybrid,
    "ultra": _ultra,
}
