"""What came after the special token when it was there before?

A row of random tokens, in which the special token stands once, and again at the end:
the answer is the token that followed it. Two Mamba blocks, trained at the lengths below
and asked for the answer at all lengths that the table has. A test row is made and read
in chunks of 64 tokens: one compiled function, called again with the cache that it
returned, so its temporaries are the same at every length. *At once* is what a call on
the whole row would allocate. After Gu and Dao, *Mamba*, arXiv 2312.00752, table 11,
where a Mamba trained at 256 tokens answers every time up to 2^20, and attention no
longer at twice the training length.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from capibara_eqx.layers import Mamba
from capibara_eqx.models import LanguageModel

from .._harness import temp_bytes
from .._records import Bar
from .._tables import Record, markdown_table
from ._models import language_model
from ._pages import percent, percents, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "induction_heads"
TITLE = "Induction heads"


@dataclass(frozen=True)
class Settings:
    trained_at: tuple[int, ...] = (64, 128, 256)
    tested_at: tuple[int, ...] = tuple(2**k for k in range(6, 15))
    vocab_size: int = 16
    d_model: int = 64
    layers: int = 2
    d_state: int = 16
    # One compiled function for all lengths, so all are multiples of a chunk.
    chunk: int = 64
    held_out: int = 256
    seeds: tuple[int, ...] = (0, 1)
    schedule: Schedule = Schedule(6000, 16, 2e-3)


QUICK = Settings(
    (8, 16),
    (8, 16, 32),
    *(4, 8, 1, 4, 8, 4, (0,)),
    Schedule(2, 2, 1e-3, evaluations=2),
)


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each seed."""
    settings = QUICK if quick else Settings()
    for seed in settings.seeds:
        yield _outcome(seed, settings)


def batch(
    key: PRNGKeyArray, rows: int, seq: int, settings: Settings
) -> tuple[Int[Array, "rows seq"], Int[Array, " rows"]]:
    """Rows of one length, and the answers."""
    return chunk_of(key, rows, seq, 0, seq, settings)


def chunk_of(
    key: PRNGKeyArray,
    rows: int,
    size: int,
    start: int | Int[Array, ""],
    seq: int | Int[Array, ""],
    settings: Settings,
) -> tuple[Int[Array, "rows size"], Int[Array, " rows"]]:
    """Tokens `start` to `start + size` of rows of `seq` tokens, and the answers.

    The noise is drawn chunk by chunk, so that no row need be there as a whole; the key
    and `start` decide it.
    """
    special = settings.vocab_size - 1
    place_key, answer_key, noise_key = jax.random.split(key, 3)
    # Something follows the first special token, and the last one is another.
    place = jax.random.randint(place_key, (rows, 1), 0, seq - 2)
    answer = jax.random.randint(answer_key, (rows, 1), 0, special)
    noise = jax.random.fold_in(noise_key, start)
    tokens = jax.random.randint(noise, (rows, size), 0, special)
    at = start + jnp.arange(size)[None]
    tokens = jnp.where((at == place) | (at == seq - 1), special, tokens)
    return jnp.where(at == place + 1, answer, tokens), answer[:, 0]


def _outcome(seed: int, settings: Settings) -> Outcome:
    model_key, train_key, test_key = jax.random.split(jax.random.key(seed), 3)
    model = language_model(
        lambda key: Mamba(settings.d_model, settings.d_state, key=key),
        settings.vocab_size,
        settings.d_model,
        settings.layers,
        key=model_key,
    )
    longest = max(settings.trained_at)
    tokens, answers = batch(test_key, settings.held_out, longest, settings)

    @eqx.filter_jit
    def accuracy(model):
        return jnp.mean(_answered(model, tokens).argmax(-1) == answers)

    model, curve = train(
        model,
        lambda key: _mixed_batch(key, settings),
        _loss,
        lambda model: {"accuracy": float(accuracy(model))},
        settings.schedule,
        key=train_key,
    )
    reader = _reader(model, settings)
    lengths = {}
    for seq in settings.tested_at:
        key = jax.random.fold_in(test_key, seq)
        lengths[str(seq)] = {
            "accuracy": _accuracy_at(seq, model, reader, key, settings),
            "temp_bytes": temp_bytes(reader),
            "temp_bytes_at_once": temp_bytes(_at_once(model, seq, settings)),
        }
    results = {"lengths": lengths}
    asked = dataclasses.asdict(settings)
    return Outcome("Mamba", seed, asked, size(model), results, curve)


