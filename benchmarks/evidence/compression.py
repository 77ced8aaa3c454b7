"""What weights of few bits, or with many zeros, cost in accuracy.

The digits of scikit-learn as rows of 64 numbers, split as in the experiment above,
through three linear maps 64-128-128-10, an RMSNorm in front of each and a relu after
the first two. One network is trained in float32 and then compressed as it is, to
nearest or by GPTQ (Frantar et al., arXiv 2210.17323) on the rows of the training; one
trains with ternary weights and activations of eight bits (Ma et al., arXiv 2402.17764),
one with two of every four weights at zero by SR-STE (Zhou et al., arXiv 2102.04010),
all alike but for that. *Points* are hundredths of the rows of the test set; bytes are
those of the compressed weights with their scales and places.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from capibara_eqx.layers import Linear, RMSNorm
from capibara_eqx.transforms import (
    NM,
    Affine,
    Rule,
    Ternary,
    collect_hessian,
    convert,
    gptq,
    prepare_qat,
    quantize,
    report,
    sr_ste,
)

from .._records import Bar
from .._tables import Record, markdown_table
from . import digits
from ._pages import of_model, percent, percents, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "compression"
TITLE = "Digits in few bits"
FLOAT = "float32"
TERNARY = "ternary QAT"
SPARSE = "2:4 SR-STE"


@dataclass(frozen=True)
class Settings:
    hidden: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: Schedule = Schedule(2000, 64, 2e-3, weight_decay=0.01)
    # Of what SR-STE leaves out.
    sparse_decay: float = 2e-4


QUICK = Settings(4, (0,), Schedule(2, 4, 1e-3, evaluations=2))


class Classifier(eqx.Module):
    """Scores of the classes for rows of numbers."""

    norms: tuple[RMSNorm, ...]
    maps: tuple[Linear, ...]

    def __init__(self, hidden: int, *, key: PRNGKeyArray):
        widths = (64, hidden, hidden, 10)
        keys = jax.random.split(key, 3)
        self.norms = tuple(RMSNorm(width) for width in widths[:-1])
        self.maps = tuple(
            Linear(before, after, key=k)
            for before, after, k in zip(widths[:-1], widths[1:], keys, strict=True)
        )

    def __call__(self, x: Float[Array, "rows 64"]) -> Float[Array, "rows classes"]:
        for norm, linear in zip(self.norms[:-1], self.maps[:-1], strict=True):
            x = jax.nn.relu(linear(norm(x)))
        return self.maps[-1](self.norms[-1](x))


def _by(spec: Affine | Ternary | NM) -> Callable[[Classifier, Array], Classifier]:
    return lambda model, rows: quantize(model, _rules(spec))[0]


def _by_gptq(model: Classifier, rows: Array) -> Classifier:
    rules = _rules(Affine(4))
    stats = collect_hessian(model, lambda model, x: model(x), [rows], rules)
    return gptq(model, stats, rules, act_order=True)[0]


# What is made of the network that was trained in float32; `rows` are those that it was
# trained on, for ways that look at them.
AFTER_TRAINING: Mapping[str, Callable[[Classifier, Array], Classifier]] = {
    "int8": _by(Affine(8)),
    "int4": _by(Affine(4)),
    "int4 GPTQ": _by_gptq,
    "ternary": _by(Ternary(activations="int8")),
    "2:4": _by(NM(2, 4)),
}


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each way to train and seed."""
    settings = QUICK if quick else Settings()
    for name in (FLOAT, TERNARY, SPARSE):
        for seed in settings.seeds:
            yield _outcome(name, seed, settings)


