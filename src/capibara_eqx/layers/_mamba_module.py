"""Mamba behind a dictionary: configured by one, and returning one.

The spellings are those of the documents that ask for this protocol; everywhere else in
the library they are `d_model` and `expand`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..internal import check_choice, check_flag, check_keys, check_sequence, check_size
from ..kernels import traced_implementations
from ._mamba import Mamba


_ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "relu": "relu"}
_SCAN_TYPES = ("linear", "associative")
# What a Pallas kernel is in a program that was lowered for a TPU.
_TPU_KERNEL = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """The configuration of a `MambaModule`, which takes it as a dictionary too.

    - `hidden_size`: width of input and output, `d_model` of `Mamba`.
    - `d_state`: states a channel.
    - `d_conv`: taps of the convolution, in tokens.
    - `expand_factor`: channels inside, `expand_factor * hidden_size`.
    - `dt_rank`: rank of the map that gives the step sizes.
    - `activation`: after the convolution: `"swish"`, `"gelu"` or `"relu"`.
    - `use_tpu_optimizations`: whether fused kernels may run: Pallas on a TPU, those of
        the platform elsewhere. Without them everything runs in the portable form.
    - `scan_type`: `"linear"` reads the tokens one after the other, `"associative"` as a
        parallel prefix sum, which has no fused kernel: beside it
        `use_tpu_optimizations` concerns the convolution alone. Values are the same up
        to rounding. The associative scan has a logarithmic depth, for a TPU; on a CPU
        it is several times slower.
    - `enabled`: whether the module is to run, as tables of modules have it.

    **Raises:**

    `ValueError` for a size that is not positive, a flag that is no boolean, or an
    unknown `activation` or `scan_type`.

    !!! example

        ```python
        config = MambaConfig(hidden_size=64, dt_rank=4, scan_type="linear")
        outputs = MambaModule(config, key=jax.random.key(0))(x)
        ```
    """

    hidden_size: int = 768
    d_state: int = 64
    d_conv: int = 4
    expand_factor: int = 2
    dt_rank: int = 32
    activation: str = "swish"
    use_tpu_optimizations: bool = True
    scan_type: str = "associative"
    enabled: bool = True

    def __post_init__(self):
        for name in ("hidden_size", "d_state", "d_conv", "expand_factor", "dt_rank"):
            check_size(name, getattr(self, name))
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_flag("use_tpu_optimizations", self.use_tpu_optimizations)
        check_choice("scan_type", self.scan_type, _SCAN_TYPES)
        check_flag("enabled", self.enabled)


class MambaMetrics(TypedDict):
    """What a call of a `MambaModule` did, read from the program that it traced.

    - `mamba_active`: whether the module is enabled, which it is where there is output.
    - `complexity`: how `"work"` and `"depth"`, the longest chain of steps that wait for
        each other, grow with the length `n` of a row. The work is linear in either
        scan; only the depth of the associative one is logarithmic.
    - `sequence_length`, `d_state`: tokens of a row, states a channel.
    - `selective_scan_used`: whether there is a selective scan in the program.
    - `tpu_optimized`: whether it runs on a TPU with a Pallas kernel in it.
    - `state_bytes`: of all that is remembered from token to token, of all rows; not a
        function of the length.
    """

    mamba_active: bool
    complexity: dict[str, str]
    sequence_length: int
    d_state: int
    selective_scan_used: bool
    tpu_optimized: bool
    state_bytes: int


class MambaOutput(TypedDict):
    """`output`, with the shape of the input, and `metrics`, see `MambaMetrics`."""

    output: Array
    metrics: MambaMetrics


class MambaModule(eqx.Module):
    """`Mamba` behind the protocol of modules that take and return dictionaries.

    The layer is the field `mixer`: `module.mixer(x)` is the output alone, and has
    packing, caches and `step`. Under `jit` metrics are constants of Python, as
    `eqx.filter_jit` can return them; for `jax.jit` take `module(x)["output"]` or the
    mixer.

    !!! example

        ```python
        module = MambaModule({"hidden_size": 64, "d_state": 16, "dt_rank": 4})
        outputs = module(x, training=False)
        outputs["output"].shape                        # (*batch, seq, 64)
        outputs["metrics"]["complexity"]["depth"]      # "O(log n)"
        ```
    """

    mixer: Mamba
    config: MambaConfig = eqx.field(static=True)

    def __init__(
        self,
        config: MambaConfig | Mapping[str, Any] | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `config`: a `MambaConfig`, or a dictionary with some of its fields, such as a
            table of a TOML file; the defaults if not given.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values. Without one it is `jax.random.key(0)`, so that
            all modules of one configuration made without a key are equal.

        **Raises:**

        `ValueError` for a field that there is not, with the nearest that there is, or
        for a value that does not fit.
        """
        if config is None:
            config = {}
        if isinstance(config, Mapping):
            names = [field.name for field in dataclasses.fields(MambaConfig)]
            check_keys("The configuration of a MambaModule", config, names)
            config = MambaConfig(**config)
        if not isinstance(config, MambaConfig):
            raise ValueError(
                "`config` must be a MambaConfig, a mapping with some of its fields, or "
                f"None, got {config!r}."
            )
        portable = None if config.use_tpu_optimizations else "xla"
        associative = config.scan_type == "associative"
        self.mixer = Mamba(
            config.hidden_size,
            config.d_state,
            config.d_conv,
            config.expand_factor,
            config.dt_rank,
            activation=_ACTIVATIONS[config.activation],
            implementation="associative" if associative else portable,
            conv_implementation=portable,
            dtype=dtype,
            key=jax.random.key(0) if key is None else key,
        )
        self.config = config

    @property
    def enabled(self) -> bool:
        """Whether the configuration says that the module is to run."""
        return self.config.enabled

    @jax.named_scope("capibara_eqx.layers.MambaModule")
    def __call__(
        self,
        inputs: Float[Array, "*batch seq hidden_size"]
        | Float[np.ndarray, "*batch seq hidden_size"],
        training: bool = False,
    ) -> MambaOutput:
        """Read whole rows, and say how.

        **Arguments:**

        - `inputs`: `(*batch, seq, hidden_size)`; NumPy arrays are read in the dtype of
            the parameters, those of JAX in their own.
        - `training`: part of the protocol. It changes nothing, since there is neither
            dropout nor a statistic of the batch.

        **Returns:**

        `{"output": ..., "metrics": ...}`: an array with the shape of `inputs`, and
        `MambaMetrics`.

        **Raises:**

        `ValueError` for an input that does not fit, or a module that is not enabled.
        """
        del training
        if not self.enabled:
            raise ValueError(
                "MambaModule: `enabled` is False in its configuration, so it is to be "
                "left out. Ask for `module.enabled` before the call, or enable it."
            )
        x = _as_array(inputs, self.mixer.in_proj.weight.dtype)
        check_sequence("MambaModule", "inputs", x, self.config.hidden_size)
        arrays, rest = eqx.partition(self.mixer, eqx.is_array)
        y = _mixed(rest, arrays, x)
        return MambaOutput(output=y, metrics=self._metrics(rest, arrays, x))

    def _metrics(self, rest, arrays, x) -> MambaMetrics:
        # Shapes, since under `jit` and `grad` there are no values; jax remembers both
        # the trace and what it lowers to.
        shapes = jax.tree.map(_shape_of, (arrays, x))
        traced = _mixed.trace(rest, *shapes)
        ran = traced_implementations(traced.jaxpr)
        scans = [name for operation, name in ran if operation == "selective_scan"]
        depth = "O(n)" if scans else "O(1)"
        if "associative" in scans:
            depth = "O(log n)"
        cache = eqx.filter_eval_shape(self.mixer.init_cache, x.shape[:-2])
        return MambaMetrics(
            mamba_active=self.enabled,
            complexity={"work": "O(n)", "depth": depth},
            sequence_length=x.shape[-2],
            d_state=self.config.d_state,
            selective_scan_used=bool(scans),
            tpu_optimized=_runs_pallas(traced, jax.default_backend()),
            state_bytes=sum(
                math.prod(leaf.shape) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(cache)
            ),
        )


@functools.partial(jax.jit, static_argnums=0)
def _mixed(rest, arrays, x):
    """The one program of a module: what is run is what the metrics are read from."""
    return eqx.combine(arrays, rest)(x)


def _shape_of(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _runs_pallas(traced: jax.stages.Traced, platform: str) -> bool:
    if platform != "tpu":
        return False
    return _TPU_KERNEL in traced.lower(lowering_platforms=("tpu",)).as_text()


def _as_array(inputs: Any, dtype: DTypeLike) -> Array:
    is_numpy = isinstance(inputs, np.ndarray)
    if not (is_numpy or eqx.is_array(inputs)) or not jnp.issubdtype(
        inputs.dtype, jnp.floating
    ):
        got = getattr(inputs, "dtype", type(inputs).__name__)
        raise ValueError(
            "MambaModule: `inputs` must be an array of real floating point numbers, "
            f"got {got}. Convert them, as in `numpy.asarray(inputs, 'float32')`."
        )
    return jnp.asarray(inputs, dtype) if is_numpy else inputs
