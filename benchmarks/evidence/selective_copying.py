"""Recall the data tokens that stood among noise, in their order.

Data tokens stand at random places of a row of noise; after it, as many markers ask for
them. What to remember depends on what is read, which a time-invariant system cannot
weigh. Two blocks of one width each, trained alike on fresh rows; *accuracy* is that of
a token of held-out rows. After Gu and Dao, *Mamba*, arXiv 2312.00752, table 1, where
rows have 4096 tokens and Mamba with S4 inside reaches 56.4 %, with S6 99.8 %.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from capibara_eqx.layers import S4D, Mamba
from capibara_eqx.models import LanguageModel

from .._records import Bar
from .._tables import Record, markdown_table
from ._models import language_model
from ._pages import of_model, percent, percents, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "selective_copying"
TITLE = "Selective copying"
MIXERS = {"Mamba": Mamba, "S4D": S4D}
_NOISE = 0


@dataclass(frozen=True)
class Settings:
    seq: int = 256
    data_tokens: int = 16
    vocab_size: int = 16
    d_model: int = 64
    layers: int = 2
    d_state: int = 16
    held_out: int = 512
    seeds: tuple[int, ...] = (0,)
    schedule: Schedule = Schedule(10_000, 32, 3e-3)


QUICK = Settings(12, 3, 6, 8, 1, 4, 8, (0,), Schedule(2, 4, 1e-3, evaluations=2))


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each mixer and seed."""
    settings = QUICK if quick else Settings()
    for seed in settings.seeds:
        for name in MIXERS:
            yield _outcome(name, seed, settings)


def batch(
    key: PRNGKeyArray, rows: int, settings: Settings
) -> tuple[Int[Array, "rows length"], Int[Array, "rows data"]]:
    """Rows of noise, data and markers, and the data in order."""
    data_key, place_key = jax.random.split(key)
    shape = (rows, settings.data_tokens)
    # The first id is noise and the last one the marker.
    data = jax.random.randint(data_key, shape, 1, settings.vocab_size - 1)
    noise = jax.random.uniform(place_key, (rows, settings.seq))
    places = jnp.sort(jnp.argsort(noise)[:, : settings.data_tokens])
    row = jnp.full((rows, settings.seq), _NOISE)
    row = row.at[jnp.arange(rows)[:, None], places].set(data)
    markers = jnp.full(shape, settings.vocab_size - 1)
    return jnp.concatenate([row, markers], axis=1), data


def _outcome(name: str, seed: int, settings: Settings) -> Outcome:
    model_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    model = language_model(
        lambda key: MIXERS[name](settings.d_model, settings.d_state, key=key),
        settings.vocab_size,
        settings.d_model,
        settings.layers,
        key=model_key,
    )
    tokens, data = batch(test_key, settings.held_out, settings)

    @eqx.filter_jit
    def accuracy(model):
        return jnp.mean(_recalled(model, tokens, data).argmax(-1) == data)

    def loss(model, rows, key):
        del key
        scores = _recalled(model, *rows)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, rows[1])
        return losses.mean()

    model, curve = train(
        model,
        lambda key: batch(key, settings.schedule.batch_size, settings),
        loss,
        lambda model: {"accuracy": float(accuracy(model))},
        settings.schedule,
        key=train_key,
    )
    results = {"accuracy": curve[-1]["accuracy"]}
    asked = dataclasses.asdict(settings)
    return Outcome(name, seed, asked, size(model), results, curve)


def _recalled(
    model: LanguageModel, tokens: Int[Array, "rows length"], data: Int[Array, "rows n"]
) -> Float[Array, "rows n vocab"]:
    features, _ = model.features(tokens)
    return model.scores(features[:, -data.shape[1] :])


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy at the end, by mixer."""
    rows = []
    for name in MIXERS:
        own = of_model(records, name)
        accuracies = [r["results"]["accuracy"] for r in own]
        rows.append([f"`{name}`", percents(accuracies), *rest(own)])
    titles = ["mixer", "accuracy, %", "parameters", "seeds", "seconds a seed"]
    return markdown_table(titles, "lrrrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """The two ends of the gap."""
    for name, limit, at_least in (("Mamba", 98.0, True), ("S4D", 60.0, False)):
        found = [r["results"]["accuracy"] for r in of_model(records, name)]
        value = percent(min(found) if at_least else max(found))
        statement = f"{name} recalls data tokens (every seed)"
        yield Bar(f"{NAME}_{name}", statement, value, limit, at_least, "%")


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy while training."""
    lines = [
        Line(
            r["model"],
            [p["step"] for p in r["curve"]],
            [percent(p["accuracy"]) for p in r["curve"]],
        )
        for r in records
    ]
    plot(path, lines, "step", "held-out accuracy, %")
