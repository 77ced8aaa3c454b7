"""Is the number of ones so far odd?

A state that flips its sign at every one knows. Mamba's decays lie between 0 and 1 and
flip nothing; a state that the input may turn by half a circle does. `Rotating` is a
small selective layer of complex states on `kernels.linear_recurrence`, whose turn ends
at half a circle; `Rotating, angle 0` is the same with positive decays, all else alike.
The turn of `Mamba3` is a product that ends nowhere: what it lacks to half a circle adds
up over rows that are longer than the trained ones. Trained on rows of 40 bits, judged
at each prefix; tested on the parity of whole rows, of which chance knows half. After
Lahoti et al., *Mamba-3*, arXiv 2603.15569, whose table gives 100 % of a scaled accuracy
with rotation and 2.3 % without, to Mamba-2 0.9 %.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from capibara_eqx.layers import AbstractSequenceMixer, Mamba, Mamba3

from .._records import Bar
from .._tables import Record, markdown_table
from ._models import language_model
from ._pages import of_model, percent, percents, rest
from ._plots import Line, plot
from ._records import Outcome
from ._rotating import RotatingSSM
from ._training import Schedule, size, train


NAME = "parity"
TITLE = "Parity"
_MAMBA, _ROTATING, _STILL = "Mamba", "Rotating", "Rotating, angle 0"
_MAMBA3 = "Mamba3"
MIXERS: dict[str, Callable[..., AbstractSequenceMixer]] = {
    _MAMBA: lambda width, key: Mamba(width, key=key),
    _STILL: lambda width, key: RotatingSSM(width, rotates=False, key=key),
    _ROTATING: lambda width, key: RotatingSSM(width, key=key),
    # Steps so long that half a circle is near.
    _MAMBA3: lambda width, key: Mamba3(
        *(width, 16),
        head_dim=width // 2,
        rope_fraction=1.0,
        dt_min=0.3,
        dt_max=1.0,
        key=key,
    ),
}


@dataclass(frozen=True)
class Settings:
    seq: int = 40
    tested_at: tuple[int, ...] = (5, 10, 20, 40, 64, 128, 256, 512, 1024)
    d_model: int = 32
    layers: int = 2
    held_out: int = 1024
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: Schedule = Schedule(3000, 64, 3e-3)


QUICK = Settings(6, (3, 12), 4, 1, 8, (0,), Schedule(2, 2, 1e-3, evaluations=2))


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each mixer and seed."""
    settings = QUICK if quick else Settings()
    for name in MIXERS:
        for seed in settings.seeds:
            yield _outcome(name, seed, settings)


def batch(
    key: PRNGKeyArray, rows: int, seq: int
) -> tuple[Int[Array, "rows seq"], Int[Array, "rows seq"]]:
    """Bits, and the parity of each prefix."""
    bits = jax.random.randint(key, (rows, seq), 0, 2)
    return bits, jnp.cumsum(bits, axis=1) % 2


def _outcome(name: str, seed: int, settings: Settings) -> Outcome:
    model_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    width = settings.d_model
    model = language_model(
        lambda key: MIXERS[name](width, key), 2, width, settings.layers, key=model_key
    )

    @eqx.filter_jit
    def accuracy(model, rows):
        bits, parity = rows
        features, _ = model.features(bits)
        return jnp.mean(model.scores(features[:, -1]).argmax(-1) == parity[:, -1])

    def accuracy_at(model, seq):
        key = jax.random.fold_in(test_key, seq)
        return float(accuracy(model, batch(key, settings.held_out, seq)))

    model, curve = train(
        model,
        lambda key: batch(key, settings.schedule.batch_size, settings.seq),
        _loss,
        lambda model: {"accuracy": accuracy_at(model, settings.seq)},
        settings.schedule,
        key=train_key,
    )
    accuracies = {str(seq): accuracy_at(model, seq) for seq in settings.tested_at}
    asked = dataclasses.asdict(settings)
    results = {"accuracy": accuracies}
    return Outcome(name, seed, asked, size(model), results, curve)


def _loss(model, rows, key):
    del key
    bits, parity = rows
    return optax.softmax_cross_entropy_with_integer_labels(model(bits), parity).mean()


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy by length, then what the models are."""
    names = [name for name in MIXERS if of_model(records, name)]
    rows = []
    for seq in records[0]["results"]["accuracy"]:
        row = [f"{int(seq):,}"]
        for name in names:
            found = [r["results"]["accuracy"][seq] for r in of_model(records, name)]
            row.append(percents(found))
        rows.append(row)
    titles = ["bits", *(f"`{name}`, %" for name in names)]
    sizes = [[f"`{name}`", *rest(of_model(records, name))] for name in names]
    return [
        "Mean of the seeds, with the least and the largest:",
        "",
        *markdown_table(titles, "r" * len(titles), rows),
        *markdown_table(
            ["mixer", "parameters", "seeds", "seconds a seed"], "lrrr", sizes
        ),
    ]


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """At six times the training length, as no shortcut reaches there, or at it."""
    for name, seq, limit, at_least in (
        (_ROTATING, "256", 99.0, True),
        (_STILL, "256", 60.0, False),
        (_MAMBA, "256", 60.0, False),
        (_MAMBA3, "40", 99.0, True),
    ):
        found = [r["results"]["accuracy"].get(seq) for r in of_model(records, name)]
        if found and None not in found:
            value = percent(min(found) if at_least else max(found))
            statement = f"{name} knows the parity of {seq} bits (every seed)"
            yield Bar(f"{NAME}_{name}", statement, value, limit, at_least, "%")


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy against length."""
    lines = [
        Line(
            r["model"],
            [int(seq) for seq in r["results"]["accuracy"]],
            [percent(share) for share in r["results"]["accuracy"].values()],
            ".-",
        )
        for r in records
    ]
    plot(path, lines, "bits", "accuracy, %", log=True)
