import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..internal import (
    accumulator_dtype,
    check_batch,
    check_kind,
    check_shape,
    check_size,
)
from ._contain import contained
from ._token_chunks import decays, forgetting, read_tokens


_CHUNK = 64


def delta_rule(
    q: Float[Array, "*batch seq n_heads head_dim"],
    k: Float[Array, "*batch seq n_heads head_dim"],
    v: Float[Array, "*batch seq n_heads v_head_dim"],
    beta: Float[Array, "*batch seq n_heads"],
    *,
    log_decay: Float[Array, "*batch seq n_heads"] | None = None,
    initial_state: Float[Array, "*batch n_heads v_head_dim head_dim"] | None = None,
    reset: Bool[Array, "*batch seq"] | None = None,
    chunk_size: int | None = None,
) -> tuple[
    Float[Array, "*batch seq n_heads v_head_dim"],
    Float[Array, "*batch n_heads v_head_dim head_dim"],
]:
    r"""A memory that is corrected by what it recalls wrongly, token by token.

    $$S_t = e^{a_t} S_{t-1} + \beta_t (v_t - e^{a_t} S_{t-1} k_t)\, k_t^\top, \qquad
    o_t = S_t q_t$$

    which is a step of gradient descent at the rate $\beta_t$ on $\tfrac12 \lVert S k_t
    - v_t \rVert^2$: Widrow and Hoff; Schlag et al., *Linear Transformers Are Secretly
    Fast Weight Programmers*, arXiv 2102.11174. With a decay it is the rule of Gated
    DeltaNet, Yang et al., arXiv 2412.06464.

    A row is read in chunks, by products of matrices: what the tokens of a chunk write,
    $u_t = \beta_t (v_t - e^{a_t} S_{t-1} k_t)$, solves a triangular system, since each
    sees what those before it wrote, $(I + L) U = \mathrm{diag}(\beta) (V - E K
    S_0^\top)$ with $L_{ij} = \beta_i b_{ij} k_i \cdot k_j$ for $j < i$, the decays
    $b_{ij}$ from $j$ to $i$ and $E$ from the start: Yang et al., *Parallelizing Linear
    Transformers with the Delta Rule over Sequence Length*, arXiv 2406.06484. One token
    alone is the recurrence itself.

    Differentiable any number of times, forward and reverse, in every floating point
    argument; a chunk is computed again from the state at its start.

    **Arguments:**

    - `q`, `k`: queries and keys, `(*batch, seq, n_heads, head_dim)`. Keys of length one
        or less keep the state from growing, if `beta` is in [0, 2].
    - `v`: values, `(*batch, seq, n_heads, v_head_dim)`.
    - `beta`: how far a value is corrected, `(*batch, seq, n_heads)`; 1 replaces what a
        key of length one recalls, 0 changes nothing.
    - `log_decay`: $a$, zero or negative, `(*batch, seq, n_heads)`; minus infinity
        forgets. Zeros if not given.
    - `initial_state`: $S$ before the first token, `(*batch, n_heads, v_head_dim,
        head_dim)`; zeros if not given.
    - `reset`: where the state is zeroed before the token is read, `(*batch, seq)`.
    - `chunk_size`: tokens that are multiplied together; it changes speed and memory,
        not the result. 64 if not given.

    **Returns:**

    `(o, final_state)`: `o` in the shape and dtype of `v`, and the state after the last
    token in float32 or wider.

    **Raises:**

    `ValueError` naming the argument whose shape or dtype does not fit.

    !!! example

        ```python
        k = jnp.eye(4)[:, None]                        # 4 tokens, 1 head, unit keys
        v = jnp.arange(8.0).reshape(4, 1, 2)
        o, state = delta_rule(k, k, v, jnp.ones((4, 1)))          # o is v
        recalled, _ = delta_rule(k, k, v, jnp.zeros((4, 1)), initial_state=state)
        ```
    """
    _check(q, k, v, beta, log_decay, initial_state, reset, chunk_size)
    *batch, _, n_heads, head_dim = k.shape
    given = (q, k, v, beta, log_decay, initial_state)
    dtype = accumulator_dtype(*(x.dtype for x in given if x is not None))
    if initial_state is None:
        initial_state = jnp.zeros((*batch, n_heads, v.shape[-1], head_dim), dtype)

    def run(q, written, log_decay, state):
        k, v, beta = written
        if reset is not None:
            none = jnp.zeros(beta.shape, dtype)
            log_decay = forgetting(none if log_decay is None else log_decay, reset)
        tokens, size = (q, k, v, beta, log_decay), chunk_size or _CHUNK
        return read_tokens(_token, _chunk, state[0], tokens, size)

    state = (initial_state.astype(dtype),)
    o, final = contained(run, q, (k, v, beta), log_decay, state, reset)
    return o.astype(v.dtype), final


