"""Layers for Equinox, written for research: every model is a PyTree, and every
operation on a model is a pure function of it.

The names live in the sub-packages, which are loaded when first used, so that
`import capibara_eqx` alone costs next to nothing:

- `capibara_eqx.kernels`: pure functions on arrays, such as `selective_scan`.
- `capibara_eqx.arrays`: nodes that stand where a weight stood, such as `AffineArray`.
- `capibara_eqx.layers`: `equinox.Module`s, such as `Mamba`.
- `capibara_eqx.transforms`: functions from model to model, such as `quantize`.
- `capibara_eqx.meta`: inner loops that differentiate, such as `adapt`.
- `capibara_eqx.models`: blocks, stacks, language models and `generate`.
- `capibara_eqx.interop`: Hugging Face checkpoints in and out.
- `capibara_eqx.train`: datasets, the training step, checkpoints and the loop.
- `capibara_eqx.cli`: the `capibara` command.

!!! example

    ```python
    import capibara_eqx as cx
    import jax

    layer = cx.layers.Mamba(d_model=64, key=jax.random.key(0))
    ```
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_SUBPACKAGES = (
    "arrays",
    "cli",
    "interop",
    "kernels",
    "layers",
    "meta",
    "models",
    "train",
    "transforms",
)

if TYPE_CHECKING:
    from . import arrays as arrays
    from . import cli as cli
    from . import interop as interop
    from . import kernels as kernels
    from . import layers as layers
    from . import meta as meta
    from . import models as models
    from . import train as train
    from . import transforms as transforms
else:
    # Hidden from type checkers, which would otherwise accept any name at all.

    def __getattr__(name: str) -> ModuleType:
        if name in _SUBPACKAGES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its sub-packages are "
            f"{', '.join(_SUBPACKAGES)}"
        )

    def __dir__() -> list[str]:
        return sorted({*globals(), *_SUBPACKAGES})
