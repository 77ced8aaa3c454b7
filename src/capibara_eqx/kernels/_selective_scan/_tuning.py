"""Block sizes: from the table of what was measured, or by rule.

`tuning.json` has an entry a kernel for each kind of device on which `make tune` has
run.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from .._backends import device_kind


TABLE = Path(__file__).with_name("tuning.json")

# For devices that are not in the table. A processor's second-level cache holds the
# states of 64 tokens of a tile, a GPU's shared memory those of 16.
_CHUNKS = {"cpu": 64, "pallas_tpu": 128, "pallas_gpu": 16}


class Sizes(NamedTuple):
    """How a kernel cuts its work; what is `None` is as its own rule says.

    - `chunk`: tokens between two saved states. A longer one saves fewer states and
        computes more of them again at once.
    - `tile`: channels of a block, on a TPU.
    - `group`: states of a channel that are in registers at a time, on a GPU.
    - `stages`: chunks in a GPU's shared memory, one in use, the others on their way.
    """

    chunk: int
    tile: int | None = None
    group: int | None = None
    stages: int | None = None


def sizes_for(kernel: str, seq: int) -> Sizes:
    """The block sizes of a kernel on the device that jax runs on.

    **Arguments:**

    - `kernel`: its name.
    - `seq`: tokens of a row.
    """
    tuned = _table().get(device_kind(), {}).get(kernel, {})
    sizes = Sizes(**{"chunk": _CHUNKS[kernel], **tuned})
    # A short sequence makes a short chunk, where nothing demands certain sizes.
    return sizes._replace(chunk=min(sizes.chunk, seq)) if kernel == "cpu" else sizes


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text())
