import math
import numbers
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..internal import accumulate, check_last_axis, check_range
from ._linear import Linear
from ._mixer import AbstractAux
from ._router import check_mask


class ZeroPrediction(AbstractAux):
    """Which outputs `RookiePredictor` took for zero, and how often it was wrong.

    Tokens that are masked out count nowhere.

    - `predicted_zero`: outputs that were skipped, `(*batch, d_out)`.
    - `skipped`: their share of all outputs.
    - `false_zeros`: share of the skipped ones that were not zero; 0 if there are none.

    !!! example

        ```python
        layer = RookiePredictor(Linear(64, 32, key=key), x)
        y, prediction = layer(x)
        lost = prediction.skipped * prediction.false_zeros      # of all outputs
        ```
    """

    predicted_zero: Bool[Array, "*batch d_out"]
    skipped: Float[Array, ""]
    false_zeros: Float[Array, ""]

    def losses(self) -> dict[str, Float[Array, ""]]:
        """None: nothing here has a gradient."""
        return {}


class RookiePredictor(eqx.Module):
    r"""A linear map with a ReLU that skips outputs which are likely to be zero.

    $$z = W x + b, \quad p_i = \alpha_i\, \mathrm{sign}(w_i) \cdot \mathrm{sign}(x)
    + \beta_i, \quad y_i = \begin{cases} 0 & z_{l(i)} \le 0,\ p_i \le \theta,\
    l(i) \ne i \\ \max(z_i, 0) & \mathrm{otherwise} \end{cases}$$

    Pinto, Arnau and González, *Mixture-of-Rookies: Saving DNN Computations by
    Predicting ReLU Outputs*, arXiv 2202.04990. Its two cheap predictors are these: the
    product of the signs, one bit each, which correlates linearly with the product
    itself, and the output of a neuron whose weights point in nearly the same direction.
    An output is skipped if both say zero. The layer of tiny experts that goes by the
    same name elsewhere is `MixtureOfRookies`.

    Neurons are grouped by the angles between their weights: whoever leads a group,
    $l(i) = i$, is always computed, and the others have their leader within `max_angle`.
    $\alpha$ and $\beta$ are the least squares fit over the samples; a neuron for which
    the two products do not correlate is always computed, and can lead. The sign of zero
    is zero, so that of what another ReLU puts out the bit says whether it is positive.

    Here every output is computed and then dropped, which is how wrong zeros are
    counted: what is skipped is what hardware could save, and nothing is faster. The
    decision has no gradient, and a skipped output passes none. The fit is of the
    weights it was made for: build the layer anew after training them.

    !!! example

        ```python
        linear = Linear(64, 32, key=jax.random.key(0))
        layer = RookiePredictor(linear, x, max_angle=80.0)
        y, prediction = layer(x)                       # (*batch, 32)
        exact = eqx.tree_at(lambda m: m.threshold, layer, -jnp.inf)
        ```
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"slope", "intercept"})

    linear: Linear
    slope: Float[Array, " {self.linear.out_features}"]
    intercept: Float[Array, " {self.linear.out_features}"]
    leader: Int[Array, " {self.linear.out_features}"]
    # Not static, so that `eqx.tree_at` can change it.
    threshold: float

    def __init__(
        self,
        linear: Linear | eqx.nn.Linear,
        samples: Float[Array, "*samples d_in"],
        max_angle: float = 80.0,
        min_correlation: float = 0.5,
        threshold: float = 0.0,
    ):
        r"""**Arguments:**

        - `linear`: the map, of this library or of Equinox.
        - `samples`: inputs that the fit is made for, `(*samples, d_in)`, two or more.
        - `max_angle`: between the weights of a neuron and of its leader, in degrees.
        - `min_correlation`: between the two products of a neuron over the samples, for
            which an output may be skipped.
        - `threshold`: $\theta$: smaller skips less, and $-\infty$ nothing, so that the
            output is exactly that of the ReLU.

        **Raises:**

        `ValueError` for a layer that is no linear map of vectors, samples of another
        width or fewer than two, an angle outside [0, 180], a correlation outside
        [0, 1], or a threshold that is no number.
        """
        self.linear = _own(linear)
        d_in = self.linear.in_features
        check_last_axis("RookiePredictor", "samples", samples, d_in)
        if math.prod(samples.shape[:-1]) < 2:
            raise ValueError(
                "RookiePredictor: `samples` must hold two inputs or more, as a line is "
                f"fitted through them, got shape {samples.shape}."
            )
        hint = "0 groups nothing, 90 whatever points to the same side."
        check_range("max_angle", max_angle, least=0, most=180, hint=hint)
        check_range("min_correlation", min_correlation, least=0, most=1)
        if not _is_number(threshold):
            raise ValueError(
                f"`threshold` must be a number, got {threshold!r}. 0.0 is where a ReLU "
                "starts, and -jnp.inf skips nothing."
            )
        x = accumulate(samples.reshape(-1, d_in))
        line = _fit(_signs(self.linear, x), self.linear(x))
        self.slope, self.intercept, correlation = line
        reliable = correlation >= min_correlation
        self.leader = _leaders(self.linear.weight, reliable, max_angle)
        self.threshold = float(threshold)

    @jax.named_scope("capibara_eqx.layers.RookiePredictor")
    def __call__(
        self,
        x: Float[Array, "*batch d_in"],
        *,
        mask: Bool[Array, "*batch"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*batch d_out"], ZeroPrediction]:
        """**Arguments:**

        - `x`: `(*batch, d_in)`.
        - `mask`: false for padding, `(*batch,)`: its output is zero and counts nowhere.
        - `key`: ignored.

        **Returns:**

        `(y, prediction)`: `y` is `(*batch, d_out)`, in the dtype of `x`; sums and
        decisions are made in float32 or wider.

        **Raises:**

        `ValueError` if the last axis of `x` is not `d_in` long, or for a mask of
        another shape or of no booleans.
        """
        del key
        check_last_axis("RookiePredictor", "x", x, self.linear.in_features)
        if mask is None:
            mask = jnp.ones(x.shape[:-1], jnp.bool_)
        check_mask("RookiePredictor", mask, x.shape[:-1])
        valid = mask[..., None]
        seen = accumulate(jnp.where(valid, x, jnp.zeros_like(x)))
        z = self.linear(seen)
        zero = valid & self._predicted_zero(seen, z)
        y = jnp.where(valid & ~zero, jax.nn.relu(z), jnp.zeros_like(z))
        count = jnp.maximum(jnp.sum(mask) * z.shape[-1], 1).astype(z.dtype)
        number = jnp.sum(zero)
        wrong = jnp.sum(zero & (z > 0)).astype(z.dtype)
        prediction = ZeroPrediction(
            predicted_zero=zero,
            skipped=number.astype(z.dtype) / count,
            false_zeros=wrong / jnp.maximum(number, 1).astype(z.dtype),
        )
        return y.astype(x.dtype), prediction

    def _predicted_zero(self, x, z):
        line = self.slope.astype(z.dtype), self.intercept.astype(z.dtype)
        slope, intercept = (jnp.broadcast_to(part, z.shape) for part in line)
        estimate = slope * _signs(self.linear, x) + intercept
        follows = self.leader != jnp.arange(z.shape[-1], dtype=self.leader.dtype)
        leading = jnp.take(z, self.leader, axis=-1)
        both = (leading <= 0) & (estimate <= self.threshold)
        return both & jnp.broadcast_to(follows, both.shape)


def _is_number(value) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and not math.isnan(value)


def _own(linear) -> Linear:
    """A linear map of Equinox as one that takes any number of axes."""
    if isinstance(linear, Linear):
        return linear
    sizes = None
    if isinstance(linear, eqx.nn.Linear):
        sizes = linear.in_features, linear.out_features
    if sizes is None or "scalar" in sizes:
        name = type(linear).__name__ if sizes is None else f"one of sizes {sizes}"
        raise ValueError(
            "RookiePredictor: `linear` must be a Linear of this library or of Equinox "
            f"between vectors, got {name}. Of an MLP take the layer in front of the "
            "ReLU."
        )
    empty = eqx.filter_eval_shape(
        Linear, *sizes, linear.use_bias, key=jax.random.key(0)
    )
    parts = (linear.weight, linear.bias)
    none = {"is_leaf": lambda leaf: leaf is None}
    return eqx.tree_at(lambda m: (m.weight, m.bias), empty, parts, **none)


def _signs(linear, x):
    """The product of weights and inputs as it is of one bit each: whole numbers."""
    return jnp.sign(x) @ jnp.sign(linear.weight.astype(x.dtype)).T


def _fit(bits, z):
    """Slope, intercept and correlation of every column of `z` as a line of `bits`."""
    centre, level = (jnp.mean(a, axis=0, keepdims=True) for a in (bits, z))
    bits, z = bits - centre, z - level
    products = jnp.sum(bits * z, axis=0)
    spread, variance = jnp.sum(bits**2, axis=0), jnp.sum(z**2, axis=0)
    # Of what does not vary there is no line but its mean.
    slope = products / jnp.where(spread > 0, spread, 1)
    sizes = jnp.sqrt(spread) * jnp.sqrt(variance)
    correlation = products / jnp.where(sizes > 0, sizes, 1)
    return slope, level[0] - slope * centre[0], correlation


def _leaders(weight, reliable, max_angle) -> Int[Array, " d_out"]:
    """Whom each neuron follows: the nearest leader, or itself if it leads.

    What cannot be skipped leads. Of the others, those with most neighbours come first,
    and whoever has no leader within the angle by then becomes one.
    """
    weight = accumulate(weight)
    size = jnp.linalg.norm(weight, axis=-1, keepdims=True)
    unit = weight / jnp.where(size > 0, size, 1)
    cosines = jnp.clip(unit @ unit.T, -1, 1)
    # Weights of zero have no direction.
    near = (cosines >= math.cos(math.radians(max_angle))) & (size > 0) & (size.T > 0)
    order = jnp.argsort(-jnp.sum(near, axis=-1), stable=True)

    def decide(index, leads):
        own = order[index]
        return leads.at[own].set(leads[own] | ~jnp.any(near[own] & leads))

    leads = jax.lax.fori_loop(0, order.size, decide, ~reliable)
    nearest = jnp.argmax(jnp.where(leads[None], cosines, -jnp.inf), axis=-1)
    own = jnp.arange(leads.size)
    return jnp.where(leads, own, nearest).astype(jnp.int32)
