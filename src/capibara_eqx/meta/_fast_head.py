"""How the head of `MetaLA` is fitted to a support set."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ..arrays import AbstractWeight
from ..internal import check_sequence, promote_dtypes
from ..layers import Linear
from ..layers._id_range import ids_in_range
from ._inner_loop import check_batch
from ._ridge_head import ridge_head


Targets = Float[Array, "*rows d_out"] | Integer[Array, "*rows"]


def fit_loss(
    predictions: Float[Array, "*rows d_out"], targets: Targets
) -> Float[Array, ""]:
    """Half of the squared error, or the cross-entropy of labels, a mean over rows."""
    if jnp.issubdtype(targets.dtype, jnp.floating):
        errors = predictions - targets.astype(predictions.dtype)
        return jnp.mean(jnp.sum(errors * errors, axis=-1)) / 2
    scores = jax.nn.log_softmax(predictions, axis=-1)
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)
    return -jnp.mean(picked)


def ridge_fit(
    head: Linear,
    features: Float[Array, "*rows d_model"],
    targets: Targets,
    log_lambda: Float[Array, ""],
    log_scale: Float[Array, ""],
) -> Linear:
    r"""The ridge regression that is drawn to `head` instead of to zero.

    $$(W, b) = \arg\min |Z W^T + b - Y|^2 + \lambda\, |(W, b) - (W_0, b_0)|^2$$

    which is plain ridge regression of what `head` leaves over. Labels are rows of the
    identity, and the result is multiplied by a scale then, to serve as logits.
    """
    if isinstance(head.weight, AbstractWeight):
        raise ValueError(
            "MetaLA: method='ridge' computes the weight of the head, which is a "
            f"{type(head.weight).__name__} here. Leave `net/head/weight` out of the "
            "rules."
        )
    z = features.reshape(-1, features.shape[-1])
    labels = not jnp.issubdtype(targets.dtype, jnp.floating)
    if labels:
        targets = jax.nn.one_hot(targets, head.out_features, dtype=z.dtype)
    left = targets.reshape(-1, head.out_features).astype(z.dtype) - head(z)
    # The bias is the weight of a feature that is 1.
    z = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)
    added = ridge_head(z, left, log_lambda.astype(z.dtype))
    scale = jnp.exp(log_scale) if labels else 1

    def moved(start, by):
        wide = promote_dtypes(start.dtype, by.dtype)
        new = start.astype(wide) + by.astype(wide)
        return (jnp.asarray(scale, wide) * new).astype(start.dtype)

    parts = jax.tree.map(moved, (head.weight, head.bias), (added[:-1].T, added[-1]))
    return eqx.tree_at(lambda head: (head.weight, head.bias), head, parts)


def check_examples(name: str, x: Float[Array, "..."], d_model: int) -> None:
    """Raise `ValueError` unless `x` is `(n, seq, d_model)` with n and seq positive."""
    check_sequence("MetaLA", name, x, d_model)
    if x.ndim != 3:
        raise ValueError(
            f"MetaLA: `{name}` must be the examples of one task, (n, seq, {d_model}), "
            f"got shape {x.shape}. Map over tasks with `jax.vmap`; a single example "
            f"needs an axis: `{name}[None]`."
        )
    check_batch("MetaLA", name, x)


def check_targets(
    support_x: Float[Array, "n seq d_model"], support_y: Array, d_out: int
) -> tuple[Targets, bool]:
    """The targets, labels checked, and whether there is one for a whole sequence."""
    examples, seq = support_x.shape[:2]
    support_y = jnp.asarray(support_y)
    if jnp.issubdtype(support_y.dtype, jnp.floating):
        whole, steps = (examples, d_out), (examples, seq, d_out)
        what = "of floating point targets"
    elif jnp.issubdtype(support_y.dtype, jnp.integer):
        whole, steps = (examples,), (examples, seq)
        what = "of integer labels"
    else:
        raise ValueError(
            "MetaLA: `support_y` must be floating point targets or integer labels, got "
            f"{support_y.dtype}. Convert it, as in `support_y.astype(jnp.int32)`."
        )
    if support_y.shape not in (whole, steps):
        raise ValueError(
            f"MetaLA: `support_y` {what} must have shape {whole}, one a sequence, or "
            f"{steps}, one a step, for `support_x` of shape {support_x.shape} and "
            f"d_out={d_out}; got {support_y.shape}. Build the layer with the `d_out` "
            "of the targets."
        )
    if what == "of integer labels":
        hint = "Build the layer with `d_out`, the number of classes, large enough."
        support_y = ids_in_range("MetaLA", "support_y", support_y, d_out, hint)
    return support_y, support_y.shape == whole
