"""What each form costs a small language model, in bits a byte and in bytes.

Mamba blocks over the bytes of Python's own library; what is compressed are the matrices
of the blocks, the tied table of embeddings stays. One model is trained in float32 and
then rounded: to nearest, or by GPTQ (Frantar et al., arXiv 2210.17323) on inputs from
the text it was trained on. Another is trained as ternary from the start, through the
rounding of its weights and its tokens (Ma et al., arXiv 2402.17764), for as many steps.
Held-out bits a byte are of the same bytes for all. *Smaller* compares the matrices
alone with 32 and with 16 bits a weight, steps and scales included.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from capibara_eqx.models import LanguageModel, mamba_language_model
from capibara_eqx.train import (
    Corpus,
    heldout_bits_per_byte,
    next_token_loss,
    read_stdlib_corpus,
)
from capibara_eqx.transforms import (
    Affine,
    Report,
    Rule,
    Ternary,
    collect_hessian,
    convert,
    gptq,
    prepare_qat,
    quantize,
    report,
)

from .._records import Bar
from .._tables import Record, markdown_table
from ._pages import of_model, rest
from ._plots import Line, plot
from ._records import Outcome
from ._training import Schedule, size, train


NAME = "compressed_language"
TITLE = "A compressed language model"
_MATRICES = r".*_proj/weight"
_TERNARY = Ternary(activations="int8")
_WHOLE, _QAT = "float32", "ternary, trained"


@dataclass(frozen=True)
class Settings:
    d_model: int = 128
    layers: int = 2
    seq_len: int = 256
    heldout_bytes: int = 400_000
    group_size: int = 64
    calibration_rows: int = 64
    seeds: tuple[int, ...] = (0,)
    schedule: Schedule = Schedule(3000, 8, 5e-3, weight_decay=0.1)


QUICK = Settings(8, 1, 16, 500, 4, 2, (0,), Schedule(2, 2, 1e-3, evaluations=2))


def run(quick: bool) -> Iterator[Outcome]:
    """Yield an outcome for each form and seed."""
    settings = QUICK if quick else Settings()
    corpus = read_stdlib_corpus()
    for seed in settings.seeds:
        model, curve = _trained(seed, corpus, settings, lambda model: model)
        whole = _score(model, corpus, settings)
        results = {"bits_per_byte": whole, "before": whole}
        yield _outcome(_WHOLE, seed, settings, model, results, curve)
        forms = _forms(settings)
        for name, compress in forms.items():
            small, found = compress(model, corpus, settings)
            after = {"bits_per_byte": _score(small, corpus, settings), "before": whole}
            yield _outcome(name, seed, settings, model, after | _bytes(found))
        fake, curve = _trained(seed, corpus, settings, _prepared)
        during = _score(fake, corpus, settings)
        small = convert(fake)
        after = {"bits_per_byte": _score(small, corpus, settings), "before": during}
        yield _outcome(_QAT, seed, settings, fake, after | _bytes(report(small)), curve)


def _forms(settings: Settings) -> dict[str, Callable[..., tuple[PyTree, Report]]]:
    nearest = {
        "int8": Affine(8),
        f"int4 g{settings.group_size}": Affine(4, group_size=settings.group_size),
        "ternary": _TERNARY,
    }

    def rounded(spec):
        return lambda model, corpus, settings: quantize(model, [Rule(_MATRICES, spec)])

    forms = {name: rounded(spec) for name, spec in nearest.items()}
    forms[f"int4 g{settings.group_size}, GPTQ"] = _by_gptq
    return forms


def _by_gptq(model: LanguageModel, corpus: Corpus, settings: Settings):
    rules = [Rule(_MATRICES, Affine(4, group_size=settings.group_size))]
    starts = np.random.default_rng(0).integers(
        0, corpus.train.size - settings.seq_len, settings.calibration_rows
    )
    rows = np.stack([corpus.train[i : i + settings.seq_len] for i in starts])
    batches = [jnp.asarray(rows, jnp.int32)]
    stats = collect_hessian(model, lambda model, rows: model(rows), batches, rules)
    return gptq(model, stats, rules, act_order=True)


def _prepared(model: LanguageModel) -> LanguageModel:
    return prepare_qat(model, [Rule(_MATRICES, _TERNARY)])[0]


def _trained(
    seed: int,
    corpus: Corpus,
    settings: Settings,
    prepare: Callable[[LanguageModel], LanguageModel],
) -> tuple[LanguageModel, list[dict[str, float]]]:
    model_key, train_key = jax.random.split(jax.random.key(seed))
    model = mamba_language_model(256, settings.d_model, settings.layers, key=model_key)
    text, length = jnp.asarray(corpus.train), settings.seq_len + 1

    def sample(key):
        rows = (settings.schedule.batch_size,)
        starts = jax.random.randint(key, rows, 0, corpus.train.size - length)
        window = jax.vmap(lambda i: jax.lax.dynamic_slice(text, (i,), (length,)))
        return window(starts).astype(jnp.int32)

    def loss(model, rows, key):
        del key
        return next_token_loss(model(rows[:, :-1]), rows[:, 1:])

    return train(
        prepare(model), sample, loss, lambda model: {}, settings.schedule, key=train_key
    )


def _score(model: LanguageModel, corpus: Corpus, settings: Settings) -> float:
    return heldout_bits_per_byte(model, corpus.heldout[: settings.heldout_bytes])


def _bytes(found: Report) -> dict[str, Any]:
    """Of the matrices alone, and of all parameters."""
    matrices = sum(entry.nbytes for entry in found.entries)
    whole = sum(entry.original_bytes for entry in found.entries)
    return {
        "bits_per_weight": 8 * matrices / (whole / 4),
        "smaller_than_32_bits": whole / matrices,
        "matrix_bytes": matrices,
        "bytes": found.nbytes,
        "bytes_before": found.original_bytes,
    }


def _outcome(name, seed, settings, model, results, curve=()) -> Outcome:
    asked = dataclasses.asdict(settings)
    return Outcome(name, seed, asked, size(model), results, list(curve))


def tables(records: Sequence[Record]) -> list[str]:
    """Bits a byte before and after, and bytes, by form."""
    rows = []
    for name in dict.fromkeys(r["model"] for r in records):
        own = of_model(records, name)
        found = own[0]["results"]
        whole = name == _WHOLE
        times = found.get("smaller_than_32_bits", 1)
        rows.append(
            [
                name,
                f"{np.mean([r['results']['before'] for r in own]):.4f}",
                f"{np.mean([r['results']['bits_per_byte'] for r in own]):.4f}",
                "32" if whole else f"{found['bits_per_weight']:.3f}",
                "" if whole else f"{times:.1f}, {times / 2:.1f}",
                "" if whole else f"{found['bytes']:,} of {found['bytes_before']:,}",
                *rest(own)[1:],
            ]
        )
    titles = [
        "matrices",
        "bits a byte before",
        "after",
        "bits a weight",
        "times smaller than 32, 16 bits",
        "bytes of all parameters",
        "seeds",
        "seconds",
    ]
    return markdown_table(titles, "lrrrrrrr", rows)


def bars(records: Sequence[Record]) -> Iterator[Bar]:
    """What rounding to 8 and 4 bits may cost, and that training beats rounding."""

    def mean(name):
        return float(
            np.mean([r["results"]["bits_per_byte"] for r in of_model(records, name)])
        )

    names = list(dict.fromkeys(r["model"] for r in records))
    whole, ternary, trained = mean(_WHOLE), mean("ternary"), mean(_QAT)
    (solved,) = (name for name in names if name.endswith("GPTQ"))
    nearest = solved.removesuffix(", GPTQ")
    cost = round(mean("int8") - whole, 4)
    yield Bar(f"{NAME}_int8", "int8 costs bits a byte", cost, 0.01, False, "")
    gain = round(mean(nearest) - mean(solved), 4)
    statement = "GPTQ at 4 bits saves bits a byte over rounding to nearest"
    yield Bar(f"{NAME}_gptq", statement, gain, 0.0, True, "")
    gain = round(ternary - trained, 4)
    statement = "trained as ternary saves bits a byte over rounded to it"
    yield Bar(f"{NAME}_ternary", statement, gain, 0.1, True, "")


def draw(records: Sequence[Record], path: Path) -> None:
    """Bits a byte over bits a weight, one point a form."""
    lines = []
    for r in records:
        weight = r["results"].get("bits_per_weight", 32.0)
        lines.append(Line(r["model"], [weight], [r["results"]["bits_per_byte"]], "o"))
    plot(path, lines, "bits a weight of the matrices", "bits a byte", log=True)
