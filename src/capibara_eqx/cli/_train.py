import argparse
import dataclasses
import os
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .. import __version__
from ..models import generate, model_cost
from ..train import (
    Corpus,
    Interrupted,
    RunConfig,
    RunFolder,
    Trainer,
    TrainResult,
    build_model,
    cached_logits_error,
    check_trainable,
    heldout_bits_per_byte,
    plot_loss,
    read_stdlib_corpus,
    read_text_corpus,
    reference_bits_per_byte,
    resumed_differences,
    train,
)
from ._console import Console, describe, show_cost, show_references
from ._interrupt import interrupts
from ._settings import given_settings


_SAMPLE_BYTES = 200


def run_train(arguments: argparse.Namespace) -> int:
    """`capibara train` and `capibara demo`."""
    console = Console()
    given = given_settings(arguments)
    if given.get("text") is not None:
        # It is noted in the run folder, to be found from any working directory.
        given["text"] = os.path.abspath(given["text"])
    if arguments.resume is not None:
        run, config, corpus = _resume(console, arguments.resume, given)
    else:
        defaults = dict(arguments.defaults)
        if "steps" in given:
            del defaults["seconds"]
        config = RunConfig(**{**defaults, **given})
        # Settings that no model can have are found before anything is written.
        eqx.filter_eval_shape(build_model, config)
        corpus = read_corpus(config)
        out = arguments.out or time.strftime("runs/%Y%m%d-%H%M%S")
        run = RunFolder.create(out, config, describe_corpus(corpus))
    console.say(f"Run folder: {run.path}")
    resumed = arguments.resume is not None
    return _run(console, run, config, corpus, resumed=resumed)


def _resume(
    console: Console, path: str, given: dict[str, Any]
) -> tuple[RunFolder, RunConfig, Corpus]:
    run, config = RunFolder.open(path)
    check_trainable(run)
    # The text may have moved since: that it is the same one is seen by its hash.
    text = given.pop("text", config.text)
    run.check_config(config, given)
    if run.summary_path.exists():
        raise ValueError(
            f"The run in {run.path} is finished: summary.json is there. Start a "
            "new one with --out, or sample from it with "
            f"`capibara generate {run.path}`."
        )
    config = dataclasses.replace(config, text=text)
    try:
        corpus = read_corpus(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The text of the run in {run.path} is gone: {error} If it has moved, say "
            "with --text where it is now."
        ) from error
    if not run.check_text(describe_corpus(corpus)):
        console.say(
            f"{run.text_path} is missing, so whether this is the text that the run "
            "began with cannot be checked; it is noted now."
        )
    return run, config, corpus


def read_corpus(config: RunConfig) -> Corpus:
    """The text of a run."""
    if config.text is None:
        return read_stdlib_corpus(heldout_fraction=config.heldout_fraction)
    return read_text_corpus(
        config.text,
        heldout_fraction=config.heldout_fraction,
        pattern=config.pattern,
        min_train_bytes=(config.batch_size + 1) * config.seq_len,
    )


def _run(
    console: Console,
    run: RunFolder,
    config: RunConfig,
    corpus: Corpus,
    *,
    resumed: bool,
) -> int:
    console.say(
        f"Text: {corpus.source}, {corpus.files} files, {corpus.train.size:,} bytes to "
        f"train on, {corpus.heldout.size:,} held out in {corpus.heldout_files} files; "
        f"sha256 {corpus.sha256[:16]}"
    )
    trainer = Trainer(config, corpus)
    show_cost(console, model_cost(trainer.init_state().model))
    references = reference_bits_per_byte(corpus.train, corpus.heldout)
    with run.checkpoints(warn=console.say) as checkpoints:
        if resumed and checkpoints.latest_step() is None:
            console.say(
                f"There is no checkpoint in {run.checkpoints_path} yet: the run begins "
                "again at step 0."
            )
        try:
            with interrupts() as should_stop, console.progress("Training") as bar:
                console.say("Compiling the training step ...")
                result = train(
                    trainer,
                    run,
                    checkpoints,
                    report=lambda p: bar(p.share, describe(p)),
                    should_stop=should_stop,
                )
        except Interrupted as stop:
            console.say(
                f"Stopped after step {stop.step}; its checkpoint is saved. Continue "
                f"with `capibara train --resume {run.path}`."
            )
            return 130
        with console.progress("Scoring the held-out bytes") as bar:
            bits = heldout_bits_per_byte(result.state.model, corpus.heldout, report=bar)
        show_references(console, bits, references)
        plot_loss(run.plot_path, run.read_metrics(), bits, references)
        sample = _sample(console, result, corpus, config.seed)
        checks = _check(console, trainer, checkpoints, result, corpus)
    run.write_summary(
        {
            "heldout_bits_per_byte": bits,
            "tokens_per_second": result.tokens_per_second,
            "references": references,
            "steps": result.step,
            "training_seconds": result.elapsed,
            "parameters": model_cost(trainer.init_state().model)[-1].parameters,
            "corpus": describe_corpus(corpus),
            "checks": checks,
            "sample": sample,
            "versions": {"capibara_eqx": __version__, "jax": jax.__version__},
        }
    )
    console.say(
        f"{bits:.3f} bits per byte on held-out text after {result.step} steps at "
        f"{result.tokens_per_second:,.0f} tokens/s. Everything is in {run.path}; look "
        f"at {run.plot_path.name}, or go on with `capibara generate {run.path} "
        "--prompt 'def '`."
    )
    return 0 if checks["passed"] else 1


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """What text it is, for `RunFolder.check_text`."""
    return {
        "source": corpus.source,
        "sha256": corpus.sha256,
        "files": corpus.files,
        "heldout_files": corpus.heldout_files,
        "train_bytes": corpus.train.size,
        "heldout_bytes": corpus.heldout.size,
        "skipped": corpus.skipped,
    }


def _sample(console: Console, result: TrainResult, corpus: Corpus, seed: int) -> str:
    prompt = corpus.heldout[:32]
    out = generate(
        result.state.model,
        jnp.asarray(prompt, jnp.int32),
        max_new_tokens=_SAMPLE_BYTES,
        temperature=0.7,
        key=jax.random.key(seed),
    )
    text = decode(prompt.tolist() + out.tokens.tolist())
    console.say("A sample, from the first 32 held-out bytes on:")
    console.say(text)
    return text


def _check(console, trainer, checkpoints, result, corpus) -> dict[str, Any]:
    """Cached against full logits, resumed against uninterrupted; uses the state up."""
    tokens = corpus.heldout[: min(512, corpus.heldout.size)]
    error, tolerance = cached_logits_error(result.state.model, tokens)
    agrees = error <= tolerance
    console.say(
        f"Cached logits against the full forward pass over {tokens.size} bytes: "
        f"largest difference {error:.1e}, allowed {tolerance:.1e}: {_verdict(agrees)}"
    )
    differing = resumed_differences(trainer, result.state, checkpoints, result.step)
    console.say(
        "Stopped and resumed from the checkpoint against going on, 5 steps, bit by "
        f"bit: {_verdict(not differing)}"
    )
    if differing:
        console.say(f"These arrays differ: {', '.join(differing)}")
    return {
        "passed": agrees and not differing,
        "cached_logits_error": error,
        "cached_logits_tolerance": tolerance,
        "resumed_differences": differing,
    }


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def decode(tokens: list[int]) -> str:
    """Bytes as text; what is no UTF-8 becomes a replacement sign."""
    return bytes(tokens).decode("utf-8", errors="replace")
