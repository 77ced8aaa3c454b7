"""A run small enough to train in a test."""

import numpy as np

from capibara_eqx.train import Corpus, RunConfig


def tiny_config(**changes) -> RunConfig:
    """Two layers of width 8 on windows of 16 bytes, 40 steps."""
    settings = {
        "d_model": 8,
        "n_layers": 2,
        "d_state": 2,
        "seq_len": 16,
        "batch_size": 4,
        "steps": 40,
        "checkpoint_every": 20,
        "learning_rate": 1e-2,
    }
    bound = {"steps": None} if "seconds" in changes else {}
    return RunConfig(**{**settings, **bound, **changes})


def tiny_corpus(size: int = 4000) -> Corpus:
    """Bytes with some structure: a noisy count from 0 to 9, over and over."""
    rng = np.random.default_rng(0)
    data = (np.arange(size) % 10 + 48).astype(np.uint8)
    noisy = rng.random(size) < 0.05
    data[noisy] = rng.integers(0, 256, noisy.sum())
    cut = size * 9 // 10
    return Corpus(data[:cut], data[cut:], 1, 0, "0" * 64, "a noisy count")


# Flags of a training that takes a moment.
SMALL = [
    "--d-model=8",
    "--n-layers=1",
    "--d-state=2",
    "--seq-len=16",
    "--batch-size=4",
    "--learning-rate=0.01",
]
