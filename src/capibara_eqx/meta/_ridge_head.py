import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float

from ..internal import accumulator_dtype, check_floating
from ._inner_loop import check_batch


def ridge_head(
    x: Float[Array, "*batch n d"],
    y: Float[Array, "*batch n k"],
    log_lambda: float | Float[Array, ""],
) -> Float[Array, "*batch d k"]:
    r"""The linear map that fits a few examples best, in closed form.

    $$W = (X^\top X + \lambda I_d)^{-1} X^\top Y
    = X^\top (X X^\top + \lambda I_n)^{-1} Y$$

    the minimum of $|X W - Y|^2 + \lambda |W|^2$: the head of R2-D2, Bertinetto et al.,
    *Meta-learning with differentiable closed-form solvers*, arXiv 1805.08136. The
    second form (Woodbury) is computed when there are fewer examples than features, so
    that the system is the smaller one. There is no intercept: append a feature of ones
    for one that is drawn to zero as well. Derivatives reach all arguments.

    **Arguments:**

    - `x`: examples, `(*batch, n, d)`; every element of the batch is a problem.
    - `y`: targets, `(*batch, n, k)`; one-hot rows for classes.
    - `log_lambda`: $\ln \lambda$, one number, which may be learned. As $\lambda \to 0$
        the solution is the least squares one of least length, but in float32 a
        $\lambda$ below about $10^{-6} |X|^2$ drowns in rounding, and if examples are
        alike there is no solution left.

    **Returns:**

    `(*batch, d, k)`, so that predictions are `x @ w`; computed in float32 or wider.

    **Raises:**

    `ValueError` for shapes that do not fit or are empty. At run time if there is no
    solution, for want of a larger $\lambda$ or of arguments that are finite.

    !!! example

        ```python
        x, y = jnp.ones((5, 64)), jax.nn.one_hot(jnp.arange(5), 5)
        w = ridge_head(x, y, jnp.log(0.1))                      # (64, 5)
        ```
    """
    _check(x, y, log_lambda)
    n, d = x.shape[-2:]
    kind = accumulator_dtype(x.dtype, y.dtype)
    strength = jnp.exp(jnp.asarray(log_lambda).astype(kind))

    def solve(x, y):
        if n < d:
            return x.T @ _solve(x @ x.T, y, strength)
        return _solve(x.T @ x, x.T @ y, strength)

    # What is lost in the squares of a system is not found again.
    with jax.default_matmul_precision("highest"):
        many = jnp.vectorize(solve, signature="(n,d),(n,k)->(d,k)")
        found = many(x.astype(kind), y.astype(kind))
    return _solved(found).astype(x.dtype)


def _solve(gram: Array, right: Array, strength: Array) -> Array:
    system = gram + strength * jnp.eye(gram.shape[0], dtype=gram.dtype)
    return cho_solve(cho_factor(system, lower=True), right)


def _solved(found: Array) -> Array:
    """`found`; an error at run time if it is no solution."""
    return eqx.error_if(
        found,
        ~jnp.all(jnp.isfinite(found)),
        "ridge_head: there is no solution in the dtype of the computation. Is "
        "`log_lambda` so small that examples which are alike make the system singular, "
        "or are `x`, `y` or `log_lambda` not finite?",
    )


def _check(x: Array, y: Array, log_lambda: float | Array) -> None:
    if x.ndim < 2 or y.ndim != x.ndim or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "ridge_head: `x` and `y` must be (*batch, n, d) and (*batch, n, k) with as "
            f"many examples each, got shapes {x.shape} and {y.shape}. One target a "
            "example is `y[:, None]`, labels are `jax.nn.one_hot(labels, num_classes)`."
        )
    for name, array in (("x", x), ("y", y)):
        check_batch("ridge_head", name, array)
        check_floating("ridge_head", name, array)
    if jnp.shape(log_lambda) != ():
        raise ValueError(
            "ridge_head: `log_lambda` must be one number, got shape "
            f"{jnp.shape(log_lambda)}. Use `jax.vmap` for one a task."
        )
