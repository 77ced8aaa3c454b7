from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, DTypeLike, Float

from ..internal import check_choice, check_size, promote_dtypes


MEASURES = ("legs", "legt")


class HippoMatrices(NamedTuple):
    """The system $h' = A h + B x$ that keeps a history in `d_state` numbers."""

    A: Float[Array, "d_state d_state"]
    B: Float[Array, " d_state"]


class HippoDiagonal(NamedTuple):
    r"""A HiPPO matrix as normal plus low rank, in the eigenbasis of its normal part.

    $A = V \,\mathrm{diag}(\lambda) V^* - P P^\top$, of which one eigenvalue of each
    conjugate pair is kept, that with a positive imaginary part. `P` and `B` are in
    the eigenbasis, $V^* P$ and $V^* B$.
    """

    eigenvalues: Complex[Array, " half"]
    P: Complex[Array, "half rank"]
    B: Complex[Array, " half"]
    V: Complex[Array, "d_state half"]


def hippo_initialization(
    d_state: int, measure: str = "legs", dtype: DTypeLike | None = None
) -> Float[Array, "d_state d_state"]:
    r"""The HiPPO matrix $A$, from which a state remembers a long history.

    LegS holds the coefficients of the whole history, scaled to $[0, 1]$, in Legendre
    polynomials; LegT those of a sliding window of length 1:

    $$A^{legs}_{nk} = -\begin{cases} \sqrt{(2n+1)(2k+1)} & n > k \\ n + 1 & n = k \\
    0 & n < k \end{cases} \qquad
    A^{legt}_{nk} = -\sqrt{(2n+1)(2k+1)} \begin{cases} 1 & n \ge k \\
    (-1)^{n-k} & n < k \end{cases}$$

    Gu et al., *HiPPO: Recurrent Memory with Optimal Polynomial Projections*,
    arXiv 2008.07669.

    **Arguments:**

    - `d_state`: number of coefficients.
    - `measure`: `"legs"` or `"legt"`.
    - `dtype`: of the result, float32 if not given.

    **Returns:**

    `(d_state, d_state)`; see `hippo_matrices` for $B$, and `hippo_diagonal` for the
    form that S4, S4D and S5 start from.

    **Raises:**

    `ValueError` for a size that is not positive or an unknown measure.

    !!! example

        ```python
        A = hippo_initialization(32)          # the eigenvalues of LegS are -1 ... -32
        ```
    """
    return hippo_matrices(d_state, measure, dtype).A


def hippo_matrices(
    d_state: int, measure: str = "legs", dtype: DTypeLike | None = None
) -> HippoMatrices:
    r"""$A$ of `hippo_initialization` and $B_n = \sqrt{2n+1}$.

    **Arguments:**

    - `d_state`, `measure`, `dtype`: as there.

    **Returns:**

    `HippoMatrices`: `A`, `(d_state, d_state)`, and `B`, `(d_state,)`.

    **Raises:**

    `ValueError` for a size that is not positive or an unknown measure.

    !!! example

        ```python
        A, B = hippo_matrices(32, "legt")     # a window of length 1
        ```
    """
    parts = _matrices(d_state, measure)
    return HippoMatrices(*(jnp.asarray(part, dtype or "float32") for part in parts))


def hippo_diagonal(
    d_state: int, measure: str = "legs", dtype: DTypeLike | None = None
) -> HippoDiagonal:
    r"""The split of a HiPPO matrix into a normal and a low rank part.

    $A + P P^\top$ is normal, with $P_n = \sqrt{n + 1/2}$ for LegS (rank 1, real parts
    $-1/2$) and the even and odd parts of $\sqrt{2n+1}$ for LegT (rank 2, real parts 0).
    Gu, Goel and Ré, *Efficiently Modeling Long Sequences with Structured State
    Spaces*, arXiv 2111.00396, appendix C. Computed in float64.

    **Arguments:**

    - `d_state`: number of real states, even: half of them are kept.
    - `measure`: `"legs"` or `"legt"`.
    - `dtype`: of the real parts, float32 if not given.

    **Returns:**

    `HippoDiagonal`. Each eigenvector is turned so that its entry of `B` is positive,
    which makes the result the same on every machine.

    **Raises:**

    `ValueError` for a size that is not positive and even, or an unknown measure.

    !!! example

        ```python
        split = hippo_diagonal(64)
        # A system of 32 complex states: x -> 2 Re(C h).
        ```
    """
    A, B = _matrices(d_state, measure)
    if d_state % 2:
        raise ValueError(
            f"`d_state` must be even, got {d_state}: eigenvalues come in conjugate "
            "pairs, of which one is kept."
        )
    n = np.arange(d_state)
    if measure == "legs":
        P = np.sqrt(n + 0.5)[:, None]
    else:
        P = np.sqrt(2 * n + 1)[:, None] * (n[:, None] % 2 == np.arange(2))
    normal = A + P @ P.T
    skew = (normal - normal.T) / 2
    frequencies, V = np.linalg.eigh(-1j * skew)
    kept = slice(d_state // 2, None)  # in ascending order: the positive ones
    V = V[:, kept]
    turn = V.conj().T @ B
    V = V * (turn / np.abs(turn))
    eigenvalues = np.mean(np.diag(normal)) + 1j * frequencies[kept]
    wide = promote_dtypes(dtype or "float32", jnp.complex64)
    parts = (eigenvalues, V.conj().T @ P, V.conj().T @ B, V)
    return HippoDiagonal(*(jnp.asarray(part, wide) for part in parts))


def _matrices(d_state: int, measure: str) -> tuple[np.ndarray, np.ndarray]:
    check_size("d_state", d_state)
    check_choice("measure", measure, MEASURES)
    n = np.arange(d_state)
    B = np.sqrt(2 * n + 1.0)
    product = np.sqrt(np.outer(2 * n + 1, 2 * n + 1))
    A = -np.tril(product)
    if measure == "legs":
        return A + np.diag(n), B
    sign = (-1.0) ** (n[:, None] - n)
    return A - np.triu(sign * product, 1), B
