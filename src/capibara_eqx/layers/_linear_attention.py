import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..internal import accumulator_dtype
from ._contain import contained
from ._token_chunks import decays, forgetting, read_tokens


# 1024 tokens of 4 heads of 64 by 64 on a CPU took 13, 30 and 94 ms in chunks of 8, 16
# and 32 tokens, with derivatives 79, 152 and 400: more decays a token in longer ones.
_CHUNK = 8


def linear_attention(
    q: Float[Array, "*batch seq n_heads head_dim"],
    k: Float[Array, "*batch seq n_heads head_dim"],
    v: Float[Array, "*batch seq n_heads v_head_dim"],
    log_decay: Float[Array, "*batch seq n_heads head_dim"],
    *,
    initial_state: Float[Array, "*batch n_heads v_head_dim head_dim"],
    reset: Bool[Array, "*batch seq"] | None = None,
    chunk_size: int | None = None,
) -> tuple[
    Float[Array, "*batch seq n_heads v_head_dim"],
    Float[Array, "*batch n_heads v_head_dim head_dim"],
]:
    r"""Linear attention whose memory decays, at a rate of its own a channel of the key.

    $$S_t = S_{t-1} \mathrm{diag}(e^{a_t}) + v_t k_t^\top, \qquad o_t = S_t q_t$$

    Yang et al., *Gated Linear Attention Transformers with Hardware-Efficient Training*,
    arXiv 2312.06635. A row is read in chunks. The decay from one token to another is
    raised for every pair of a chunk and channel: dividing products of decays, which
    would make the chunk one product of matrices, overflows.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values.
    - `log_decay`: $a$, zero or negative.
    - `initial_state`: $S$ before the first token.
    - `reset`: where the state is zeroed before the token is read.
    - `chunk_size`: tokens that are read together; 8 if not given.

    **Returns:**

    `(o, final_state)`: `o` in the shape and dtype of `v`, and the state after the last
    token in float32 or wider.
    """
    dtype = accumulator_dtype(*(x.dtype for x in (q, k, v, log_decay, initial_state)))

    def run(q, written, log_decay, state):
        if reset is not None:
            log_decay = forgetting(log_decay, reset)
        tokens, size = (q, *written, log_decay), chunk_size or _CHUNK
        return read_tokens(_token, _chunk, state[0], tokens, size)

    state = (initial_state.astype(dtype),)
    o, final = contained(run, q, (k, v), log_decay, state, reset)
    return o.astype(v.dtype), final


def _token(state, token):
    """The recurrence itself."""
    q, k, v, log_decay = token
    state = state * jnp.exp(log_decay)[..., None, :] + v[..., None] * k[..., None, :]
    return state, jnp.einsum("...vd,...d->...v", state, q)


def _chunk(state, tokens):
    """A chunk of every head: `i` and `j` count tokens, `d` and `v` are of a head."""
    q, k, v, log_decay = tokens
    between, entering = decays(log_decay)
    scores = jnp.sum(q[..., :, None, :] * k[..., None, :, :] * between, axis=-1)
    o = jnp.einsum("...ij,...jv->...iv", scores, v)
    o = o + jnp.einsum("...vd,...id->...iv", state, entering * q)
    left = between[..., -1, :, :] * k
    state = state * entering[..., -1, None, :]
    return state + jnp.einsum("...jv,...jd->...vd", v, left), o