def _mixed_batch(key: PRNGKeyArray, settings: Settings):
    """Rows of every training length alike, padded on the left to the longest one."""
    longest = max(settings.trained_at)
    rows = settings.schedule.batch_size
    kind_key, key = jax.random.split(key)
    lengths = jnp.asarray(settings.trained_at)
    seq = jax.random.choice(kind_key, lengths, (rows, 1))
    # Each row is one of its own length, moved to the end of the batch.
    keys = jax.random.split(key, rows)
    tokens, answers = jax.vmap(
        lambda key, seq: chunk_of(key, 1, longest, 0, seq[0], settings)
    )(keys, seq)
    at = jnp.arange(longest)[None] - (longest - seq)
    tokens = jnp.take_along_axis(tokens[:, 0], jnp.maximum(at, 0), axis=1)
    return tokens, answers[:, 0], jnp.where(at >= 0, 0, -1)


def _loss(model, rows, key):
    del key
    tokens, answers, segment_ids = rows
    scores = _answered(model, tokens, segment_ids)
    return optax.softmax_cross_entropy_with_integer_labels(scores, answers).mean()


def _answered(model: LanguageModel, tokens, segment_ids=None):
    features, _ = model.features(tokens, segment_ids=segment_ids)
    return model.scores(features[:, -1])


def _reader(model: LanguageModel, settings: Settings) -> jax.stages.Compiled:
    """What reads a chunk: scores of the answers, the new cache, and the answers."""
    arrays, fixed = eqx.partition(model, eqx.is_array)

    def read(arrays, cache, key, start, seq):
        model = eqx.combine(arrays, fixed)
        rows = (settings.held_out, settings.chunk)
        tokens, answers = chunk_of(key, *rows, start, seq, settings)
        features, cache = model.prefill_features(tokens, cache)
        return model.scores(features[:, -1]), cache, answers

    cache = model.init_cache((settings.held_out,))
    whole_numbers = jnp.asarray(0), jnp.asarray(1)
    return (
        jax.jit(read).lower(arrays, cache, jax.random.key(0), *whole_numbers).compile()
    )


def _accuracy_at(
    seq: int, model: LanguageModel, reader: jax.stages.Compiled, key, settings: Settings
) -> float:
    """Of rows that are made and read in chunks, each dropped when it is read."""
    arrays = eqx.filter(model, eqx.is_array)
    cache = model.init_cache((settings.held_out,))
    scores = answers = jnp.zeros((settings.held_out,))
    for start in range(0, seq, settings.chunk):
        place = jnp.asarray(start), jnp.asarray(seq)
        scores, cache, answers = reader(arrays, cache, key, *place)
    return float(jnp.mean(scores.argmax(-1) == answers))


def _at_once(model: LanguageModel, seq: int, settings: Settings) -> jax.stages.Compiled:
    arrays, fixed = eqx.partition(model, eqx.is_array)
    tokens = jax.ShapeDtypeStruct((settings.held_out, seq), jnp.int32)

    def answer(arrays, tokens):
        return _answered(eqx.combine(arrays, fixed), tokens)

    return jax.jit(answer).lower(arrays, tokens).compile()


def tables(records: Sequence[Record]) -> list[str]:
    """Accuracy and memory by length."""
    rows = []
    for seq, memory in records[0]["results"]["lengths"].items():
        accuracies = [r["results"]["lengths"][seq]["accuracy"] for r in records]
        sizes = (memory["temp_bytes"], memory["temp_bytes_at_once"])
        sizes = ["" if size is None else f"{size / 2**20:.1f}" for size in sizes]
        rows.append([f"{int(seq):,}", percents(accuracies), *sizes])
    titles = ["tokens", "accuracy, %", "temporaries, MiB", "at once, MiB"]
    parameters, seeds, seconds = rest(records)
    return [
        *markdown_table(titles, "rrrr", rows),
        f"{parameters} parameters, seeds: {seeds}, {seconds} s a seed.",
        "",
    ]


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """That length does not matter."""
    for seq in ("256", "16384"):
        if seq in records[0]["results"]["lengths"]:
            worst = min(r["results"]["lengths"][seq]["accuracy"] for r in records)
            statement = f"Mamba answers at {int(seq):,} tokens (every seed)"
            yield Bar(f"{NAME}_{seq}", statement, percent(worst), 99.0, True, "%")


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy against length."""
    lines = []
    for r in records:
        lengths = r["results"]["lengths"]
        accuracies = [percent(at["accuracy"]) for at in lengths.values()]
        lines.append(Line(r["model"], [int(seq) for seq in lengths], accuracies, ".-"))
    plot(path, lines, "tokens", "accuracy, %", log=True)
