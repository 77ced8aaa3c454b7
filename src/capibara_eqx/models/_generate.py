from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray, PyTree

from ..internal import accumulate, check_ids, check_segment_ids, check_size
from ._language_model import LanguageModel


class Generation(eqx.Module):
    """Generated tokens; after a row's `lengths` they repeat its stop token."""

    tokens: Int[Array, "*batch max_new_tokens"]
    lengths: Int[Array, "*batch"]


def generate(
    model: LanguageModel,
    prompt: Integer[Array, "*batch prompt_len"],
    *,
    max_new_tokens: int,
    segment_ids: Int[Array, "*batch prompt_len"] | None = None,
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    r"""Continue prompts, one token after another, in one compiled loop.

    The prompt is read once; each further token costs one step from the cache. With
    logits $l$ a token is drawn from $\mathrm{softmax}(l / T)$, restricted first to the
    `top_k` best and then to the smallest set whose probability reaches `top_p`
    (Holtzman et al., *The Curious Case of Neural Text Degeneration*, arXiv
    1904.09751).

    **Arguments:**

    - `model`: a language model, or anything with its `init_cache`, `prefill`, `step`.
    - `prompt`: token ids, `(*batch, prompt_len)`.
    - `max_new_tokens`: number of tokens to generate.
    - `segment_ids`: same shape as `prompt`; negative marks padding, left or right, so
        that prompts of unequal length share a batch.
    - `temperature`: $T$; 0 always takes the best token.
    - `top_k`, `top_p`: see above; `None` leaves them out.
    - `stop_token`: a row that produced it is finished; the loop ends with the last row.
    - `key`: for the draws; not needed at temperature 0.

    **Returns:**

    `Generation(tokens, lengths)`. The stop token counts as generated.

    **Raises:**

    `ValueError` for a `max_new_tokens` or `top_k` that is not positive, a negative
    temperature or `stop_token`, a `top_p` outside (0, 1], an empty prompt, or a
    missing key; at run time, an error for ids that the model does not have.

    !!! example

        ```python
        prompt = jnp.array([list(b"def ")])
        out = generate(model, prompt, max_new_tokens=64, key=jax.random.key(0))
        print(bytes(out.tokens[0].tolist()))
        ```
    """
    check_generation(
        "generate",
        prompt,
        max_new_tokens=max_new_tokens,
        segment_ids=segment_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
    )
    if key is None:
        if temperature != 0:
            raise ValueError(
                "generate: `key` is needed to draw tokens. Pass `key=...`, or "
                "`temperature=0` for the best token each time."
            )
        key = jax.random.key(0)
    prompt = prompt.astype(jnp.int32)  # bytes have no room for "no stop token"
    if segment_ids is None:
        segment_ids = jnp.zeros(prompt.shape, jnp.int32)
    # Arrays, so that another value of them does not compile the loop again.
    values = (temperature, 1.0 if top_p is None else top_p)
    temperature_, top_p_ = (jnp.asarray(v, jnp.float32) for v in values)
    stop = jnp.asarray(-1 if stop_token is None else stop_token, prompt.dtype)
    return _generate(
        model,
        prompt,
        segment_ids,
        (temperature_, None if top_p is None else top_p_, stop, key),
        max_new_tokens,
        top_k,
    )


def check_generation(
    name: str,
    prompt: Array,
    *,
    max_new_tokens: int,
    segment_ids: Array | None,
    temperature: int | float,
    top_k: int | None,
    top_p: float | None,
    stop_token: int | None,
) -> None:
    """Raise `ValueError` for arguments of `name` that generate nothing sensible."""
    check_size("max_new_tokens", max_new_tokens)
    check_ids(name, "prompt", prompt)
    if prompt.ndim < 1 or prompt.shape[-1] == 0:
        raise ValueError(
            f"{name}: `prompt` must hold at least one token a row, got shape "
            f"{prompt.shape}. Start with a token that begins a document."
        )
    check_segment_ids(name, segment_ids, prompt.shape)
    if not temperature >= 0:  # so that NaN is refused too
        raise ValueError(f"`temperature` must be 0 or greater, got {temperature}.")
    if top_k is not None:
        check_size("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}.")
    if stop_token is not None and stop_token < 0:
        raise ValueError(
            f"`stop_token` must be a token id, 0 or greater, got {stop_token}. Leave "
            "it out to generate `max_new_tokens` always."
        )


@eqx.filter_jit
def _generate(model, prompt, segment_ids, values, max_new_tokens, top_k):
    temperature, top_p, stop, key = values
    if isinstance(model, LanguageModel):
        wrong = (segment_ids >= 0) & ((prompt < 0) | (prompt >= model.vocab_size))
        most = model.vocab_size - 1
        message = f"generate: `prompt` has ids outside 0 to {most}, the model's."
        prompt = eqx.error_if(prompt, wrong, message)

    def choose(output, key):
        logits = model.scores(output) if scored_late else output
        return sample_logits(logits, temperature, top_k, top_p, key)

    # Of a prompt only the last scores are wanted: all would take `vocab_size` numbers a
    # token.
    scored_late = isinstance(model, LanguageModel)
    reader = Features(model) if scored_late else model
    return generation_loop(
        reader, prompt, segment_ids, choose, stop, max_new_tokens, key=key
    )


class Features(eqx.Module):
    """A model that reads tokens and gives features in the place of scores."""

    model: LanguageModel

    def init_cache(self, batch_shape: tuple[int, ...], *, max_len: int) -> PyTree:
        return self.model.init_cache(batch_shape, max_len=max_len)

    def prefill(self, tokens: Array, cache: PyTree, *, segment_ids: Array | None):
        return self.model.prefill_features(tokens, cache, segment_ids=segment_ids)

    def step(self, token: Array, cache: PyTree):
        return self.model.step_features(token, cache)


def generation_loop(
    model: Any,
    prompt: Int[Array, "*batch prompt_len"],
    segment_ids: Int[Array, "*batch prompt_len"],
    choose: Callable[[Array, PRNGKeyArray], Array],
    stop: Int[Array, ""],
    max_new_tokens: int,
    *,
    key: PRNGKeyArray,
) -> Generation:
    """Reads the prompt, then chooses tokens one after the other.

    `choose(output, key)` makes ids of what `model` computes for the last token of each
    row, be it scores or features. A negative `stop` stops nothing.
    """
    *batch, prompt_len = prompt.shape
    cache = model.init_cache(tuple(batch), max_len=prompt_len + max_new_tokens)
    output, cache = model.prefill(prompt, cache, segment_ids=segment_ids)
    position = jnp.broadcast_to(jnp.arange(prompt_len), prompt.shape)
    last = jnp.max(jnp.where(segment_ids >= 0, position, 0), axis=-1)
    output = jnp.take_along_axis(output, last[..., None, None], axis=-2)[..., 0, :]

    def unfinished(carry):
        i, _, _, _, done, _ = carry
        return (i < max_new_tokens) & ~jnp.all(done)

    def body(carry):
        i, output, cache, tokens, done, lengths = carry
        token = choose(output, jax.random.fold_in(key, i)).astype(tokens.dtype)
        token = jnp.where(done, stop, token)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, i, -1)
        lengths = lengths + (~done).astype(lengths.dtype)
        done = done | (token == stop)
        output, cache = model.step(jnp.maximum(token, 0), cache)
        return i + 1, output, cache, tokens, done, lengths

    tokens = jnp.full((*batch, max_new_tokens), stop, prompt.dtype)
    done = jnp.zeros(tuple(batch), bool)
    lengths = jnp.zeros(tuple(batch), jnp.int32)
    start = (jnp.zeros((), jnp.int32), output, cache, tokens, done, lengths)
    _, _, _, tokens, _, lengths = jax.lax.while_loop(unfinished, body, start)
    return Generation(tokens, lengths)


