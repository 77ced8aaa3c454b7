"""The 64 pixels of an 8 by 8 picture, one after the other.

The digits of scikit-learn, four fifths of the 1797 to train on and the rest to test on,
split anew for each seed with the classes in proportion; no augmentation. A linear map
of each pixel, residual blocks, a norm, the mean over the tokens and a linear map to ten
scores. The figure is that of the last model, whatever the curve shows before; the
settings were chosen on the split of another seed. The task of the same kind in the
papers is sequential MNIST, 784 pixels, where S5 reaches 99.65 % (Smith, Warrington and
Linderman, arXiv 2208.04933).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from capibara_eqx.internal import require_extra
from capibara_eqx.layers import S4D, S5, AbstractSequenceMixer, Linear, RMSNorm
from capibara_eqx.models import ResidualBlock, Stack

from .._records import Bar
from .._tables import Record, markdown_table
from ._pages import of_model, percent, percents, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "digits"
TITLE = "Digits as sequences"
MIXERS: dict[str, Callable[..., AbstractSequenceMixer]] = {"S4D": S4D, "S5": S5}
_CLASSES = 10


@dataclass(frozen=True)
class Settings:
    d_model: int = 64
    layers: int = 3
    d_state: int = 32
    dropout: float = 0.1
    # Nearly a whole row may still be there at its end.
    dt_min: float = 0.01
    dt_max: float = 0.1
    pixels: int = 64
    test_share: float = 0.2
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: Schedule = Schedule(2000, 32, 3e-3, weight_decay=0.05)


QUICK = Settings(
    *(4, 1, 4, 0.1, 0.01, 0.1, 16, 0.2, (0,)),
    Schedule(2, 4, 1e-3, evaluations=2),
)


class Classifier(eqx.Module):
    """Scores of the classes for rows of numbers."""

    encoder: Linear
    stack: Stack
    norm: RMSNorm
    head: Linear

    def __init__(self, mixer: str, settings: Settings, *, key: PRNGKeyArray):
        in_key, out_key, *keys = jax.random.split(key, settings.layers + 2)
        width = settings.d_model
        shape = {"d_state": settings.d_state, "dropout_rate": settings.dropout}
        steps = {"dt_min": settings.dt_min, "dt_max": settings.dt_max}
        blocks = [
            ResidualBlock(
                MIXERS[mixer](width, **shape, **steps, key=k), width, settings.dropout
            )
            for k in keys
        ]
        self.encoder = Linear(1, width, key=in_key)
        self.stack = Stack(blocks)
        self.norm = RMSNorm(width)
        self.head = Linear(width, _CLASSES, key=out_key)

    def __call__(
        self, x: Float[Array, "rows seq"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "rows classes"]:
        y, _ = self.stack(self.encoder(x[..., None]), key=key)
        return self.head(self.norm(y).mean(axis=1))


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each mixer and seed."""
    settings = QUICK if quick else Settings()
    for name in MIXERS:
        for seed in settings.seeds:
            yield _outcome(name, seed, settings)


def data(seed: int, settings: Settings) -> tuple[tuple[Array, Array], ...]:
    """Rows and classes to train on and to test on."""
    sets = require_extra("sklearn.datasets", "peers")
    selection = require_extra("sklearn.model_selection", "peers")
    rows, classes = sets.load_digits(return_X_y=True)
    rows = (rows[:, : settings.pixels] / 8 - 1).astype(np.float32)
    train_x, test_x, train_y, test_y = selection.train_test_split(
        rows,
        classes,
        test_size=settings.test_share,
        random_state=seed,
        stratify=classes,
    )
    return tuple(
        (jnp.asarray(x), jnp.asarray(y, jnp.int32))
        for x, y in ((train_x, train_y), (test_x, test_y))
    )


def _outcome(name: str, seed: int, settings: Settings) -> Outcome:
    (train_x, train_y), (test_x, test_y) = data(seed, settings)
    model_key, train_key = jax.random.split(jax.random.key(seed))
    model = Classifier(name, settings, key=model_key)

    def sample(key):
        rows = settings.schedule.batch_size
        chosen = jax.random.randint(key, (rows,), 0, len(train_x))
        return train_x[chosen], train_y[chosen]

    def loss(model, rows, key):
        scores = model(rows[0], key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, rows[1])
        return losses.mean()

    @eqx.filter_jit
    def accuracy(model):
        model = eqx.nn.inference_mode(model)
        return jnp.mean(model(test_x).argmax(-1) == test_y)

    model, curve = train(
        model,
        sample,
        loss,
        lambda model: {"accuracy": float(accuracy(model))},
        settings.schedule,
        key=train_key,
    )
    results = {"accuracy": curve[-1]["accuracy"], "tested": len(test_x)}
    asked = dataclasses.asdict(settings)
    return Outcome(name, seed, asked, size(model), results, curve)


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy at the end, by mixer."""
    rows = []
    for name in MIXERS:
        own = of_model(records, name)
        accuracies = [r["results"]["accuracy"] for r in own]
        rows.append([f"`{name}`", percents(accuracies), *rest(own)])
    titles = ["mixer", "test accuracy, %", "parameters", "seeds", "seconds a seed"]
    return markdown_table(titles, "lrrrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """Each mixer's mean."""
    for name in MIXERS:
        found = [r["results"]["accuracy"] for r in of_model(records, name)]
        statement = f"{name} knows the digits of the test set (mean of the seeds)"
        value = percent(float(np.mean(found)))
        yield Bar(f"{NAME}_{name}", statement, value, 97.0, True, "%")


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
    plot(path, lines, "step", "test accuracy, %")
