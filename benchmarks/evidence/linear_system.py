"""A linear system, found again from what it answered.

A system of two damped oscillations, drawn anew for each seed, is driven with white
noise by `scipy.signal.dlsim` in float64; a `LinearSSM` with twice as many states learns
from the answers, in float32: by AdamW, and then by `scipy.optimize.least_squares` with
the Jacobian of `jax.jacfwd` through the layer. The layer has a silu in front of its
states, but silu(x) - silu(-x) = x: given x and -x as two channels it can be that linear
system exactly, and nothing but the data tells it to. Errors are relative to scipy, in
the Euclidean norm: of the answers to other noise, eight times as long; of the answer to
an impulse; and of the poles, the largest distance of a true pole from the nearest
eigenvalue of the layer's discrete matrix.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.signal
from jaxtyping import Array, Float

from capibara_eqx.layers import LinearSSM

from .._records import Bar
from .._tables import Record, markdown_table
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "linear_system"
TITLE = "A known linear system"


@dataclass(frozen=True)
class Settings:
    oscillations: int = 2
    states: int = 8
    radii: tuple[float, float] = (0.8, 0.95)
    angles: tuple[float, float] = (0.2, 2.5)
    rows: int = 64
    seq: int = 64
    longer: int = 8
    impulse: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: Schedule = Schedule(2000, 32, 1e-2)
    # Of the residual by Levenberg and Marquardt, after the schedule.
    fit_evaluations: int = 1000


QUICK = Settings(
    *(1, 4, (0.8, 0.95), (0.2, 2.5), 16, 8, 2, 8, (0,)),
    Schedule(2, 2, 1e-3, evaluations=2),
    2,
)


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each seed, which is a system and an initial layer."""
    settings = QUICK if quick else Settings()
    for seed in settings.seeds:
        yield _outcome(seed, settings)


class System(NamedTuple):
    """A discrete system of one input and one output, in float64."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray


def system(seed: int, settings: Settings) -> System:
    """A stable system of complex poles that answers white noise with variance 1."""
    random = np.random.default_rng(seed)
    count = settings.oscillations
    poles = random.uniform(*settings.radii, count) * np.exp(
        1j * np.sort(random.uniform(*settings.angles, count))
    )
    states = 2 * count
    A = np.zeros((states, states))
    for i, pole in enumerate(poles):
        block = [[pole.real, -pole.imag], [pole.imag, pole.real]]
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    B, C = random.normal(size=(states, 1)), random.normal(size=(1, states))
    D = random.normal(size=(1, 1))
    energy = np.linalg.norm(answers(System(A, B, C, D), np.eye(1, 4096)))
    return System(A, B, C / energy, D / energy)


def answers(true: System, x: np.ndarray) -> np.ndarray:
    """What scipy's system answers to each row, `(rows, seq)`."""
    return np.stack([scipy.signal.dlsim((*true, 1.0), row)[1][:, 0] for row in x])


def predicted(
    model: LinearSSM, x: Float[Array, "rows seq"]
) -> Float[Array, "rows seq"]:
    """What the layer answers: it reads the input and its negative."""
    return model(jnp.stack([x, -x], axis=-1))[..., 0]


