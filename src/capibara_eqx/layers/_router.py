import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..internal import accumulate, check_positive, check_range, check_size
from ._linear import Linear
from ._mixer import AbstractAux


# Logits of about one half for inputs of size one at width 768: no expert is favoured,
# and tokens do not all go to the same one.
_ROUTER_STD = 0.02

# Log-scores: their softmax are the scores, divided by their sum.
SCORES = {"softmax": jax.nn.log_softmax, "sigmoid": jax.nn.log_sigmoid}


class Routing(AbstractAux):
    r"""Where the tokens of one call went, and what that costs.

    With $f_i$ the share of choices that fell on expert $i$ and $P_i$ the mean over
    tokens of its score divided by the sum of the token's scores,

    $$\mathrm{balance} = E \sum_{i=1}^{E} f_i P_i, \quad
    \mathrm{z} = \mathrm{mean}_t\, (\log \sum_i e^{l_{ti}})^2$$

    Fedus et al., *Switch Transformers*, arXiv 2101.03961, with $f$ divided by `top_k`;
    Zoph et al., *ST-MoE*, arXiv 2202.08906. `balance_loss` is 1 where `load` or the
    mean scores are uniform, and may be less than 1 elsewhere. Both are usual with small
    weights, 0.01 and 0.001. Tokens that are masked out count nowhere.

    With heads, as in `MixtureOfRookies`, each of them chooses `top_k` for itself, and
    means over tokens are means over heads too.

    - `indices`: chosen experts, the best first, `(*batch, top_k)`, with heads those of
        one after those of the other; -1 where masked.
    - `weights`: of the chosen experts, `(*batch, top_k)`; 0 where masked.
    - `load`: share of all choices by expert, `(experts,)`. Sums to 1, or is all zero
        where every token is masked.
    - `balance_loss`, `z_loss`: scalars in float32 or wider.
    - `dropped`: how many choices found no place.

    !!! example

        ```python
        y, routing = MoE(64, 8, 2, 32, key=jax.random.key(0))(x)
        penalty = 0.01 * routing.losses()["balance"]
        ```
    """

    indices: Int[Array, "*batch top_k"]
    weights: Float[Array, "*batch top_k"]
    load: Float[Array, " experts"]
    balance_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    dropped: Int[Array, ""]

    @property
    def active_count(self) -> Int[Array, "*batch"]:
        """How many experts each token takes, `(*batch,)`: `top_k`, 0 where masked.

        With heads it is their sum, so that an expert which two of them chose is counted
        twice.
        """
        return jnp.sum(self.indices >= 0, axis=-1)

    def losses(self) -> dict[str, Float[Array, ""]]:
        """`balance` and `router_z`, see the class."""
        return {"balance": self.balance_loss, "router_z": self.z_loss}


class ExpertLoad(eqx.Module):
    r"""A running mean of the load of experts, right from the first value on.

    $$a \leftarrow \beta\, a + (1 - \beta)\, \mathrm{load}, \quad
    \mathrm{value} = a / \textstyle\sum_i a_i$$

    Loads sum to 1, so $\sum_i a_i$ is the weight that was given so far, and dividing by
    it corrects the start from zero, as in Kingma and Ba, *Adam*, arXiv 1412.6980.

    !!! example

        ```python
        moe, running = MoE(64, 8, 2, 32, key=jax.random.key(0)), ExpertLoad(8)
        for _ in range(3):
            y, routing = moe(x)
            running = update_expert_load(running, routing.load)
        imbalance = jnp.max(running.value) * 8
        ```
    """

    average: Float[Array, " experts"]

    def __init__(self, num_experts: int):
        """**Arguments:**

        - `num_experts`: number of experts.

        **Raises:**

        `ValueError` if it is not positive.
        """
        check_size("num_experts", num_experts)
        self.average = jnp.zeros((num_experts,), jnp.float32)

    @property
    def value(self) -> Float[Array, " experts"]:
        """The mean load; zeros before the first update."""
        total = jnp.sum(self.average)
        return self.average / jnp.where(total > 0, total, 1)


def update_expert_load(
    running: ExpertLoad, load: Float[Array, " experts"], decay: float = 0.9
) -> ExpertLoad:
    """The running mean with one load more.

    **Arguments:**

    - `running`: the mean so far.
    - `load`: `Routing.load` of a call, `(experts,)`.
    - `decay`: how much of the mean stays, in [0, 1).

    **Returns:**

    A new `ExpertLoad`. A load of zeros, of a call in which every token was masked,
    changes nothing.

    **Raises:**

    `ValueError` for a load of another shape, or a `decay` outside [0, 1).

    !!! example

        ```python
        y, routing = MoE(64, 8, 2, 32, key=jax.random.key(0))(x)
        running = update_expert_load(ExpertLoad(8), routing.load, decay=0.99)
        ```
    """
    check_range("decay", decay, least=0, below=1)
    _check_load("update_expert_load", load, running.average.shape)
    load = load.astype(running.average.dtype)
    average = decay * running.average + (1 - decay) * load
    average = jnp.where(jnp.any(load > 0), average, running.average)
    return eqx.tree_at(lambda r: r.average, running, average)


