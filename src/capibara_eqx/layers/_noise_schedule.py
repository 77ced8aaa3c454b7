import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ..internal import (
    accumulate,
    check_choice,
    check_ids,
    check_range,
    check_size,
    promote_dtypes,
)


SPACINGS = ("leading", "linspace")


class NoiseSchedule(eqx.Module):
    r"""How much of a signal is left after each of the training's noising steps.

    $$\bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \quad
    x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$

    with $\beta$ linear from `beta_start` to `beta_end` over `num_train_timesteps`
    steps. Ho, Jain and Abbeel, *Denoising Diffusion Probabilistic Models*, arXiv
    2006.11239.

    It holds no arrays, so no optimiser can change it; the tables are computed in
    float64 and rounded once, to the dtype that uses them.

    !!! example

        ```python
        schedule = NoiseSchedule()
        noise = jax.random.normal(key, x.shape)
        x_t = schedule.add_noise(x, noise, jnp.asarray(500))
        schedule.timesteps(12)                         # 913, 830, ..., 83, 0
        ```
    """

    num_train_timesteps: int = eqx.field(static=True)
    beta_start: int | float = eqx.field(static=True)
    beta_end: int | float = eqx.field(static=True)

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: int | float = 1e-4,
        beta_end: int | float = 0.02,
    ):
        r"""**Arguments:**

        - `num_train_timesteps`: number of noising steps $T$.
        - `beta_start`, `beta_end`: the first and the last $\beta$.

        **Raises:**

        `ValueError` for a size that is not positive, or a $\beta$ outside (0, 1).
        """
        check_size("num_train_timesteps", num_train_timesteps)
        check_range("beta_start", beta_start, above=0, below=1)
        check_range("beta_end", beta_end, above=0, below=1)
        self.num_train_timesteps = num_train_timesteps
        self.beta_start = beta_start
        self.beta_end = beta_end

    def alpha_bar(self) -> np.ndarray:
        r"""$\bar\alpha_t$ for every $t$, `(num_train_timesteps,)`, NumPy float64."""
        steps = self.num_train_timesteps
        betas = np.linspace(self.beta_start, self.beta_end, steps, dtype=np.float64)
        return np.cumprod(1 - betas)

    def timesteps(self, num_infer_steps: int, spacing: str = "leading") -> np.ndarray:
        r"""The times that a shorter chain visits, from much noise to little.

        `"leading"` takes every `T // num_infer_steps`-th time and ends at 0: 913, 830,
        ..., 83, 0 for 12 of 1000. `"linspace"` divides the whole range evenly and
        leaves out 0: 999, 916, ..., 83.

        **Arguments:**

        - `num_infer_steps`: number of times.
        - `spacing`: see above.

        **Returns:**

        Integers, `(num_infer_steps,)`, falling.

        **Raises:**

        `ValueError` for more steps than there are different times, or an unknown
        `spacing`.
        """
        check_size("num_infer_steps", num_infer_steps)
        check_choice("spacing", spacing, SPACINGS)
        total = self.num_train_timesteps
        # Without 0 there is one time less; a chain that visits one twice divides by
        # the distance between them.
        most = total if spacing == "leading" else max(total - 1, 1)
        if num_infer_steps > most:
            raise ValueError(
                f"`num_infer_steps` must be at most {most}, got {num_infer_steps}: "
                f"there are `num_train_timesteps` = {total} times, and {spacing!r} "
                f"spacing visits {most} different ones. Sample with fewer steps."
            )
        if spacing == "leading":
            ratio = total // num_infer_steps
            return np.arange(num_infer_steps - 1, -1, -1) * ratio
        grid = np.linspace(0, total - 1, num_infer_steps + 1)
        return np.round(grid)[:0:-1].astype(int)

    def add_noise(
        self,
        x0: Float[Array, "*batch d"],
        noise: Float[Array, "*batch d"],
        t: Integer[Array, "*times"],
    ) -> Float[Array, "*batch d"]:
        r"""$x_t$ from $x_0$ and $\epsilon$.

        **Arguments:**

        - `x0`, `noise`: `(*batch, d)`.
        - `t`: times in `[0, num_train_timesteps)`: one for each vector, `(*batch,)`, or
            a single one. A time outside gives NaN.

        **Returns:**

        `(*batch, d)`, in the dtype of `x0`.

        **Raises:**

        `ValueError` for shapes that do not fit, or times that are not integers.
        """
        check_ids("NoiseSchedule.add_noise", "t", t)
        check_like("NoiseSchedule.add_noise", "noise", noise.shape, x0.shape)
        times = spread_times("NoiseSchedule.add_noise", t, x0.shape[:-1])
        x, e = accumulate(x0), accumulate(noise)
        dtype = promote_dtypes(x.dtype, e.dtype)
        kept = self.alpha_bar()
        signal = lookup(np.sqrt(kept), times, dtype)[..., None]
        spread = lookup(np.sqrt(1 - kept), times, dtype)[..., None]
        x_t = signal * x.astype(dtype) + spread * e.astype(dtype)
        return x_t.astype(x0.dtype)


def lookup(table: np.ndarray, index: Array, dtype) -> Array:
    """`table[index]` in `dtype`; NaN for an index outside, a negative one too."""
    index = jnp.where(index < 0, len(table), index)
    return jnp.asarray(table, dtype).at[index].get(mode="fill", fill_value=jnp.nan)


def spread_times(layer: str, t: Array, batch: tuple[int, ...]) -> Array:
    """`t` with the axes `batch`, of which it has all or none."""
    if t.shape not in ((), batch):
        raise ValueError(
            f"{layer}: `t` must be one time, or one for each vector, {batch}, got "
            f"shape {t.shape}. One a sequence: `jnp.broadcast_to(t[:, None], {batch})`."
        )
    return jnp.broadcast_to(t, batch)


def check_like(
    layer: str, argument: str, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Raise `ValueError` unless the two shapes are equal."""
    if shape != wanted:
        raise ValueError(
            f"{layer}: `{argument}` must have shape {wanted}, as what it belongs to, "
            f"got {shape}."
        )
