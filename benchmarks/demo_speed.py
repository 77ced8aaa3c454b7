"""Training steps of `capibara demo`, by the implementation of its kernels.

Its model, its settings and its text. `default` is what the demo runs, `xla` the same
with `implementation="xla"`. A call is a few steps, one begun while the one before runs,
as in training; the error is that of the first step's loss, and compiling includes one
step.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

# What the command's `demo` sets; no part of the public interface.
from capibara_eqx.cli._main import _DEMO
from capibara_eqx.layers import Mamba
from capibara_eqx.models import LanguageModel
from capibara_eqx.train import (
    Corpus,
    RunConfig,
    Trainer,
    read_stdlib_corpus,
    read_text_corpus,
)

from . import _oracle
from ._harness import Contender, Prepared, Settings, entries, race
from ._records import Measurement
from .decode import layer_weights


OPERATION = "demo"

# Steps a call, and steps until the learning rate has fallen: more than are measured.
_STEPS, _RUN = 4, 4000
_SMALL = {"d_model": 16, "seq_len": 32, "batch_size": 2}
_IMPLEMENTATIONS = {"default": None, "xla": "xla"}


def measure(settings: Settings) -> Iterator[Measurement]:
    """Yield one measurement an implementation."""
    config = RunConfig(**_DEMO)
    if settings.quick:
        config = dataclasses.replace(config, **_SMALL)
    corpus = read_text_corpus(__file__) if settings.quick else read_stdlib_corpus()
    sizes = ("d_model", "n_layers", "d_state", "batch_size", "seq_len")
    spec = {"name": "demo", **{name: getattr(config, name) for name in sizes}}
    spec["tokens_per_call"] = _STEPS * config.batch_size * config.seq_len
    contenders = [
        Contender(name, partial(_prepare, config, implementation, corpus))
        for name, implementation in _IMPLEMENTATIONS.items()
    ]
    reference = partial(_first_loss, config, corpus)
    yield from race(settings, OPERATION, "train", entries(spec, contenders, reference))


def _prepare(config: RunConfig, implementation: str | None, corpus: Corpus) -> Prepared:
    config = dataclasses.replace(config, implementation=implementation)
    trainer = Trainer(config, corpus)
    start = time.perf_counter()
    # A step uses its state up; this one is thrown away.
    jax.block_until_ready(trainer.step(trainer.init_state(), 0, 0.0)[1])
    compile_ms = (time.perf_counter() - start) * 1e3
    state, number = trainer.init_state(), 0

    def run():
        nonlocal state, number
        losses = []
        for _ in range(_STEPS):
            state, metrics = trainer.step(state, number, min(number / _RUN, 1.0))
            losses.append(metrics["loss"])
            number += 1
        return jax.block_until_ready(losses)

    return Prepared(run, compile_ms, outputs=lambda losses: losses[0])


def _first_loss(config: RunConfig, corpus: Corpus) -> np.ndarray:
    trainer = Trainer(config, corpus)
    model = trainer.init_state().model
    tokens = trainer.dataset.batch(0)
    return _oracle.language_model_loss(*_parameters(model), tokens)


def _parameters(model: LanguageModel):
    blocks = model.stack.blocks
    assert isinstance(blocks, tuple)
    layers = []
    for block in blocks:
        assert isinstance(block.mixer, Mamba)
        layers.append((np.asarray(block.norm.weight), layer_weights(block.mixer)))
    embedding, norm = np.asarray(model.embedding.weight), np.asarray(model.norm.weight)
    return embedding, layers, norm
