# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Layers composed in a `filter_jit` loop
#
# A layer of `capibara_eqx` is an immutable PyTree: it goes into your own function, your
# own loss and your own compiled loop. Here a small convolution and a Mamba layer learn
# a task that needs memory: repeat what was seen a few tokens ago.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from capibara_eqx.layers import Conv1DBlock, Embedding, Linear, Mamba, RMSNorm


# %% [markdown]
# ## A model of one's own
#
# Nothing to inherit but `eqx.Module`. Sequence layers take `(*batch, seq, width)`, with
# any number of batch axes, so there is no `vmap` to place.


# %%
class Recall(eqx.Module):
    embedding: Embedding
    local: Conv1DBlock
    norm: RMSNorm
    memory: Mamba
    head: Linear

    def __init__(self, vocab, width, *, key):
        keys = jax.random.split(key, 4)
        self.embedding = Embedding(vocab, width, key=keys[0])
        self.local = Conv1DBlock(width, width, 3, residual=True, key=keys[1])
        self.norm = RMSNorm(width)
        self.memory = Mamba(width, d_state=8, key=keys[2])
        self.head = Linear(width, vocab, key=keys[3])

    def __call__(self, tokens):
        x = self.local(self.embedding(tokens))
        return self.head(x + self.memory(self.norm(x)))


VOCAB, DELAY = 8, 6
model = Recall(VOCAB, 32, key=jax.random.key(0))
size = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
print(f"{size:,} parameters")

# %% [markdown]
# ## A compiled loop of one's own
#
# The target at a token is the token `DELAY` steps before. Guessing costs
# $\log 8 \approx 2.08$ nats; a model that remembers comes close to 0.

# %%
optimizer = optax.adam(3e-3)


@eqx.filter_jit
def step(model, state, key):
    tokens = jax.random.randint(key, (16, 48), 0, VOCAB)

    def loss(model):
        logits = model(tokens)[:, DELAY:]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, :-DELAY]
        )
        return losses.mean()

    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(model, updates), state, value


state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
losses = []
for i in range(200):
    model, state, value = step(model, state, jax.random.fold_in(jax.random.key(1), i))
    losses.append(float(value))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < 0.5

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(losses)
axes.axhline(float(jnp.log(VOCAB)), color="0.5", linestyle=":", label="guessing")
axes.set_xlabel("step")
axes.set_ylabel("loss (nats a token)")
axes.set_title(f"Recalling the token {DELAY} steps before")
axes.legend()
plt.show()

# %% [markdown]
# ## The same layer, token by token
#
# `prefill` reads a stretch, `step` one token; a cache is a value, so it can be kept,
# copied or branched. The numbers are those of the whole sequence.

# %%
x = jax.random.normal(jax.random.key(2), (2, 10, 32))
whole = model.memory(x)
y, cache = model.memory.prefill(x[:, :7], model.memory.init_cache((2,)))
outputs = [y]
for t in range(7, 10):
    y_t, cache = model.memory.step(x[:, t], cache)
    outputs.append(y_t[:, None])
difference = jnp.abs(jnp.concatenate(outputs, axis=1) - whole).max()
print(f"largest difference {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ## Derivatives of derivatives
#
# An inner step of gradient descent, and the gradient through it, as in MAML.


# %%
@eqx.filter_jit
def after_one_step(model, rate, x):
    def loss(model):
        return jnp.mean(model.memory(x) ** 2)

    inner = eqx.filter_grad(loss)(model)
    moved = eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, inner))
    return loss(moved)


by_autodiff = jax.grad(after_one_step, argnums=1)(model, 0.1, x)
h = 1e-2
by_difference = (
    after_one_step(model, 0.1 + h, x) - after_one_step(model, 0.1 - h, x)
) / (2 * h)
print(f"d loss / d rate: {by_autodiff:.5f}, by differences {by_difference:.5f}")
assert abs(by_autodiff - by_difference) < 0.02 * abs(by_autodiff)
