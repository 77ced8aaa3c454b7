"""Five digits told apart from one image of each.

The digits of scikit-learn, 8 by 8 pixels. Tasks to learn from have 100 images of each
of the ten classes, drawn for each seed; tasks to be judged by have the others, 74 or
more. A task draws five classes and numbers them anew, so that no class has a number to
be learned by heart: a network that does not adapt is right in one of five. A network
64-128-128-64 of ReLUs makes the embeddings of R2-D2 and of prototypes; MAML and ANIL
add a linear map to five scores and learn a rate for each array, for five inner steps.
The figures with them are those of raw pixels, by the nearest example.

It is images that are held out, not classes. Ten classes are too few for the latter: a
network that has seen five of them learns what tells those five apart, and of the other
five it knows less than the pixels do. The second table has the same methods trained on
the images of five classes and judged by the five others, which is known to fail. The
characters of Omniglot are new classes, and there are a thousand to learn from.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

from capibara_eqx.meta.tasks import digits, split_classes, split_examples

from .._records import Bar
from .._tables import Record, markdown_table
from ._few_shot import (
    METHODS,
    Episodes,
    Inner,
    found_of,
    judge,
    judge_pixels,
    make_method,
    mean_of,
    nearest_pixels,
)
from ._meta_training import MetaSchedule, OuterLoop
from ._models import ReLUNetwork
from ._pages import of_model, percent, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import size


NAME = "few_shot_digits"
TITLE = "Digits from one image of each"
_PIXELS = "nearest pixels"
# What raw pixels were found to reach by an independent program.
_PIXELS_EXPECTED = 75.7
# In the names of the records of methods that are judged by classes held out.
_NEW_CLASSES = ", new classes"


@dataclass(frozen=True)
class Settings:
    hidden: int = 128
    features: int = 64
    train_images: int = 100
    train_classes: int = 5
    episodes: Episodes = Episodes(5, 1, 15)
    inner: Inner = Inner(5, 0.1)
    test_tasks: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: MetaSchedule = MetaSchedule(1000, 8, 1e-3)


QUICK = Settings(
    *(3, 4, 100, 5, Episodes(2, 1, 2), Inner(1, 0.1), 4, (0,)),
    MetaSchedule(2, 2, 1e-3, evaluations=2),
)


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each way to hold out, method and seed."""
    settings = QUICK if quick else Settings()
    for held_out in ("", _NEW_CLASSES):
        for method in METHODS:
            for seed in settings.seeds:
                yield _outcome(method, seed, settings, held_out)


def _outcome(name: str, seed: int, settings: Settings, held_out: str = "") -> Outcome:
    key = jax.random.key(seed)
    split_key, body_key, head_key, train_key, test_key = jax.random.split(key, 5)
    if held_out:
        train, test = split_classes(split_key, digits(), settings.train_classes)
    else:
        train, test = split_examples(split_key, digits(), settings.train_images)
    test_keys = jax.random.split(test_key, settings.test_tasks)
    episodes, schedule = settings.episodes, settings.schedule
    widths = (64, settings.hidden, settings.hidden, settings.features)
    body = ReLUNetwork(widths, key=body_key)
    asked = (episodes, settings.inner)
    method = make_method(name, body, settings.features, *asked, key=head_key)

    @eqx.filter_jit
    def shares(learner, pool):
        logits = lambda task: method.logits(learner, task)
        return judge(logits, pool, episodes, test_keys)

    def evaluate(learner):
        return {"accuracy": float(shares(learner, test).mean())}

    loop = OuterLoop(
        method.learner,
        lambda pool, key: episodes.sample(key, schedule.tasks, pool),
        method.task_loss,
        optax.adam(schedule.learning_rate),
        key=train_key,
        data=train,
    )
    curve = loop.run(schedule, evaluate)
    results = found_of(shares(loop.learner, test))
    pixels = {_PIXELS: nearest_pixels}
    results |= {"pixels": judge_pixels(pixels, test, episodes, test_keys)[_PIXELS]}
    given = dataclasses.asdict(settings)
    model, parameters = name + held_out, size(loop.learner)
    return Outcome(model, seed, given, parameters, results, curve)


def _pixels(records: Sequence[Record], held_out: str = "") -> list[dict[str, float]]:
    """Of each seed once: all methods of a seed are judged by the same tasks."""
    own = [r for name in METHODS for r in of_model(records, name + held_out)]
    return list({r["seed"]: r["results"]["pixels"] for r in own}.values())


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy on the test tasks, by method, of either way to hold out."""
    lines = _table(records, "")
    if _pixels(records, _NEW_CLASSES):
        lines += ["With classes held out:", "", *_table(records, _NEW_CLASSES)]
    return lines


def _table(records: Sequence[Record], held_out: str) -> list[str]:
    rows = [
        [name, mean_of([r["results"] for r in own]), *rest(own)]
        for name in METHODS
        if (own := of_model(records, name + held_out))
    ]
    rows.append([_PIXELS, mean_of(_pixels(records, held_out))])
    titles = ["method", "test accuracy, %", "parameters", "seeds", "seconds a seed"]
    return markdown_table(titles, "lrrrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """R2-D2 and MAML, and whether raw pixels are what they should be."""
    for name in ("R2-D2", "MAML"):
        found = [r["results"]["accuracy"] for r in of_model(records, name)]
        statement = f"{name} tells five digits apart from one image of each (mean)"
        value = percent(float(np.mean(found)))
        yield Bar(f"{NAME}_{name}", statement, value, 94.0, True, "%")
    found = [pixels["accuracy"] for pixels in _pixels(records)]
    apart = round(abs(percent(float(np.mean(found))) - _PIXELS_EXPECTED), 2)
    statement = f"{_PIXELS}, distance from {_PIXELS_EXPECTED} % (mean)"
    yield Bar(f"{NAME}_pixels", statement, apart, 2.0, False, "points")


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy while training, with images held out."""
    lines = [
        Line(
            r["model"],
            [p["step"] for p in r["curve"]],
            [percent(p["accuracy"]) for p in r["curve"]],
        )
        for name in METHODS
        for r in of_model(records, name)
    ]
    plot(path, lines, "outer step", "test accuracy, %")
