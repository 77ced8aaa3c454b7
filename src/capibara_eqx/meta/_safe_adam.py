import optax
from jaxtyping import Array, Float, PyTree

from ..internal import check_range
from ._sgd import sgd


def safe_adam(
    rates: float | PyTree[Float[Array, "..."]] = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 1e-8,
    per_step: bool = False,
) -> optax.GradientTransformation:
    r"""Adam whose steps have derivatives where gradients are zero, for inner loops.

    $$\theta \leftarrow \theta - \alpha\, \frac{\hat m}{\sqrt{\hat v + \epsilon_r} +
    \epsilon}$$

    Kingma and Ba, arXiv 1412.6980. The root has no derivative at 0. A weight whose
    gradient is zero on the whole support set, as under a ReLU that is off, makes outer
    gradients NaN in `optax.adam`, `adamw`, `nadam`, `nadamw`, `radam`, `amsgrad`,
    `lamb`, `adafactor`, `optimistic_adam` and `optimistic_adam_v2`, unless
    $\epsilon_r$ is positive. Gradients much smaller than $\sqrt{\epsilon_r}$ make
    smaller steps than those of Adam.

    **Arguments:**

    - `rates`, `per_step`: as for `sgd`; outer gradients reach them.
    - `b1`, `b2`: decay of the moments.
    - `eps`: $\epsilon$.
    - `eps_root`: $\epsilon_r$, positive.

    **Returns:**

    An `optax.GradientTransformation`.

    **Raises:**

    `ValueError` for an `eps_root` that is not positive, decays outside of [0, 1), a
    negative `eps`, and as `sgd`.

    !!! example

        ```python
        adapt(loss, model, support, optimizer=safe_adam(1e-2), steps=5)
        ```
    """
    check_range(
        "eps_root",
        eps_root,
        above=0,
        hint="optax.adam is the one without it, whose second derivatives may be NaN.",
    )
    for name, value in (("b1", b1), ("b2", b2)):
        check_range(name, value, least=0, below=1)
    check_range("eps", eps, least=0)
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    return optax.chain(moments, sgd(rates, per_step=per_step))
