import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from ..arrays import as_array
from ..internal import (
    accumulate,
    check_activation,
    check_choice,
    check_flag,
    check_last_axis,
    check_size,
)
from ..kernels import check_implementation, experts
from ._linear import Linear, uniform
from ._product_keys import ProductKeys
from ._router import Routing, check_mask, check_top_k, linear_router, route


_ROUTINGS = ("softmax", "product_key")


class MixtureOfRookies(eqx.Module):
    r"""Many tiny experts without gates, of which each token takes a few.

    $$y = \sum_{h=1}^{H} \sum_{i \in T_h}
    \frac{e^{s_{hi}}}{\sum_{j \in T_h} e^{s_{hj}}}\,
    D_i\, \sigma(U_i x), \quad T_h = \mathrm{top}_k(s_h)$$

    Experts as small as these are those of Dai et al., *DeepSeekMoE*, arXiv 2401.06066,
    and Krajewski et al., *Scaling Laws for Fine-Grained Mixture of Experts*, arXiv
    2402.07871. With `routing="softmax"` there is one head, whose scores are a linear
    map of the token. With `routing="product_key"` a score is a sum of those of two
    keys, so that of a million experts no more than two thousand keys are read, as in
    He, *Mixture of A Million Experts*, arXiv 2407.04153 (PEER), whose experts have
    `rookie_size=1`; there every head chooses, and their outputs are added up.

    The paper named *Mixture-of-Rookies*, arXiv 2202.04990, is not about experts: it
    predicts which outputs of a layer will be zero. That is `RookiePredictor`.

    The router computes in float32 or wider. Its losses and its load come back as a
    `Routing`: nothing is stored. The weights of a token sum to the number of heads,
    which says nothing about how many rookies it takes: `Routing.active_count` does.
    The balance loss of product keys is a product of matrices of `n_heads` times tokens
    by $\sqrt{N}$, more work than its experts where $N$ is large; under `jit` it is left
    out where it is not used. With `top_k=1` every weight is 1, and the router learns
    from the losses alone.

    !!! example

        ```python
        layer = MixtureOfRookies(64, num_rookies=8, rookie_size=4, key=key)
        y, routing = layer(x)                          # (*batch, 64)
        penalty = 0.01 * routing.balance_loss + 0.001 * routing.z_loss
        print(jnp.mean(routing.active_count))          # 2.0: top_k

        options = {"routing": "product_key", "n_heads": 2, "query_norm": True}
        peer = MixtureOfRookies(64, 1024, 1, top_k=4, **options, key=key)
        ```
    """

    router: Linear | ProductKeys
    up: Float[Array, "{self.num_rookies} {self.rookie_size} {self.d_model}"]
    down: Float[Array, "{self.num_rookies} {self.d_model} {self.rookie_size}"]
    d_model: int = eqx.field(static=True)
    num_rookies: int = eqx.field(static=True)
    rookie_size: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    routing: str = eqx.field(static=True)
    n_heads: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_rookies: int = 32,
        rookie_size: int = 64,
        top_k: int = 2,
        activation: str = "gelu",
        routing: str = "softmax",
        n_heads: int = 1,
        d_key: int | None = None,
        query_norm: bool = False,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and output.
        - `num_rookies`: number of experts; a square if they have product keys. They
            have `num_rookies * 2 * rookie_size * d_model` parameters.
        - `rookie_size`: width inside an expert.
        - `top_k`: experts that each head of each token takes.
        - `activation`: of the experts: `"silu"`, `"gelu"` or `"relu"`.
        - `routing`: where scores come from: `"softmax"` for a map with a row an
            expert, `"product_key"` for pairs of keys.
        - `n_heads`: of product keys: queries of a token, each with keys of its own and
            the same experts. PEER has 8, with a `top_k` of 16.
        - `d_key`: of product keys: width of each of the two; half of `d_model` if not
            given.
        - `query_norm`: of product keys: whether queries are normalised (see `RMSNorm`),
            which spreads tokens over more experts. PEER does so over the batch, which
            would make tokens depend on each other.
        - `implementation`: passed to `kernels.experts`; `"gather"` for product keys if
            not given. `"ragged"` is faster for up to some thousand rookies of more than
            a few rows.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values: those of the router normal with standard
            deviation 0.02, those of experts and keys as in `Linear`.

        **Raises:**

        `ValueError` for sizes that are not positive, a `top_k` above `num_rookies`, an
        unknown `activation`, `routing` or `implementation`, a number of rookies with
        product keys that is no square, or an option of product keys without them.
        """
        sizes = {
            "d_model": d_model,
            "num_rookies": num_rookies,
            "rookie_size": rookie_size,
            "top_k": top_k,
            "n_heads": n_heads,
        }
        if d_key is not None:
            sizes["d_key"] = d_key
        for name, value in sizes.items():
            check_size(name, value)
        check_top_k(top_k, "num_rookies", num_rookies)
        check_activation(activation)
        check_choice("routing", routing, _ROUTINGS)
        check_flag("query_norm", query_norm)
        check_implementation(implementation, "experts")
        if routing == "product_key":
            _check_square(num_rookies)
        else:
            _check_plain(n_heads, d_key, query_norm)
        if implementation == "capacity":
            raise ValueError(
                "`implementation='capacity'` drops tokens, and rookies drop none. "
                "Leave it out, or use MoE, which has a `capacity_factor`."
            )

        dtype = jnp.float32 if dtype is None else dtype
        router_key, up_key, down_key = jax.random.split(key, 3)
        if routing == "product_key":
            d_key = max(1, d_model // 2) if d_key is None else d_key
            shape = (d_model, num_rookies, n_heads, d_key)
            self.router = ProductKeys(*shape, query_norm, dtype, key=router_key)
        else:
            self.router = linear_router(d_model, num_rookies, dtype, router_key)
        shape = (num_rookies, rookie_size, d_model)
        self.up = uniform(up_key, shape, d_model, dtype)
        shape = (num_rookies, d_model, rookie_size)
        self.down = uniform(down_key, shape, rookie_size, dtype)
        self.d_model = d_model
        self.num_rookies = num_rookies
        self.rookie_size = rookie_size
        self.top_k = top_k
        self.activation = activation
        self.routing = routing
        self.n_heads = n_heads
        self.implementation = implementation

    @jax.named_scope("capibara_eqx.layers.MixtureOfRookies")
    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch d_model"], Routing]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`. Load and losses are those of all tokens of a call.
        - `mask`: false for padding, `(*batch,)`: its output is zero, and it counts in
            no load and no loss.
        - `key`: ignored.

        **Returns:**

        `(y, routing)`: `y` like `x`, and what became of the tokens.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long, or for a mask of
        another shape or of no booleans.
        """
        del key
        check_last_axis("MixtureOfRookies", "x", x, self.d_model)
        if mask is not None:
            check_mask("MixtureOfRookies", mask, x.shape[:-1])
            x = jnp.where(mask[..., None], x, jnp.zeros_like(x))
        implementation = self.implementation
        if isinstance(self.router, ProductKeys):
            routing = self.router(accumulate(x), self.top_k, mask)
            # Gradients of 256 tokens of 256 on CPU take "ragged" 2.1 times as long with
            # 32 of 1024 rookies of one row, 4.0 times with 64 of 16384. With 32 of 1024
            # rookies of 16 rows gathering takes 2.7 times as long as "ragged".
            implementation = implementation or "gather"
        else:
            logits = self.router(accumulate(x))
            routing = route(logits, None, self.top_k, "softmax", True, mask)
        y, _ = experts(
            x,
            routing.indices,
            routing.weights,
            as_array(self.up),
            None,
            as_array(self.down),
            activation=self.activation,
            implementation=implementation,
        )
        return y, routing


def _check_square(num_rookies: int) -> None:
    root = math.isqrt(num_rookies)
    if root * root != num_rookies:
        raise ValueError(
            "`num_rookies` must be a square for routing='product_key', whose experts "
            f"are pairs of keys, got {num_rookies}. The nearest are {root**2} and "
            f"{(root + 1) ** 2}."
        )


def _check_plain(n_heads: int, d_key: int | None, query_norm: bool) -> None:
    given = {"n_heads": n_heads, "d_key": d_key, "query_norm": query_norm}
    default = {"n_heads": 1, "d_key": None, "query_norm": False}
    for name, value in given.items():
        if value != default[name]:
            raise ValueError(
                f"`{name}` is for routing='product_key' alone, got {name}={value} with "
                "routing='softmax'. Leave one of the two out."
            )
