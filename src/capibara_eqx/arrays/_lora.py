import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import DTypeLike

from ..internal import check_flag, check_range, check_size


@dataclasses.dataclass(frozen=True)
class LoRA:
    r"""A weight with a trainable update of low rank, for `transforms.lora`.

    $$W' = W + s\,B A, \quad s = \alpha / r$$

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685.
    With `rs` the scale is $\alpha / \sqrt r$, so that updates of a high rank learn as
    fast: Kalajdzievski, *A Rank Stabilization Scaling Factor for Fine-Tuning with
    LoRA*, arXiv 2312.03732. With `dora` the length of every row is a parameter of its
    own: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353,

    $$W'_o = m_o \frac{(W + s\,B A)_o}{\mathrm{sg}\,\lVert (W + s\,B A)_o \rVert}$$

    where $\mathrm{sg}$ stops the gradient.

    **Arguments:**

    - `rank`: $r$.
    - `alpha`: $\alpha$; as `rank` if not given.
    - `dropout`: probability of zeroing an input of $A$, in training.
    - `rs`: whether to divide by $\sqrt r$.
    - `dora`: whether rows have lengths of their own.
    - `dtype`: of the adapter; float32, or float64 for such weights, if not given.

    **Raises:**

    `ValueError` for a rank or an `alpha` that is not positive, a `dropout` outside of
    [0, 1), or a `dtype` that is not of floating point.

    !!! example

        ```python
        LoRA(8)
        LoRA(64, alpha=16, rs=True, dropout=0.05)
        ```
    """

    rank: int
    alpha: int | float | None = None
    dropout: int | float = 0.0
    rs: bool = False
    dora: bool = False
    dtype: DTypeLike | None = None

    def __post_init__(self):
        check_size("rank", self.rank)
        if self.alpha is not None:
            hint = "It is the scale of the update times the rank; often 1 or 2 ranks."
            check_range("alpha", self.alpha, above=0, hint=hint)
        hint = "With 1 nothing would reach the adapter."
        check_range("dropout", self.dropout, least=0, below=1, hint=hint)
        check_flag("rs", self.rs)
        check_flag("dora", self.dora)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"`dtype` must be of floating point, got {jnp.dtype(self.dtype)}: an "
                "adapter learns. To compress the weight under it, use `quantize`."
            )
        # One spelling, so that equal specs compare equal.
        alpha = self.rank if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", float(alpha))
        object.__setattr__(self, "dropout", float(self.dropout))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def __str__(self) -> str:
        kind = "DoRA" if self.dora else "LoRA"
        return f"{'rs' if self.rs else ''}{kind} r{self.rank}"

    @property
    def scale(self) -> float:
        r"""What $B A$ is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rs else self.rank)
