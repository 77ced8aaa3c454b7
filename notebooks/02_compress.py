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
# # The same classifier in fewer bytes
#
# Compression in `capibara_eqx` is a function from model to model, on any Equinox model.
# Here a small network that reads digits is rounded as it is, by what its inputs are,
# and trained for what it will be; then it learns another task on top of its codes. At
# the end is a picture of what each form costs.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from capibara_eqx.layers import Linear, RMSNorm
from capibara_eqx.transforms import (
    NM,
    Affine,
    LoRA,
    Rule,
    Ternary,
    collect_hessian,
    convert,
    gptq,
    lora,
    merge,
    prepare_qat,
    quantize,
    sr_ste,
    trainable_spec,
)


# %% [markdown]
# ## Digits, and a model in float32
#
# 1797 pictures of 8 by 8 pixels, of which a fifth is kept for the test: 360 rows, so
# that one of them is 0.28 points of accuracy. Differences of a point or less say little
# here; `docs/evidence.md` has the same comparison over several seeds.

# %%
rows, classes = load_digits(return_X_y=True)
rows = (rows / 8 - 1).astype(np.float32)
split = train_test_split(rows, classes, test_size=0.2, random_state=0, stratify=classes)
train_x, test_x, train_y, test_y = (jnp.asarray(part) for part in split)


class Classifier(eqx.Module):
    norms: tuple[RMSNorm, ...]
    maps: tuple[Linear, ...]

    def __init__(self, *, key):
        widths = (64, 64, 64, 10)
        keys = jax.random.split(key, 3)
        self.norms = tuple(RMSNorm(width) for width in widths[:-1])
        self.maps = tuple(
            Linear(before, after, key=k)
            for before, after, k in zip(widths[:-1], widths[1:], keys, strict=True)
        )

    def __call__(self, x):
        for norm, linear in zip(self.norms[:-1], self.maps[:-1], strict=True):
            x = jax.nn.relu(linear(norm(x)))
        return self.maps[-1](self.norms[-1](x))


