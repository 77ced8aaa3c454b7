import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from ..arrays import as_array
from ..internal import (
    accumulate,
    check_ids,
    check_probability,
    check_segment_ids,
    split_or_none,
)
from ..layers import DiffusionNextTokenHead, Embedding, TokenEmbedding
from ._aux import aux_losses
from ._generate import (
    Features,
    Generation,
    check_generation,
    generate,
    generation_loop,
    sample_logits,
)
from ._language_model import LanguageModel


def diffusion_language_loss(
    model: LanguageModel,
    head: DiffusionNextTokenHead,
    tokens: Integer[Array, "*batch length"],
    *,
    segment_ids: Int[Array, "*batch length"] | None = None,
    freeze_backbone: bool = False,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""Next-token cross-entropy, and beside it the loss of a diffusion head.

    $$\mathcal{L} = \mathrm{CE} + \mathrm{loss\_weight} \cdot
    \mathrm{mean} (\hat\epsilon - \epsilon)^2$$

    The feature at a position is the condition, the embedding of the token after it the
    target. A target counts where it belongs to the same document as the token before
    it: nothing is predicted across a boundary, from padding, or at padding.

    No gradient flows to the embedding table as a target: a table that followed this
    loss would do best with all its rows alike, where the noise is known for certain.

    **Arguments:**

    - `model`: the backbone.
    - `head`: only if it is `enabled` does it take part.
    - `tokens`: ids, `(*batch, length)`; all but the first are predicted.
    - `segment_ids`: document of each token, same shape; negative is padding.
    - `freeze_backbone`: whether gradients reach the head only, which is then an adapter
        that leaves the model as it is.
    - `key`: for the head's draws and the model's dropout.

    **Returns:**

    `(loss, parts)`: `parts` holds `cross_entropy` (nats a token), `diffusion` if the
    head is enabled, and what the layers report, which is not in `loss`.

    **Raises:**

    `ValueError` for inputs that do not fit, a missing `key`, or a frozen backbone with
    a head that is not enabled.

    !!! example

        ```python
        head = DiffusionNextTokenHead(64, enabled=True, key=key)
        optimizer = optax.adam(1e-3)
        state = optimizer.init(eqx.filter(head, eqx.is_inexact_array))

        @eqx.filter_jit
        def adapter_step(head, state, model, tokens, key):
            def objective(head):
                return diffusion_language_loss(
                    model, head, tokens, freeze_backbone=True, key=key
                )

            grads, parts = eqx.filter_grad(objective, has_aux=True)(head)
            updates, state = optimizer.update(grads, state)
            return eqx.apply_updates(head, updates), state, parts

        head, state, parts = adapter_step(head, state, model, tokens, key)
        ```
    """
    name = "diffusion_language_loss"
    check_ids(name, "tokens", tokens)
    if tokens.ndim < 1 or tokens.shape[-1] < 2:
        raise ValueError(
            f"{name}: `tokens` must be (*batch, length >= 2), got {tokens.shape}. "
            "The first token of a row has nothing before it to predict it from."
        )
    check_segment_ids(name, segment_ids, tokens.shape)
    _check_widths(name, model, head)
    if freeze_backbone:
        if not head.enabled:
            raise ValueError(
                f"{name}: `freeze_backbone` leaves nothing to train, for the head is "
                "not enabled. Build it with enabled=True."
            )
        model = _frozen(model)
    model_key, head_key = split_or_none(key, 2)
    before = None if segment_ids is None else segment_ids[..., :-1]
    x, aux = model.features(tokens[..., :-1], segment_ids=before, key=model_key)
    valid = _predicted(tokens, segment_ids)
    targets = jnp.where(valid, tokens[..., 1:], jnp.zeros_like(tokens[..., 1:]))
    loss = _cross_entropy(model.scores(x), targets, valid)
    parts = {**aux_losses(aux), "cross_entropy": loss}
    if head.enabled:
        embeddings = jax.lax.stop_gradient(_table(model)(targets))
        parts["diffusion"] = head.loss(x, embeddings, mask=valid, key=head_key)
        loss = loss + head.loss_weight * parts["diffusion"].astype(loss.dtype)
    return loss, parts


def diffusion_generate(
    model: LanguageModel,
    head: DiffusionNextTokenHead,
    prompt: Integer[Array, "*batch prompt_len"],
    *,
    max_new_tokens: int,
    segment_ids: Int[Array, "*batch prompt_len"] | None = None,
    head_share: int | float = 1.0,
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Generation:
    """Continue prompts with tokens that a diffusion head samples, in one compiled loop.

    Each token is drawn from the head with probability `head_share` and from the model's
    own scores otherwise: the mixture of the two distributions. A token of the head is
    that whose embedding is nearest to the sample. A head that is not `enabled` takes no
    part: the result is that of `generate`.

    **Arguments:**

    - `model`: the backbone.
    - `head`: trained with `diffusion_language_loss`.
    - `prompt`, `max_new_tokens`, `segment_ids`, `stop_token`: see `generate`.
    - `head_share`: see above.
    - `temperature`, `top_k`, `top_p`: see `generate`; of the model's own scores.
    - `key`: for the draws.

    **Returns:**

    `Generation(tokens, lengths)`.

    **Raises:**

    `ValueError` as `generate`, for a share outside [0, 1], a missing `key`, or a head
    of another width.

    !!! example

        ```python
        head = DiffusionNextTokenHead(64, enabled=True, key=key)
        out = diffusion_generate(model, head, tokens, max_new_tokens=8, key=key)
        ```
    """
    name = "diffusion_generate"
    check_generation(
        name,
        prompt,
        max_new_tokens=max_new_tokens,
        segment_ids=segment_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
    )
    check_probability("head_share", head_share)
    _check_widths(name, model, head)
    if not head.enabled:
        return generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            segment_ids=segment_ids,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_token=stop_token,
            key=key,
        )
    if key is None:
        raise ValueError(
            f"{name}: `key` is needed for the noise that the head's samples start "
            "from. Pass `key=...`."
        )
    prompt = prompt.astype(jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.zeros(prompt.shape, jnp.int32)
    # Arrays, so that another value of them does not compile the loop again.
    values = (head_share, temperature, 1.0 if top_p is None else top_p)
    share, temperature_, top_p_ = (jnp.asarray(v, jnp.float32) for v in values)
    stop = jnp.asarray(-1 if stop_token is None else stop_token, prompt.dtype)
    return _generate(
        model,
        head,
        prompt,
        segment_ids,
        (share, temperature_, None if top_p is None else top_p_, stop, key),
        max_new_tokens,
        top_k,
    )


@eqx.filter_jit
def _generate(model, head, prompt, segment_ids, values, max_new_tokens, top_k):
    share, temperature, top_p, stop, key = values

    def choose(x, key):
        from_key, head_key, model_key = jax.random.split(key, 3)
        by_head = head.sample_token(x, as_array(_table(model).weight), key=head_key)
        scores = model.scores(x)
        by_model = sample_logits(scores, temperature, top_k, top_p, model_key)
        from_head = jax.random.bernoulli(from_key, share, by_head.shape)
        return jnp.where(from_head, by_head, by_model.astype(by_head.dtype))

    return generation_loop(
        Features(model), prompt, segment_ids, choose, stop, max_new_tokens, key=key
    )


def _table(model: LanguageModel) -> Embedding:
    """The vectors of the tokens alone: what is added for a position is no target."""
    embedding = model.embedding
    return embedding.table if isinstance(embedding, TokenEmbedding) else embedding


def _predicted(tokens, segment_ids):
    """Which tokens but the first belong to the document of the token before them."""
    if segment_ids is None:
        return jnp.ones(tokens[..., 1:].shape, bool)
    after = segment_ids[..., 1:]
    return (after >= 0) & (after == segment_ids[..., :-1])


def _cross_entropy(logits, targets, valid):
    log_p = jax.nn.log_softmax(accumulate(logits), axis=-1)
    index = targets.astype(jnp.int32)[..., None]
    losses = -jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
    losses = jnp.where(valid, losses, jnp.zeros_like(losses))
    return jnp.sum(losses) / jnp.maximum(jnp.sum(valid, dtype=losses.dtype), 1)


def _frozen(model: LanguageModel) -> LanguageModel:
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _check_widths(name, model, head):
    if head.d_model != model.d_model:
        raise ValueError(
            f"{name}: `head` must have the width of the model, d_model = "
            f"{model.d_model}, got one of {head.d_model}. Build it as "
            f"DiffusionNextTokenHead({model.d_model}, ...)."
        )
