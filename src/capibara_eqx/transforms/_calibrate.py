from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from ..internal import check_choice, check_range
from ._hessian import lines, token_counts, unseen
from ._observe import observe
from ._rules import Rule
from ._tally import BINS, Sizes, bins, upper_edges


_LARGEST = 127  # of eight bits
_CANDIDATES = 160  # ranges that are tried, ten octaves of them
_IN_OCTAVE = 16


class Calibration(eqx.Module):
    r"""How large the inputs of weights are, by path; see `calibrate`.

    - `ranges`: the largest size that is to be kept, `(*stack,)`.
    - `histograms`: how many values have which size, `(*stack, 32768)`. A bin holds the
        values whose float32 numbers begin with the same 15 bits after the sign.
    - `tokens`: how many inputs were seen, `(*stack,)`.

    !!! example

        ```python
        found = calibrate(model, forward, batches, [".*weight"])
        found.ranges["head/weight"]
        print(found)
        ```
    """

    ranges: dict[str, Float[Array, "*_"]]
    histograms: dict[str, Float[Array, "*_ _bins"]]
    tokens: dict[str, Int[Array, "*_"]]

    @property
    def steps(self) -> dict[str, Float[Array, "*_"]]:
        """Of eight bits over the ranges, $r / 127$; 1 where all inputs are zero."""
        return {path: _step(x) for path, x in self.ranges.items()}

    @property
    def unseen(self) -> tuple[str, ...]:
        """Paths of weights that no input reached, or not all that are stacked."""
        return unseen(self.tokens)

    def __str__(self) -> str:
        ranges = {p: f"  up to {float(jnp.max(x)):.4g}" for p, x in self.ranges.items()}
        counted = zip(self.tokens, lines(self.tokens), strict=True)
        rows = [line + ranges.get(path, "") for path, line in counted]
        return "\n".join(["sizes of inputs", *rows])


def calibrate(
    model: PyTree,
    forward: Callable[[Any, Any], Any],
    batches: Iterable[Any],
    rules: Sequence[Rule] | Sequence[str],
    *,
    range: str = "minmax",
    percentile: float = 99.9,
) -> Calibration:
    r"""Up to which size the inputs of each weight are to be kept, from examples.

    The sizes $|x|$ are counted in bins of which the ends differ by less than a
    hundredth, over all batches, as `collect_hessian` adds up its products. Of the
    counts the range is

    - `"minmax"`: the end of the last bin that is not empty, so that nothing is clipped;
    - `"percentile"`: the end of the first below which that share of the values lie;
    - `"mse"`: the $r$ of least squared error in eight bits, with the step $s = r / 127$

    $$\sum_{|x| > r} (|x| - r)^2 + \sum_{s/2 \le |x| \le r} \frac{s^2}{12}
    + \sum_{|x| < s/2} x^2.$$

    **Arguments:**

    - `model`, `forward`, `batches`, `rules`: as for `collect_hessian`.
    - `range`: `"minmax"`, `"percentile"` or `"mse"`.
    - `percentile`: the share, in (50, 100].

    **Returns:**

    A `Calibration`.

    **Raises:**

    As `collect_hessian`; and `ValueError` for an unknown `range`, a `percentile` out of
    range, or inputs that are not finite: the message names the weight. Under `jit` the
    last is an error at run time.

    !!! example

        ```python
        forward = lambda model, x: model(x)
        found = calibrate(model, forward, batches, [".*weight"], range="mse")
        found.steps["head/weight"]
        ```
    """
    check_choice("range", range, ("minmax", "percentile", "mse"))
    check_range("percentile", percentile, above=50, most=100)

    def zeros(stack, size, dtype):
        del size, dtype  # The same bins for all, counted in float32.
        return Sizes(jnp.zeros(stack), jnp.zeros((*stack, BINS)))

    found, hidden = observe("calibrate", model, forward, batches, rules, zeros)
    histograms = {path: _finite(path, t.histogram) for path, t in found.items()}
    ranges = {
        path: _range(counts, range, percentile / 100)
        for path, counts in histograms.items()
    }
    return Calibration(ranges, histograms, token_counts(found, hidden))


@eqx.filter_jit
def _range(counts: Float[Array, "*stack bins"], kind: str, share: float):
    ends = upper_edges()
    last = BINS - 1 - jnp.argmax(counts[..., ::-1] > 0, axis=-1)
    largest = _end(ends, last)
    if kind == "minmax":
        return largest
    if kind == "percentile":
        below = jnp.cumsum(counts, axis=-1)
        reached = below >= share * below[..., -1:]
        return _end(ends, jnp.argmax(reached, axis=-1))
    candidates = 2.0 ** (-jnp.arange(_CANDIDATES) / _IN_OCTAVE)

    def error(factor):
        return _squared_error(counts, ends, largest, factor)

    # One after the other: all at once would hold as many histograms.
    errors = jax.lax.map(error, candidates)
    return largest * candidates[jnp.argmin(errors, axis=0)]


def _end(ends, index):
    """Of a bin; below the first one everything is as good as zero."""
    end = jnp.minimum(ends[index], jnp.finfo(ends.dtype).max)
    return jnp.where(index > 0, end, 0)


def _squared_error(counts, ends, largest, factor):
    """Of eight bits up to a share of the largest value, in units of its square."""
    starts = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    middle = jnp.where(counts > 0, 0.5 * starts + 0.5 * ends, 0)
    size = middle / jnp.where(largest > 0, largest, 1)[..., None]
    step = factor / _LARGEST
    rounded = jnp.where(size < step / 2, jnp.square(size), step**2 / 12)
    error = jnp.where(size > factor, jnp.square(size - factor), rounded)
    return jnp.sum(counts * error, axis=-1)


def _step(largest):
    step = largest / _LARGEST
    return jnp.where(step >= jnp.finfo(step.dtype).tiny, step, 1)


def _finite(path: str, counts: Float[Array, "*stack bins"]) -> Array:
    first = bins(jnp.asarray(jnp.inf, jnp.float32))
    strange = jnp.any(jnp.where(jnp.arange(BINS) >= first, counts > 0, False))
    message = (
        f"calibrate: an input of the weight {path!r} is not finite: it is NaN or "
        "infinite. Did the training diverge, or is a batch broken?"
    )
    if isinstance(strange, Tracer):
        return eqx.error_if(counts, strange, message)
    if strange:
        raise ValueError(message)
    return counts