def _outcome(name: str, seed: int, settings: Settings) -> Outcome:
    (train_x, train_y), test = digits.data(seed, digits.Settings())
    model_key, train_key = jax.random.split(jax.random.key(seed))
    model = Classifier(settings.hidden, key=model_key)
    front = None
    if name == TERNARY:
        model, _ = prepare_qat(model, _rules(Ternary(activations="int8")))
    elif name == SPARSE:
        model, _ = prepare_qat(model, _rules(NM(2, 4)))
        front = sr_ste(settings.sparse_decay)

    def sample(key):
        rows = settings.schedule.batch_size
        chosen = jax.random.randint(key, (rows,), 0, len(train_x))
        return train_x[chosen], train_y[chosen]

    def loss(model, rows, key):
        del key
        return _loss(model, *rows)

    model, curve = train(
        model,
        sample,
        loss,
        lambda model: {"accuracy": judged(model, *test)["accuracy"]},
        settings.schedule,
        key=train_key,
        front=front,
    )
    if name == FLOAT:
        made = {form: make(model, train_x) for form, make in AFTER_TRAINING.items()}
        results = judged(model, *test)
        results["compressed"] = {form: judged(m, *test) for form, m in made.items()}
    else:
        results = judged(convert(model), *test)
    asked = dataclasses.asdict(settings)
    return Outcome(name, seed, asked, size(model), results, curve)


def judged(model: Classifier, x: Array, y: Array) -> dict:
    """Accuracy and mean loss, and the bytes of the maps."""
    accuracy, loss = _judged(model, x, y)
    found = report(model.maps)
    matrices = {entry.path: entry.nbytes for entry in found.entries}
    matrices |= {path: n for path, shape, n in found.left_alone if len(shape) == 2}
    nbytes = sum(matrices.values())
    return {"accuracy": float(accuracy), "loss": float(loss), "bytes": nbytes}


@eqx.filter_jit
def _judged(model, x, y):
    return jnp.mean(model(x).argmax(-1) == y), _loss(model, x, y)


def _loss(model, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return losses.mean()


def _rules(spec: Affine | Ternary | NM) -> list[Rule]:
    return [Rule("maps/.*weight", spec)]


def _forms(records: Sequence[Record]) -> dict[str, list[dict]]:
    """By the name of a form, what was measured of it, one a seed."""
    trained = of_model(records, FLOAT)
    forms = {FLOAT: [r["results"] for r in trained]}
    for form in AFTER_TRAINING:
        forms[f"{form}, as it is"] = [r["results"]["compressed"][form] for r in trained]
    for name in (TERNARY, SPARSE):
        forms[name] = [r["results"] for r in of_model(records, name)]
    return forms


def _mean(found: Sequence[dict], name: str = "accuracy") -> float:
    return float(np.mean([one[name] for one in found]))


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy, loss and bytes, by form."""
    rows = [
        [
            form,
            percents([one["accuracy"] for one in found]),
            f"{_mean(found, 'loss'):.3f}",
            f"{found[0]['bytes']:,}",
        ]
        for form, found in _forms(records).items()
    ]
    titles = ["weights", "test accuracy, %", "test loss", "bytes of the maps"]
    times = [
        [f"`{name}`", *rest(of_model(records, name))]
        for name in (FLOAT, TERNARY, SPARSE)
    ]
    lines = markdown_table(titles, "lrrr", rows)
    return lines + markdown_table(
        ["trained", "parameters", "seeds", "seconds a seed"], "lrrr", times
    )


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """Means of the seeds, in points below float32."""
    means = {form: _mean(found) for form, found in _forms(records).items()}

    def below(form: str, than: str = FLOAT) -> float:
        return percent(means[than] - means[form])

    wanted = [
        (TERNARY, "ternary weights, trained, below float32", 1.0, False),
        (SPARSE, "2:4 weights, trained by SR-STE, below float32", 1.0, False),
        ("int8, as it is", "int8 weights below float32", 0.3, False),
        ("ternary, as it is", "ternary weights, not trained, below float32", 2.0, True),
    ]
    for form, statement, limit, at_least in wanted:
        name = f"{NAME}_{form}".replace(", ", "_").replace(" ", "_")
        value = below(form)
        yield Bar(name, f"{statement} (mean)", value, limit, at_least, "points")
    losses = {form: _mean(found, "loss") for form, found in _forms(records).items()}
    value = round(losses["int4, as it is"] - losses["int4 GPTQ, as it is"], 4)
    statement = "GPTQ at 4 bits lowers the test loss of rounding to nearest (mean)"
    yield Bar(f"{NAME}_gptq", statement, value, 0.0, True, "nats")
    statement = "2:4 weights, not trained, below those that are (mean)"
    value = below("2:4, as it is", SPARSE)
    yield Bar(f"{NAME}_one_shot", statement, value, 0.5, True, "points")


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
