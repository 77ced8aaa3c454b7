import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..internal import accumulate, check_positive


class LinearScaling(NamedTuple):
    """Positions divided by `factor`: Chen et al., *Extending Context Window of Large
    Language Models via Positional Interpolation*, arXiv 2306.15595.

    !!! example

        ```python
        layer = Attention(
            64, 8, rope_enabled=True, rope_scaling=LinearScaling(4.0), key=key
        )
        ```
    """

    factor: float


class NTKScaling(NamedTuple):
    r"""A larger base, $\mathrm{base} \cdot \mathrm{factor}^{d/(d-2)}$: the slowest pair
    turns `factor` times slower, the fastest as before. Described in section 3.1 of
    Peng et al., *YaRN*, arXiv 2309.00071.

    !!! example

        ```python
        frequencies, _ = rotary_frequencies(64, scaling=NTKScaling(4.0))
        ```
    """

    factor: float


class YaRNScaling(NamedTuple):
    r"""Pairs that turn fast stay, slow ones are interpolated, a ramp lies between.

    Peng et al., *YaRN: Efficient Context Window Extension of Large Language Models*,
    arXiv 2309.00071. The ramp runs over the pairs that turn `beta_fast` to `beta_slow`
    times in the `original_max_len` tokens that were trained on; both rotated queries
    and keys are scaled by `attention_factor`, $0.1 \ln(\mathrm{factor}) + 1$ if not
    given.

    !!! example

        ```python
        scaling = YaRNScaling(4.0, original_max_len=4096)
        frequencies, factor = rotary_frequencies(64, scaling=scaling)
        ```
    """

    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


class Llama3Scaling(NamedTuple):
    """As Llama 3.1: pairs whose wave is longer than `original_max_len /
    low_freq_factor` are interpolated, those shorter than `original_max_len /
    high_freq_factor` stay, a ramp in the frequency lies between. Grattafiori et al.,
    *The Llama 3 Herd of Models*, arXiv 2407.21783.

    !!! example

        ```python
        scaling = Llama3Scaling(8.0, 1.0, 4.0, original_max_len=8192)
        frequencies, _ = rotary_frequencies(64, 500000.0, scaling)
        ```
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


RopeScaling = LinearScaling | NTKScaling | YaRNScaling | Llama3Scaling


def rotary(
    x: Float[Array, "*batch seq heads head_dim"],
    positions: Int[Array, "*batch seq"],
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "*batch seq heads head_dim"]:
    r"""Rotary position embedding: pairs of channels turned by an angle a position.

    $$(x_i, x_{i + d/2}) \mapsto (x_i \cos\theta - x_{i + d/2} \sin\theta,\;
    x_{i + d/2} \cos\theta + x_i \sin\theta), \quad
    \theta = \mathrm{position} \cdot \mathrm{base}^{-2i/d}$$

    so that the product of a query and a key depends on their distance alone. Su et
    al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, arXiv
    2104.09864; pairs are the two halves of a head, as in Llama.

    **Arguments:**

    - `x`: queries or keys, `(*batch, seq, heads, head_dim)`, `head_dim` even.
    - `positions`: of the tokens, `(*batch, seq)`.
    - `base`: of the frequencies.
    - `scaling`: for longer contexts than were trained on: `LinearScaling`,
        `NTKScaling`, `YaRNScaling` or `Llama3Scaling`.

    **Returns:**

    The shape and dtype of `x`; computed in float32 or wider.

    **Raises:**

    `ValueError` for an odd `head_dim`, positions of another shape, or a base that is
    not positive.

    !!! example

        ```python
        q = jax.random.normal(key, (128, 8, 64))       # (seq, heads, head_dim)
        q = rotary(q, jnp.arange(128), base=500000.0)
        ```
    """
    check_rotary("head_dim", x.shape[-1] if x.ndim else 0)
    if positions.shape != x.shape[:-2]:
        raise ValueError(
            "rotary: `positions` must have the batch and sequence axes of `x`, "
            f"{x.shape[:-2]}, got {positions.shape}."
        )
    frequencies, size = rotary_frequencies(x.shape[-1], base, scaling)
    wide = accumulate(x)
    angles = positions[..., None, None].astype(wide.dtype)
    frequencies = jnp.asarray(frequencies, wide.dtype)
    angles = angles * frequencies.reshape((1,) * (x.ndim - 1) + (-1,))
    cos, sin = jnp.cos(angles) * size, jnp.sin(angles) * size
    first, second = jnp.split(wide, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotary_frequencies(
    head_dim: int, base: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """Angle a position of every pair, `head_dim / 2` in float64, and a factor on both.

    The factor is 1 but for `YaRNScaling`. Arguments and errors as of `rotary`.

    !!! example

        ```python
        frequencies, _ = rotary_frequencies(64)        # 1 down to about 1e-4
        ```
    """
    check_rotary("head_dim", head_dim)
    check_positive("base", base)
    _check_scaling(base, scaling)
    pairs = np.arange(head_dim // 2, dtype=np.float64)
    plain = base ** (-2 * pairs / head_dim)
    match scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor):
            return plain / factor, 1.0
        case NTKScaling(factor):
            if head_dim == 2:
                return plain, 1.0
            larger = base * factor ** (head_dim / (head_dim - 2))
            return larger ** (-2 * pairs / head_dim), 1.0
        case YaRNScaling():
            return _yarn(plain, head_dim, base, scaling)
        case Llama3Scaling():
            return _llama3(plain, scaling), 1.0
    raise ValueError(
        "`scaling` must be LinearScaling, NTKScaling, YaRNScaling, Llama3Scaling or "
        f"None, got {scaling!r}."
    )


def _check_scaling(base: float, scaling: RopeScaling | None) -> None:
    if not isinstance(scaling, RopeScaling):
        return
    for name, value in scaling._asdict().items():
        if value is not None:
            check_positive(name, value)
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if not low < high:
            raise ValueError(
                "`low_freq_factor` must be below `high_freq_factor`, got "
                f"{low} and {high}. Are they swapped?"
            )
    if isinstance(scaling, YaRNScaling) and base <= 1:
        raise ValueError(f"`base` must be above 1 for YaRNScaling, got {base}.")


def check_rotary(name: str, head_dim: int) -> None:
    """Raise `ValueError` unless `head_dim` is even and positive."""
    if head_dim < 2 or head_dim % 2 != 0:
        raise ValueError(
            f"rotary embedding: `{name}` must be even, since it turns pairs of "
            f"channels, got {head_dim}."
        )


def _yarn(plain, head_dim, base, scaling):
    def pair_of(turns):
        """The pair that turns so many times in the original length."""
        wave = scaling.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(base))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_dim - 1)
    pairs = np.arange(head_dim // 2, dtype=np.float64)
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
    frequencies = plain * (1 - ramp) + plain / scaling.factor * ramp
    size = scaling.attention_factor
    if size is None:
        size = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return frequencies, size


def _llama3(plain, scaling):
    turns = scaling.original_max_len * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain * share + plain / scaling.factor * (1 - share)
