import argparse
import shutil
from pathlib import Path

from ..models import LanguageModel
from ..train import (
    Corpus,
    RunFolder,
    check_trainable,
    heldout_bits_per_byte,
    load_model,
    read_rules,
    write_compression,
)
from ..transforms import Report, quantize
from ._console import Console
from ._train import describe_corpus, read_corpus


def run_quantize(arguments: argparse.Namespace) -> int:
    """`capibara quantize`."""
    console = Console()
    rules = read_rules(arguments.rules)
    run, config = RunFolder.open(arguments.run)
    check_trainable(run)
    model = load_model(run, config)
    small, report = quantize(model, rules)
    show_report(console, report)
    corpus = read_corpus(config)
    run.check_text(describe_corpus(corpus))
    out = arguments.out or f"{run.path}-quantized"
    target = RunFolder.create(out, config, describe_corpus(corpus))
    try:
        before = _score(console, "as trained", model, corpus)
        after = _score(console, "compressed", small, corpus)
        with target.checkpoints(warn=console.say) as checkpoints:
            checkpoints.save(0, small, {})
        # Last: it marks the folder as a whole compressed run.
        facts = {"run": str(run.path), "before": before, "after": after}
        write_compression(target, rules, facts)
    except BaseException:
        shutil.rmtree(target.path, ignore_errors=True)
        raise
    show_losses(console, before, after)
    stored = _bytes_on_disk(target.checkpoints_path)
    console.say(
        f"The compressed run is in {target.path}, its checkpoint takes {stored:,} "
        f"bytes there; go on with `capibara generate {target.path} --prompt 'def '`."
    )
    return 0


def show_report(console: Console, report: Report) -> None:
    """What became of every weight."""
    rows = [
        (
            entry.path,
            entry.scheme,
            f"{entry.bits_per_weight:.3f}",
            f"{entry.nbytes:,}",
            "" if entry.sqnr is None else f"{float(entry.sqnr):.2f}",
            f"{float(entry.density):.3f}",
        )
        for entry in report.entries
    ]
    columns = ("path", "scheme", "bits a weight", "bytes", "SQNR dB", "density")
    console.table("Weights", columns, rows)
    alone = sum(nbytes for _, _, nbytes in report.left_alone)
    console.say(
        f"{len(report.left_alone)} parameters of {alone:,} bytes are left alone. All "
        f"of them: {report.nbytes:,} bytes, {report.original_bytes:,} before, "
        f"{report.original_bytes / report.nbytes:.2f} times smaller."
    )


def show_losses(console: Console, before: float, after: float) -> None:
    """The held-out result of the model as trained and as compressed."""
    rows = [
        ("as trained", f"{before:.4f}", ""),
        ("compressed", f"{after:.4f}", f"{after - before:+.4f}"),
    ]
    console.table("The same held-out bytes", ("", "bits per byte", ""), rows)


def _score(console: Console, name: str, model: LanguageModel, corpus: Corpus) -> float:
    with console.progress(f"Scoring the held-out bytes, {name}") as bar:
        return heldout_bits_per_byte(model, corpus.heldout, report=bar)


def _bytes_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
