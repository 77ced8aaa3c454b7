from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import DTypeLike, PRNGKeyArray

from ..internal import check_size
from ..layers import Mamba
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
    check_size("n_layers", n_layers)
    model_key, *keys = jax.random.split(key, n_layers + 1)
    blocks = []
    for block_key in keys:
        mixer = Mamba(d_model, dtype=dtype, key=block_key, **mamba)
        weight = mixer.out_proj.weight / n_layers**0.5
        mixer = eqx.tree_at(lambda m: m.out_proj.weight, mixer, weight)
        blocks.append(ResidualBlock(mixer, d_model, dropout, dtype=dtype))
    return LanguageModel(
        vocab_size,
        d_model,
        blocks,
        scan=scan,
        remat=remat,
        tie_embeddings=tie_embeddings,
        dtype=dtype,
        key=model_key,
    )
