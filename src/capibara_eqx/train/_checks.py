import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, PyTree

from ..models import LanguageModel
from ._checkpoint import Checkpointer
from ._step import TrainState
from ._trainer import Trainer


@eqx.filter_jit
def _both_ways(model, tokens, prefilled):
    full = model(tokens)
    logits, cache = model.prefill(tokens[:, :prefilled], model.init_cache((1,)))

    def step(cache, token):
        logits, cache = model.step(token, cache)
        return cache, logits

    _, steps = jax.lax.scan(step, cache, tokens[:, prefilled:].T)
    cached = jnp.concatenate([logits, jnp.moveaxis(steps, 0, 1)], axis=1)
    return jnp.max(jnp.abs(cached - full)), jnp.max(jnp.abs(full))


def cached_logits_error(
    model: LanguageModel, tokens: Integer[np.ndarray, " seq"]
) -> tuple[float, float]:
    r"""How far the logits from the cache are from those of the full forward pass.

    The first half of `tokens` is read at once, the rest one by one; of one token
    nothing is left to read so.

    **Arguments:**

    - `model`: in float32.
    - `tokens`: at least one id.

    **Returns:**

    `(error, tolerance)`: the largest difference, and what the arithmetic allows: both
    ways sum the same products in another order, through a recurrence as long as the
    text, so $\sqrt{n}$ roundings of the largest logit, times 8 for the layers between.
    """
    batch = jnp.asarray(tokens, jnp.int32)[None]
    error, scale = _both_ways(model, batch, max(tokens.size // 2, 1))
    rounding = float(jnp.finfo(jnp.float32).eps)
    tolerance = 8 * float(np.sqrt(tokens.size)) * rounding * max(float(scale), 1.0)
    return float(error), tolerance


def resumed_differences(
    trainer: Trainer,
    state: TrainState,
    checkpoints: Checkpointer,
    step: int,
    count: int = 5,
) -> list[str]:
    """Names of the arrays in which a resumed run differs from one that went on.

    Both take `count` more steps: one from `state`, one from the newest checkpoint,
    which must be of the same step. They are compared bit for bit.

    **Arguments:**

    - `trainer`: of the run.
    - `state`: after `step` steps; its buffers are used up.
    - `checkpoints`: of the run.
    - `step`: number of steps so far.
    - `count`: number of steps to compare.

    **Returns:**

    Paths of the arrays that differ, none if the run resumes exactly.
    """
    resumed, _ = checkpoints.restore(trainer.init_state())
    for number in range(step, step + count):
        state, _ = trainer.step(state, number, 1.0)
        resumed, _ = trainer.step(resumed, number, 1.0)
    return _differences(state, resumed)


def _differences(a: PyTree, b: PyTree) -> list[str]:
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(eqx.filter(a, eqx.is_array)),
        jax.tree.leaves(eqx.filter(b, eqx.is_array)),
        strict=True,
    )
    return [
        jax.tree_util.keystr(path)
        for (path, left), right in pairs
        if np.asarray(left).tobytes() != np.asarray(right).tobytes()
    ]