def update_selection_bias(
    bias: Float[Array, " experts"], load: Float[Array, " experts"], rate: float = 1e-3
) -> Float[Array, " experts"]:
    r"""One step of balancing experts without a loss.

    $$b_i \leftarrow b_i + u\, \mathrm{sign}(\overline{l} - l_i)$$

    with $l$ the load.

    Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*,
    arXiv 2408.15664. Experts with more than their share are chosen less from then on.

    **Arguments:**

    - `bias`: `MoE.selection_bias`, `(experts,)`.
    - `load`: `Routing.load` of the last call, `(experts,)`.
    - `rate`: the step.

    **Returns:**

    The new bias, in the dtype of `bias`.

    **Raises:**

    `ValueError` for a load of another shape, or a `rate` that is not positive.

    !!! example

        ```python
        moe = MoE(64, 8, 2, 32, use_selection_bias=True, key=jax.random.key(0))
        y, routing = moe(x)
        bias = update_selection_bias(moe.selection_bias, routing.load)
        moe = eqx.tree_at(lambda m: m.selection_bias, moe, bias)
        ```
    """
    check_positive("rate", rate)
    _check_load("update_selection_bias", load, bias.shape)
    load = accumulate(load)
    mean = jnp.mean(load, keepdims=True)
    gap = mean - load
    # A share such as 1/3 is rounded, and so is the mean.
    uneven = jnp.abs(gap) > 4 * jnp.finfo(load.dtype).eps * mean
    return bias + (rate * jnp.where(uneven, jnp.sign(gap), 0)).astype(bias.dtype)


def linear_router(d_model, num_experts, dtype, key) -> Linear:
    """The map from a token to a logit an expert, normal with deviation 0.02."""
    linear = Linear(d_model, num_experts, use_bias=False, dtype=dtype, key=key)
    weight = _ROUTER_STD * jax.random.normal(key, linear.weight.shape, dtype)
    return eqx.tree_at(lambda m: m.weight, linear, weight)


def route(
    logits: Float[Array, "*batch experts"],
    selection_bias: Float[Array, " experts"] | None,
    top_k: int,
    score: str,
    renormalize: bool,
    mask: Bool[Array, "*batch"] | None,
) -> Routing:
    """The choice of experts from their logits; nothing is dropped yet."""
    log_scores = SCORES[score](logits)
    ranking = log_scores
    if selection_bias is not None:
        bias = jax.lax.stop_gradient(selection_bias.astype(logits.dtype))
        ranking = jnp.exp(log_scores) + jnp.broadcast_to(bias, logits.shape)
    indices = jax.lax.top_k(jax.lax.stop_gradient(ranking), top_k)[1]
    chosen = jnp.take_along_axis(log_scores, indices, axis=-1)
    # Scores divided by their sum, of which not even those that underflow give 0/0.
    weights = jax.nn.softmax(chosen, axis=-1) if renormalize else jnp.exp(chosen)
    shares = jax.nn.softmax(log_scores, axis=-1)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    if mask is None:
        mask = jnp.ones(logits.shape[:-1], jnp.bool_)
    valid = mask[..., None]
    indices = jnp.where(valid, indices, -1)
    weights = jnp.where(valid, weights, jnp.zeros_like(weights))

    tokens = tuple(range(mask.ndim))
    experts = logits.shape[-1]
    taken = jax.nn.one_hot(indices, experts, dtype=jnp.int32)
    counts = jnp.sum(taken, axis=(*tokens, mask.ndim))
    # Where there is no token at all, everything is zero.
    number = jnp.maximum(jnp.sum(mask), 1).astype(logits.dtype)
    load = counts.astype(logits.dtype) / (top_k * number)
    mean_shares = jnp.sum(shares, axis=tokens, where=valid) / number
    return Routing(
        indices=indices,
        weights=weights,
        load=load,
        balance_loss=experts * jnp.sum(load * mean_shares),
        z_loss=jnp.sum(squares, where=mask) / number,
        dropped=jnp.zeros((), jnp.int32),
    )


def check_top_k(top_k: int, name: str, count: int) -> None:
    """Raise `ValueError` if `top_k` is more than the experts there are."""
    if top_k > count:
        raise ValueError(
            f"`top_k` must not be greater than `{name}`, got top_k={top_k} and "
            f"{name}={count}. Are they swapped?"
        )


def check_mask(layer: str, mask: Array, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `mask` has a boolean for each token."""
    if mask.shape != shape:
        raise ValueError(
            f"{layer}: `mask` must have the batch axes of the input, {shape}, got "
            f"shape {mask.shape}."
        )
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"{layer}: `mask` must be boolean, got {mask.dtype}. Compare to make it "
            "so, as in `segment_ids >= 0`."
        )


def _check_load(function: str, load: Array, shape: tuple[int, ...]) -> None:
    if load.shape != shape:
        raise ValueError(
            f"{function}: `load` must have one value an expert, here {shape}, got "
            f"{load.shape}. Average loads of several calls first."
        )
