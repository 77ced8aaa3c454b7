"""One matrix, rounded column by column so that later columns make up for earlier."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Integer

from ..arrays import Affine, Ternary
from ..arrays._affine import affine_steps
from ..arrays._ternary import ternary_codes
from ..internal import accumulator_dtype, promote_dtypes


MOST_DAMPING = 1.0  # as much again as the mean of the diagonal
_FIRST_RAISE = 1e-3  # from no damping at all
_RAISE = 10
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Settings:
    """How `transforms.gptq` goes through the columns; see there."""

    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01


class Rounded(NamedTuple):
    """What became of a matrix `(out, in)`.

    - `steps`: whole numbers, counted from zero, `(out, in)`.
    - `scale`, `zero`: as of a round-to-nearest weight of the same spec.
    - `damp_used`: what was added to the diagonal, as a share of its mean.
    - `solved`: whether the Hessian was any good; if not, nothing else is.
    """

    steps: Float[Array, "out in"]
    scale: Float[Array, "rows groups"]
    zero: Integer[Array, "rows groups"] | None
    damp_used: Float[Array, ""]
    solved: Bool[Array, ""]


def round_columns(
    weight: Float[Array, "out in"],
    hessian: Float[Array, "in in"],
    spec: Affine | Ternary,
    settings: Settings,
) -> Rounded:
    r"""Round a matrix to a grid so that $\mathrm{tr}(\Delta H \Delta^T)$ is small.

    With $H = R R^T$, $R$ upper triangular, and $\Delta = W - \hat W$ the loss is
    $\sum_j \lVert \sum_{i \le j} \Delta_i R_{ij} \rVert^2$. Given the columns before
    it, column $j$ is best at

    $$w_j + \frac{1}{R_{jj}} \sum_{i<j} \Delta_i R_{ij},$$

    which is rounded. These are the columns of the paper, where $R^{-1}$ is the factor
    of the inverse: without it there is one factorisation, and no inverse to lose
    digits in. A run of columns shares one product with all columns before it.
    """
    # As without a Hessian, which may be wider than the weight.
    stored = spec.scale_dtype or accumulator_dtype(weight.dtype)
    spec = dataclasses.replace(spec, scale_dtype=stored)
    dtype = promote_dtypes(accumulator_dtype(weight.dtype), hessian.dtype)
    weight, hessian = weight.astype(dtype), hessian.astype(dtype)
    used = jnp.diagonal(hessian) > 0
    # Nothing ever comes in there.
    weight = jnp.where(used[None], weight, 0)
    layout = _layout(weight.shape[-1], spec, settings)
    order = layout.order(jnp.diagonal(hessian))
    factor, damp_used, solved = _factor(hessian, order, used, settings.damping)
    problem = _Problem(
        weight=weight.T.at[order].get(mode="fill", fill_value=0),
        factor=factor,
        group=layout.group(order),
        inside=order < layout.size,
    )
    # Also where every group is calibrated once it is reached: it has the shapes.
    scale, zero = _grid(weight, spec)
    end = _run_groups(problem, _start(problem, scale, zero), layout, spec)
    if layout.calibrates:
        scale = end.scale.T.astype(scale.dtype)
    if layout.calibrates and zero is not None and end.zero is not None:
        zero = end.zero.T.astype(zero.dtype)
    steps = jnp.zeros(weight.T.shape, dtype).at[order].set(end.steps, mode="drop")
    return Rounded(steps.T, scale, zero, damp_used, solved)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Columns in the order they are rounded in: groups of runs of columns.

    Where a group or its last run is not full, places stay empty: their column is
    `size`, which is none.
    """

    size: int  # columns
    width: int  # of a group that is calibrated when it is reached, or of everything
    runs: int  # in such a group
    run: int  # columns of a run
    share: int  # columns that share a step
    calibrates: bool
    sorts: bool

    @property
    def groups(self) -> int:
        return -(-self.size // self.width)

    @property
    def places(self) -> int:
        """In a group."""
        return self.runs * self.run

    def order(self, importance: Float[Array, " in"]) -> Integer[Array, " places"]:
        """The column of every place."""
        columns = np.full((self.groups, self.places), self.size)
        real = np.arange(self.groups * self.width).reshape(self.groups, self.width)
        columns[:, : self.width] = np.minimum(real, self.size)
        if not self.sorts:
            return jnp.asarray(columns.reshape(-1), jnp.int32)
        # Within a group and, so that a group keeps its steps, among whole groups.
        keys = jnp.concatenate([-importance, jnp.full((1,), jnp.inf, importance.dtype)])
        within = jnp.argsort(keys[columns], axis=-1)
        columns = jnp.take_along_axis(jnp.asarray(columns, jnp.int32), within, axis=-1)
        among = jnp.argsort(keys[columns[:, 0]])
        return columns[among].reshape(-1)

    def group(self, order: Integer[Array, " places"]) -> Integer[Array, " places"]:
        """Which step the column of every place has."""
        return jnp.minimum(order, self.size - 1) // self.share


def _layout(size: int, spec: Affine | Ternary, settings: Settings) -> _Layout:
    share = getattr(spec, "group_size", None) or size
    share = min(share, size)
    calibrates = share < size and not settings.static_groups
    width = share if calibrates else size
    runs = -(-width // settings.block_size)
    run = -(-width // runs)
    return _Layout(size, width, runs, run, share, calibrates, settings.act_order)


class _Problem(NamedTuple):
    weight: Float[Array, "places out"]
    factor: Float[Array, "places places"]  # lower triangular, R transposed
    group: Integer[Array, " places"]
    inside: Bool[Array, " places"]  # whether there is a column


class _Progress(NamedTuple):
    change: Float[Array, "places out"]  # zero where nothing is rounded yet
    steps: Float[Array, "places out"]
    scale: Float[Array, "groups out"]
    zero: Float[Array, "groups out"] | None


def _start(problem, scale, zero) -> _Progress:
    weight = problem.weight

    def of_groups(x):
        """`(groups, out)`: what a column needs is a row."""
        shape = (x.shape[-1], weight.shape[-1])
        return jnp.broadcast_to(x.T, shape).astype(weight.dtype)

    return _Progress(
        change=jnp.zeros_like(weight),
        steps=jnp.zeros_like(weight),
        scale=of_groups(scale),
        zero=None if zero is None else of_groups(zero),
    )


def _run_groups(problem, start, layout, spec) -> _Progress:
    def run(first, progress):
        return _run(problem, progress, first, layout.run, spec)

    def group(g, progress):
        first = g * layout.places
        if layout.calibrates:
            progress = _calibrated(problem, progress, first, layout, spec)
        return jax.lax.fori_loop(
            0, layout.runs, lambda r, p: run(first + r * layout.run, p), progress
        )

    return jax.lax.fori_loop(0, layout.groups, group, start)


def _run(problem, progress, first, count, spec) -> _Progress:
    """A run of columns: one product with those before it, the others one by one."""
    weight = _rows(problem.weight, first, count)
    before = _rows(problem.factor, first, count)
    pulled = jnp.matmul(before, progress.change, precision=_EXACT)
    own = jax.lax.dynamic_slice_in_dim(before, first, count, axis=1)
    group = _rows(problem.group, first, count)
    low, high = _limits(spec)

    def column(j, carry):
        change, steps = carry
        pull = pulled[j] + jnp.matmul(own[j], change, precision=_EXACT)
        best = weight[j] + pull / own[j, j]
        step = progress.scale[group[j]]
        least, most = low, high
        if progress.zero is not None:
            zero = progress.zero[group[j]]
            least, most = low - zero, high - zero
        whole = jnp.clip(jnp.round(best / step), least, most)
        change = change.at[j].set(weight[j] - whole * step)
        return change, steps.at[j].set(whole)

    empty = jnp.zeros_like(weight)
    change, steps = jax.lax.fori_loop(0, count, column, (empty, empty))
    write = jax.lax.dynamic_update_slice_in_dim
    return progress._replace(
        change=write(progress.change, change, first, axis=0),
        steps=write(progress.steps, steps, first, axis=0),
    )


def _calibrated(problem, progress, first, layout, spec) -> _Progress:
    """With the steps of a group as its columns are best at, given those before."""
    count = layout.places
    before = _rows(problem.factor, first, count)
    pulled = jnp.matmul(before, progress.change, precision=_EXACT)
    own = jax.lax.dynamic_slice_in_dim(before, first, count, axis=1)
    moved = solve_triangular(own, pulled, lower=True)
    best = _rows(problem.weight, first, count) + moved
    # What fills a group up takes no part; the padding of a shorter group is NaN too.
    inside = _rows(problem.inside, first, count)
    best = jnp.where(inside[:, None], best, jnp.nan)
    scale, zero = _grid(best.T, dataclasses.replace(spec, group_size=None))
    at = problem.group[first]
    write = lambda rows, new: rows.at[at].set(new[:, 0].astype(rows.dtype))
    return progress._replace(
        scale=write(progress.scale, scale),
        zero=None if zero is None else write(progress.zero, zero),
    )


def _factor(hessian, order, used, damping):
    """`R` transposed, in the order of the columns, with just enough damping."""
    diagonal = jnp.diagonal(hessian)
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(used), 1).astype(hessian.dtype)
    scaled = hessian / jnp.where(mean > 0, mean, 1)
    # The last column first: the factor of Cholesky is the lower one.
    backward = order[::-1]
    matrix = scaled.at[backward].get(mode="fill", fill_value=0)
    matrix = matrix.at[:, backward].get(mode="fill", fill_value=0)
    unused = jnp.logical_not(used.at[backward].get(mode="fill", fill_value=False))
    matrix = matrix + jnp.diag(unused.astype(matrix.dtype))

    def attempt(damp):
        damped = matrix + damp * jnp.eye(len(matrix), dtype=matrix.dtype)
        return damp, jax.lax.linalg.cholesky(damped, symmetrize_input=False)

    def failed(state):
        damp, lower = state
        more = _more(damp) <= MOST_DAMPING
        return more & jnp.logical_not(jnp.all(jnp.isfinite(lower)))

    first = attempt(jnp.asarray(damping, matrix.dtype))
    damp, lower = jax.lax.while_loop(failed, lambda s: attempt(_more(s[0])), first)
    solved = jnp.all(jnp.isfinite(lower)) & jnp.any(used)
    return lower[::-1, ::-1].T, damp, solved


def _more(damp):
    return jnp.maximum(_RAISE * damp, jnp.asarray(_FIRST_RAISE, damp.dtype))


def _grid(weight, spec):
    if isinstance(spec, Ternary):
        return ternary_codes(weight, spec)[1], None
    return affine_steps(weight, spec)


def _limits(spec: Affine | Ternary) -> tuple[int, int]:
    return (-1, 1) if isinstance(spec, Ternary) else spec.limits


def _rows(x, first, count):
    return jax.lax.dynamic_slice_in_dim(x, first, count)
