"""Tokens between two saved states: from the table of what was measured, or by rule.

`tuning.json` has an entry a kernel for each kind of device on which `make tune` has
run. A longer chunk saves fewer states and computes more of them again at once.
"""

import functools
import json
from pathlib import Path

import jax


TABLE = Path(__file__).with_name("tuning.json")

# For devices that are not in the table. A processor's second-level cache holds the
# states of 64 tokens of a tile, a GPU's shared memory those of 16.
_CHUNKS = {"cpu": 64, "pallas_tpu": 128, "pallas_gpu": 16}


def chunk_for(kernel: str, seq: int) -> int:
    """How many tokens a chunk has, for a kernel on the device that jax runs on."""
    kind = jax.devices()[0].device_kind
    chunk = _table().get(kind, {}).get(kernel, _CHUNKS[kernel])
    # A short sequence makes a short chunk, where nothing demands certain sizes.
    return min(chunk, seq) if kernel == "cpu" else chunk


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())