def _token(state, token):
    """The recurrence itself."""
    q, k, v, beta, log_decay = token
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None, None] * state
    wrong = v - jnp.einsum("...vd,...d->...v", state, k)
    state = state + (beta[..., None] * wrong)[..., None] * k[..., None, :]
    return state, jnp.einsum("...vd,...d->...v", state, q)


def _chunk(state, tokens):
    """A chunk of every head: `i` and `j` count tokens, `d` and `v` are of a head."""
    q, k, v, beta, log_decay = tokens
    if log_decay is None:
        between = jnp.tri(k.shape[-2], dtype=k.dtype)
        between = jnp.broadcast_to(between, (*beta.shape, k.shape[-2]))
        entering = jnp.ones_like(beta)
    else:
        between, entering = (x[..., 0] for x in decays(log_decay[..., None]))
    recalled = entering[..., None] * jnp.einsum("...vd,...id->...iv", state, k)
    system = jnp.einsum("...id,...jd->...ij", k, k) * between * beta[..., None]
    written = jax.lax.linalg.triangular_solve(
        # The diagonal counts as one, what is above it as zero.
        system,
        beta[..., None] * (v - recalled),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    o = entering[..., None] * jnp.einsum("...vd,...id->...iv", state, q)
    scores = jnp.einsum("...id,...jd->...ij", q, k) * between
    o = o + jnp.einsum("...ij,...jv->...iv", scores, written)
    left = between[..., -1, :, None] * k
    state = entering[..., -1, None, None] * state
    return state + jnp.einsum("...jv,...jd->...vd", written, left), o


def _check(q, k, v, beta, log_decay, initial_state, reset, chunk_size):
    name = "delta_rule"
    check_batch(name, "k", k, ("seq", "n_heads", "head_dim"))
    *batch, seq, n_heads, head_dim = k.shape
    check_shape(name, "q", q, k.shape, "the shape of `k`")
    heads, meaning = (*batch, seq, n_heads), "(*batch, seq, n_heads)"
    if v.ndim != k.ndim or v.shape[:-1] != heads:
        raise ValueError(
            f"{name}: `v` must have shape (*batch, seq, n_heads, v_head_dim), with "
            f"the batch, tokens and heads of `k`, here {heads}; got {v.shape}."
        )
    check_shape(name, "beta", beta, heads, meaning)
    check_shape(name, "log_decay", log_decay, heads, meaning)
    expected = (*batch, n_heads, v.shape[-1], head_dim)
    meaning = "(*batch, n_heads, v_head_dim, head_dim)"
    check_shape(name, "initial_state", initial_state, expected, meaning)
    check_shape(name, "reset", reset, (*batch, seq), "(*batch, seq)", kind=jnp.bool_)
    floats = {"q": q, "k": k, "v": v, "beta": beta}
    floats |= {"log_decay": log_decay, "initial_state": initial_state}
    check_kind(name, floats, jnp.floating)
    if chunk_size is not None:
        check_size("chunk_size", chunk_size)