def cross_entropy(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


# %% [markdown]
# One function trains them all. `trainable_spec` says what learns: every float array but
# the steps of packed codes, and in a model with adapters these alone. `front` is what
# gradients pass through before the optimiser.


# %%
@eqx.filter_jit
def train(model, x, y, steps=1000, rate=2e-3, front=optax.identity()):
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = optax.chain(front, optax.adam(schedule))
    learns, rest = eqx.partition(model, trainable_spec(model))

    def step(carry, key):
        learns, state = carry
        batch = jax.random.randint(key, (64,), 0, len(x))

        def loss(learns):
            return cross_entropy(eqx.combine(learns, rest), x[batch], y[batch])

        updates, state = optimizer.update(jax.grad(loss)(learns), state, learns)
        return (optax.apply_updates(learns, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    (learns, _), _ = jax.lax.scan(step, (learns, optimizer.init(learns)), keys)
    return eqx.combine(learns, rest)


@eqx.filter_jit
def judge(model, x, y):
    return jnp.mean(model(x).argmax(-1) == y), cross_entropy(model, x, y)


def bytes_of(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array)))


results = {}


def note(name, model):
    """Keep and print accuracy and loss on the test set, and the bytes."""
    accuracy, loss = map(float, judge(model, test_x, test_y))
    results[name] = bytes_of(model), 100 * accuracy
    print(f"{name:16} {accuracy:6.1%}  loss {loss:.3f}  {bytes_of(model):6,} bytes")


start = Classifier(key=jax.random.key(0))
model = train(start, train_x, train_y)
note("float32", model)

# %% [markdown]
# ## Rounded as it is
#
# A rule is a pattern for paths and a form. `quantize` returns the model, whose weights
# are packed codes now, and a report: the true bytes of each weight, steps included, the
# error in decibel, and what was left alone.


# %%
def every_map(spec):
    return [Rule("maps/.*weight", spec)]


small, found = quantize(model, every_map(Affine(8)))
print(found)
note("int8", small)

# %% [markdown]
# Eight bits change nothing that the test set could show, nor do four with a step for
# every 32 neighbours. Two bits, or the three values -1, 0 and 1, are too few for
# weights that were not trained for them, and so are two of every four values.

# %%
for name, spec in {
    "int4 g32": Affine(4, group_size=32),
    "int2": Affine(2),
    "ternary": Ternary(activations="int8"),
    "2:4": NM(2, 4),
}.items():
    small, found = quantize(model, every_map(spec))
    note(name, small)
print(found)

# %% [markdown]
# That table is of 2:4, whose bytes are half of the values and two bits for the place of
# each. Its density is one half.
#
# ## By what the inputs are: GPTQ
#
# The nearest code to every weight is not the one whose outputs are nearest, for inputs
# have much in common: three of the 64 pixels are always black, and neighbours are
# alike. `collect_hessian` adds up the products of inputs on the training set, `gptq`
# rounds column by column and lets the columns still to come make up for the error. Form
# and bytes are the same.


# %%
@eqx.filter_jit
def shift(small):
    """How far its scores are from those in float32, on the test set."""
    return jnp.sqrt(jnp.mean((small(test_x) - model(test_x)) ** 2))


for name, spec in {"int4 g32": Affine(4, group_size=32), "int2": Affine(2)}.items():
    rules = every_map(spec)
    nearest, _ = quantize(model, rules)
    stats = collect_hessian(model, lambda model, x: model(x), [train_x], rules)
    small, found = gptq(model, stats, rules, act_order=True)
    note(f"{name}, GPTQ", small)
    print(f"scores are off by {shift(small):.2f}, to nearest {shift(nearest):.2f}")
    assert shift(small) < shift(nearest)
print(found)

# %% [markdown]
# The scores are about half as far off, though the weights, by their SQNR, are further
# from what they were.
#
# ## Trained for it
#
# `prepare_qat` makes weights that compute as if they were rounded and learn as if they
# were not; `convert` packs them. The same steps of training, from the same start.

# %%
fake, _ = prepare_qat(start, every_map(Ternary(activations="int8")))
note("ternary, QAT", convert(train(fake, train_x, train_y)))

# %% [markdown]
# The same goes for zeros: with an `NM` the largest two of every four are chosen anew at
# each step, and `sr_ste` pulls the others towards zero.

# %%
fake, _ = prepare_qat(start, every_map(NM(2, 4)))
note("2:4, SR-STE", convert(train(fake, train_x, train_y, front=sr_ste())))

# %% [markdown]
# Bytes are the same as without training, and most of what rounding had cost is back.
#
# ## Another task on top of the codes
#
# The digits are turned by a quarter now. The base stays in four bits, as it is; beside
# each of its weights an adapter of rank 4 learns (QLoRA).


# %%
def turned(x):
    return jnp.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def accuracy(model):
    return f"{float(judge(model, turned(test_x), test_y)[0]):.1%}"


base, _ = quantize(model, every_map(Affine(4, group_size=32)))
adapted, found = lora(base, every_map(LoRA(4, alpha=8)), key=jax.random.key(2))
before = accuracy(adapted)
adapted = train(adapted, turned(train_x), train_y, rate=5e-3)
print(found)
print(f"turned digits: {before} without, {accuracy(adapted)} with adapters")
unchanged = jax.tree.map(
    lambda a, b: bool((a == b).all()),
    [linear.weight for linear in base.maps],
    [linear.weight.base for linear in adapted.maps],
)
assert all(jax.tree.leaves(unchanged))

# %% [markdown]
# `merge` adds the adapters to the weights, and makes plain arrays of them. Rounded to
# the steps of four bits again, what the adapters learned is lost where it is smaller
# than half a step; that is done only when asked for.

# %%
plain, again = merge(adapted), merge(adapted, requantize=True)
print(f"merged {accuracy(plain)}, {bytes_of(plain):,} bytes")
print(f"in four bits again {accuracy(again)}, {bytes_of(again):,} bytes")

# %% [markdown]
# ## What it costs
#
# Bytes are those of all parameters. An arrow leads from the float model rounded to
# nearest to what GPTQ or training make of the same bytes, in orange; the dotted line is
# float32.

# %%
labels = {
    "float32": (0, 8),
    "int8": (0, 8),
    "int4 g32": (0, -16),
    "int4 g32, GPTQ": (0, 8),
    "int2": (-8, -16),
    "int2, GPTQ": (22, 8),
    "ternary": (0, -16),
    "ternary, QAT": (0, 8),
    "2:4": (0, -16),
    "2:4, SR-STE": (0, 8),
}
better = {"int2": "int2, GPTQ", "ternary": "ternary, QAT", "2:4": "2:4, SR-STE"}
figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
axes.axhline(results["float32"][1], color="0.6", linestyle=":")
for name, point in results.items():
    axes.plot(*point, "o", color="C1" if name in better.values() else "C0")
    offset = {"xytext": labels[name], "textcoords": "offset points", "ha": "center"}
    axes.annotate(name, point, **offset)
for before, after in better.items():
    arrow = {"arrowstyle": "->", "color": "0.5", "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", results[after], results[before], arrowprops=arrow)
axes.set_xscale("log", base=2)
axes.set_xticks(ticks := [2**n * 1000 for n in range(2, 6)], [f"{n:,}" for n in ticks])
axes.margins(0.15)
axes.set_xlabel("bytes of all parameters")
axes.set_ylabel("test accuracy, %")
axes.set_title("Digits: accuracy by bytes")
plt.show()
