import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from ..arrays import as_array
from ..internal import (
    accumulate,
    check_choice,
    check_last_axis,
    check_range,
    check_size,
)
from ..kernels import check_implementation, experts
from ._glu import GATES, GLU, check_gate
from ._linear import Linear, uniform
from ._router import SCORES, Routing, check_mask, check_top_k, linear_router, route


class MoE(eqx.Module):
    r"""A mixture of gated experts, of which each token takes a few.

    $$s = \mathrm{score}(W_r x), \quad T = \mathrm{top}_k(s + b), \quad
    y = \sum_{i \in T} \frac{s_i}{\sum_{j \in T} s_j}\, E_i(x) + E_{shared}(x)$$

    with $E_i$ gated units (see `GLU`). Shazeer et al., *Outrageously Large Neural
    Networks*, arXiv 1701.06538; weights renormalised as in Jiang et al., *Mixtral of
    Experts*, arXiv 2401.04088; the shared expert as in Dai et al., *DeepSeekMoE*, arXiv
    2401.06066; the selection bias $b$ as in Wang et al., *Auxiliary-Loss-Free Load
    Balancing Strategy for Mixture-of-Experts*, arXiv 2408.15664.

    The router computes in float32 or wider. Its losses and its load come back as a
    `Routing`: nothing is stored. With `top_k=1` and `renormalize` the only weight is 1,
    and the router learns from the losses alone.

    !!! example

        ```python
        layer = MoE(64, 8, 2, 32, key=jax.random.key(0))
        y, routing = layer(x)                          # (*batch, 64)
        penalty = 0.01 * routing.balance_loss + 0.001 * routing.z_loss
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset(
        {"gate_bias", "up_bias", "down_bias", "selection_bias"}
    )

    router: Linear
    gate: Float[Array, "{self.num_experts} {self.d_ff} {self.d_model}"]
    up: Float[Array, "{self.num_experts} {self.d_ff} {self.d_model}"]
    down: Float[Array, "{self.num_experts} {self.d_model} {self.d_ff}"]
    gate_bias: Float[Array, "{self.num_experts} {self.d_ff}"] | None
    up_bias: Float[Array, "{self.num_experts} {self.d_ff}"] | None
    down_bias: Float[Array, "{self.num_experts} {self.d_model}"] | None
    shared: GLU | None
    selection_bias: Float[Array, " {self.num_experts}"] | None
    d_model: int = eqx.field(static=True)
    num_experts: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    d_ff: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    score: str = eqx.field(static=True)
    renormalize: bool = eqx.field(static=True)
    capacity_factor: float | None = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        d_ff: int,
        activation: str = "swiglu",
        use_bias: bool = False,
        score: str = "softmax",
        renormalize: bool = True,
        shared_d_ff: int | None = None,
        use_selection_bias: bool = False,
        capacity_factor: float | None = None,
        implementation: str | None = None,
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: width of input and output.
        - `num_experts`: number of experts.
        - `top_k`: experts that each token takes.
        - `d_ff`: width inside an expert.
        - `activation`: of the experts: `"swiglu"`, `"geglu"` or `"reglu"`.
        - `use_bias`: whether the maps of the experts have biases.
        - `score`: of an expert, from its logit: `"softmax"` over all of them, or
            `"sigmoid"` of each.
        - `renormalize`: whether the weights of a token are divided by their sum.
        - `shared_d_ff`: width of an expert that every token takes besides, unweighted;
            none if not given.
        - `use_selection_bias`: whether there is a bias, at first zero, that is added to
            the scores for the choice and not for the weights. It has no gradient:
            `update_selection_bias` changes it.
        - `capacity_factor`: places at the experts, as a multiple of what balanced
            routing takes; what finds none is dropped. Nothing is if not given.
        - `implementation`: passed to `kernels.experts`.
        - `dtype`: of the parameters; float32 if not given. The selection bias is
            float32 or wider.
        - `key`: for the initial values: those of the router normal with standard
            deviation 0.02, those of the experts as in `Linear`.

        **Raises:**

        `ValueError` for sizes that are not positive, a `top_k` above `num_experts`, an
        unknown `activation`, `score` or `implementation`, or a `capacity_factor` that
        is not positive or does not fit the `implementation`.
        """
        sizes = {
            "d_model": d_model,
            "num_experts": num_experts,
            "top_k": top_k,
            "d_ff": d_ff,
        }
        if shared_d_ff is not None:
            sizes["shared_d_ff"] = shared_d_ff
        for name, value in sizes.items():
            check_size(name, value)
        check_top_k(top_k, "num_experts", num_experts)
        check_gate(activation)
        check_choice("score", score, SCORES)
        check_implementation(implementation, "experts")
        _check_capacity(capacity_factor, implementation)

        dtype = jnp.float32 if dtype is None else dtype
        router_key, shared_key, *keys = jax.random.split(key, 8)
        inner, outer = (num_experts, d_ff), (num_experts, d_model)
        self.router = linear_router(d_model, num_experts, dtype, router_key)
        self.gate = uniform(keys[0], (*inner, d_model), d_model, dtype)
        self.up = uniform(keys[1], (*inner, d_model), d_model, dtype)
        self.down = uniform(keys[2], (*outer, d_ff), d_ff, dtype)
        self.gate_bias = self.up_bias = self.down_bias = None
        if use_bias:
            self.gate_bias = uniform(keys[3], inner, d_model, dtype)
            self.up_bias = uniform(keys[4], inner, d_model, dtype)
            self.down_bias = uniform(keys[5], outer, d_ff, dtype)
        self.shared = None
        if shared_d_ff is not None:
            self.shared = GLU(
                d_model, shared_d_ff, activation, use_bias, dtype, key=shared_key
            )
        self.selection_bias = None
        if use_selection_bias:
            self.selection_bias = accumulate(jnp.zeros((num_experts,), dtype))
        self.d_model = d_model
        self.num_experts = num_experts
        self.top_k = top_k
        self.d_ff = d_ff
        self.activation = activation
        self.score = score
        self.renormalize = renormalize
        self.capacity_factor = capacity_factor
        self.implementation = implementation

    @jax.named_scope("capibara_eqx.layers.MoE")
    def __call__(
        self,
        x: Float[Array, "*batch d_model"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch d_model"], Routing]:
        """**Arguments:**

        - `x`: `(*batch, d_model)`. All tokens of a call share the places at the
            experts, and load and losses are those of all of them.
        - `mask`: false for padding, `(*batch,)`: its output is zero, and it takes no
            place and counts in no load and no loss.
        - `key`: ignored.

        **Returns:**

        `(y, routing)`: `y` like `x`, and what became of the tokens.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_model` long, or for a mask of
        another shape or of no booleans.
        """
        del key
        check_last_axis("MoE", "x", x, self.d_model)
        if mask is not None:
            check_mask("MoE", mask, x.shape[:-1])
            x = jnp.where(mask[..., None], x, jnp.zeros_like(x))
        logits = self.router(accumulate(x))
        routing = route(
            logits,
            self.selection_bias,
            self.top_k,
            self.score,
            self.renormalize,
            mask,
        )
        y, dropped = experts(
            x,
            routing.indices,
            routing.weights,
            as_array(self.gate),
            as_array(self.up),
            as_array(self.down),
            gate_bias=self.gate_bias,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            activation=GATES[self.activation],
            capacity_factor=self.capacity_factor,
            implementation=self.implementation,
        )
        if self.shared is not None:
            shared = self.shared(x)
            if mask is not None:
                shared = jnp.where(mask[..., None], shared, jnp.zeros_like(shared))
            y = y + shared
        return y, dataclasses.replace(routing, dropped=dropped)


def _check_capacity(capacity_factor, implementation) -> None:
    if capacity_factor is not None:
        hint = "1.25 leaves a quarter more places than balanced routing needs."
        check_range("capacity_factor", capacity_factor, above=0, hint=hint)
    if implementation == "capacity" and capacity_factor is None:
        raise ValueError(
            "`implementation='capacity'` needs a `capacity_factor`, such as 1.25: it "
            "says how many tokens an expert takes."
        )
    if capacity_factor is not None and implementation not in (None, "capacity"):
        raise ValueError(
            "`capacity_factor` is for implementation='capacity' alone, got "
            f"implementation={implementation!r}, which drops no token. Leave one of "
            "the two out."
        )