def relative_error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def _outcome(seed: int, settings: Settings) -> Outcome:
    true = system(seed, settings)
    random = np.random.default_rng([seed, 1])
    x = random.normal(size=(settings.rows, settings.seq))
    other_x = random.normal(size=(settings.rows, settings.longer * settings.seq))
    y, other_y = answers(true, x), answers(true, other_x)
    inputs, targets = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    model_key, train_key = jax.random.split(jax.random.key(seed))
    model = _layer(settings, key=model_key)

    def sample(key):
        rows = settings.schedule.batch_size
        chosen = jax.random.randint(key, (rows,), 0, settings.rows)
        return inputs[chosen], targets[chosen]

    def loss(model, rows, key):
        del key
        return jnp.mean((predicted(model, rows[0]) - rows[1]) ** 2)

    answer = eqx.filter_jit(predicted)

    def held_out(model):
        found = np.asarray(answer(model, jnp.asarray(other_x, jnp.float32)))
        return {"error": relative_error(found, other_y)}

    model, curve = train(
        model, sample, loss, held_out, settings.schedule, key=train_key
    )
    model = _least_squares(model, inputs, targets, settings.fit_evaluations)
    impulse = np.eye(1, settings.impulse)
    found = np.asarray(answer(model, jnp.asarray(impulse, jnp.float32)))
    expected = answers(true, impulse)
    results = {
        "error": held_out(model)["error"],
        "impulse_error": relative_error(found, expected),
        "pole_error": _pole_error(model, true),
        "impulse": {"true": expected[0].tolist(), "found": found[0].tolist()},
    }
    asked = dataclasses.asdict(settings)
    return Outcome("LinearSSM", seed, asked, size(model), results, curve)


def _layer(settings: Settings, *, key) -> LinearSSM:
    return LinearSSM(
        *(2, 1, settings.states),
        conv_dim=1,
        dropout_rate=0.0,
        dt_min=0.1,
        dt_max=1.0,
        residual=False,
        key=key,
    )


def _least_squares(
    model: LinearSSM,
    inputs: Float[Array, "rows seq"],
    targets: Float[Array, "rows seq"],
    evaluations: int,
) -> LinearSSM:
    """The model fitted to all rows, with so many evaluations at most.

    There are few parameters, and a steep valley with a flat bottom: the Jacobian is
    cheap, and knows the way that the gradient takes long to find.
    """
    trained, fixed = eqx.partition(model, eqx.is_inexact_array)
    start, unravel = jax.flatten_util.ravel_pytree(trained)

    @jax.jit
    def residual(flat):
        return (predicted(eqx.combine(unravel(flat), fixed), inputs) - targets).ravel()

    jacobian = jax.jit(jax.jacfwd(residual))
    fitted = scipy.optimize.least_squares(
        lambda flat: np.asarray(residual(jnp.asarray(flat, start.dtype)), np.float64),
        np.asarray(start, np.float64),
        lambda flat: np.asarray(jacobian(jnp.asarray(flat, start.dtype)), np.float64),
        method="lm",
        x_scale="jac",
        max_nfev=evaluations,
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-12,
    )
    return eqx.combine(unravel(jnp.asarray(fitted.x, start.dtype)), fixed)


def _pole_error(model: LinearSSM, true: System) -> float:
    found = np.linalg.eigvals(np.asarray(model.discretized()[0], np.float64))
    poles = np.linalg.eigvals(true.A)
    return float(np.abs(poles[:, None] - found[None]).min(axis=1).max())


def tables(records: Sequence[Record]) -> list[str]:
    """Errors by system."""
    names = ("error", "impulse_error", "pole_error")
    rows = [
        [
            str(r["seed"]),
            *(f"{r['results'][name]:.2g}" for name in names),
            str(r["parameters"]),
            f"{r['wall_s']:.0f}",
        ]
        for r in records
    ]
    titles = ["seed", "other noise", "impulse", "poles", "parameters", "seconds"]
    return markdown_table(titles, "rrrrrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """The worst of the seeds."""
    statements = {
        "error": "relative error of the answers to other noise (every seed)",
        "impulse_error": "relative error of the answer to an impulse (every seed)",
        "pole_error": "distance of the poles (every seed)",
    }
    for name, statement in statements.items():
        worst = max(r["results"][name] for r in records)
        yield Bar(f"{NAME}_{name}", statement, worst, 0.01, False, "")


def draw(records: Sequence[Record], path: Path) -> None:
    """Answers to an impulse."""
    lines = []
    for r in records:
        impulse = r["results"]["impulse"]
        tokens = list(range(len(impulse["true"])))
        lines.append(Line("scipy", tokens, impulse["true"], "o"))
        lines.append(Line("LinearSSM", tokens, impulse["found"], "-"))
    plot(path, lines, "token", "answer to an impulse")
