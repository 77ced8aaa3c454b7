from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import DTypeLike, PRNGKeyArray

from ..internal import check_size
from ..layers import Mamba, Mamba2
from ._block import ResidualBlock
from ._language_model import LanguageModel


def mamba_language_model(
    vocab_size: int,
    d_model: int,
    n_layers: int,
    *,
    dropout: float = 0.0,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    tie_embeddings: bool = True,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
    **mamba: Any,
) -> LanguageModel:
    r"""A language model of identical Mamba blocks, initialised as the original.

    The output map of each layer is scaled by $1/\sqrt{\mathrm{n\_layers}}$, so that the
    residual stream has the same variance whatever the depth. Gu and Dao, *Mamba*,
    arXiv 2312.00752.

    **Arguments:**

    - `vocab_size`, `d_model`, `tie_embeddings`: see `LanguageModel`.
    - `n_layers`: number of blocks.
    - `dropout`: see `ResidualBlock`.
    - `scan`, `remat`: see `Stack`.
    - `dtype`: of the parameters; float32 if not given.
    - `key`: for the initial values.
    - `mamba`: further arguments of `Mamba`: `d_state`, `d_conv`, `expand`, ...

    **Returns:**

    A `LanguageModel`.

    **Raises:**

    `ValueError` for sizes that are not positive, and what the parts raise.

    !!! example

        ```python
        model = mamba_language_model(256, 64, 2, d_state=16, key=jax.random.key(0))
        ```
    """
    mixer = partial(Mamba, d_model, dtype=dtype, **mamba)
    return _of_mixers(
        mixer,
        vocab_size,
        d_model,
        n_layers,
        dropout,
        {"scan": scan, "remat": remat, "tie_embeddings": tie_embeddings},
        dtype,
        key,
    )


def mamba2_language_model(
    vocab_size: int,
    d_model: int,
    n_layers: int,
    *,
    dropout: float = 0.0,
    scan: bool = False,
    remat: str | Callable[..., bool] | None = None,
    tie_embeddings: bool = True,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
    **mamba2: Any,
) -> LanguageModel:
    r"""A language model of identical Mamba-2 blocks, initialised as the original.

    The output map of each layer is scaled by $1/\sqrt{\mathrm{n\_layers}}$, so that the
    residual stream has the same variance whatever the depth. Dao and Gu, *Transformers
    are SSMs*, arXiv 2405.21060.

    **Arguments:**

    - `vocab_size`, `d_model`, `tie_embeddings`: see `LanguageModel`.
    - `n_layers`: number of blocks.
    - `dropout`: see `ResidualBlock`.
    - `scan`, `remat`: see `Stack`.
    - `dtype`: of the parameters; float32 if not given.
    - `key`: for the initial values.
    - `mamba2`: further arguments of `Mamba2`: `d_state`, `head_dim`, `n_groups`, ...

    **Returns:**

    A `LanguageModel`.

    **Raises:**

    `ValueError` for sizes that are not positive, and what the parts raise.

    !!! example

        ```python
        model = mamba2_language_model(256, 64, 2, d_state=64, key=jax.random.key(0))
        ```
    """
    mixer = partial(Mamba2, d_model, dtype=dtype, **mamba2)
    return _of_mixers(
        mixer,
        vocab_size,
        d_model,
        n_layers,
        dropout,
        {"scan": scan, "remat": remat, "tie_embeddings": tie_embeddings},
        dtype,
        key,
    )


def _of_mixers(
    make: Callable[..., Mamba | Mamba2],
    vocab_size: int,
    d_model: int,
    n_layers: int,
    dropout: float,
    options: dict[str, Any],
    dtype: DTypeLike | None,
    key: PRNGKeyArray,
) -> LanguageModel:
    """Residual blocks of mixers that `make` builds, their output maps scaled."""
    check_size("n_layers", n_layers)
    model_key, *keys = jax.random.split(key, n_layers + 1)
    blocks = []
    for block_key in keys:
        mixer = make(key=block_key)
        weight = mixer.out_proj.weight / n_layers**0.5
        mixer = eqx.tree_at(lambda m: m.out_proj.weight, mixer, weight)
        blocks.append(ResidualBlock(mixer, d_model, dropout, dtype=dtype))
    return LanguageModel(
        vocab_size, d_model, blocks, dtype=dtype, key=model_key, **options
    )