def sample_logits(
    logits: Float[Array, "*batch vocab"],
    temperature: Float[Array, ""],
    top_k: int | None,
    top_p: Float[Array, ""] | None,
    key: PRNGKeyArray,
) -> Int[Array, "*batch"]:
    """One token id a row."""
    logits = accumulate(logits)
    best = jnp.argmax(logits, axis=-1)
    # At temperature 0 the quotient is not used, but it must not be NaN.
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
    scaled = _restrict(scaled, top_k, top_p)
    drawn = jax.random.categorical(key, scaled, axis=-1)
    return jnp.where(temperature == 0, best, drawn)


def _restrict(
    logits: Float[Array, "*batch vocab"], top_k: int | None, top_p: Array | None
) -> Float[Array, "*batch vocab"]:
    """`logits` with minus infinity outside the `top_k` best and the `top_p` nucleus."""
    if top_k is None and top_p is None:
        return logits
    vocab = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1)
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
    keep: Bool[Array, "*batch vocab"] = jnp.ones(logits.shape, bool)
    if top_k is not None:
        within = jnp.arange(vocab) < top_k
        keep = keep & jnp.broadcast_to(within, keep.shape)
        sorted_logits = jnp.where(keep, sorted_logits, -jnp.inf)
    if top_p is not None:
        probabilities = jax.nn.softmax(sorted_logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = keep & (before < top_p)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)
