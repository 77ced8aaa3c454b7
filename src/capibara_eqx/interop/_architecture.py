from collections.abc import Callable
from typing import Any, NamedTuple

from ._config_entries import Entries
from ._hf_names import Names
from ._structure import BlockSpec, Structure


class Architecture(NamedTuple):
    """How one architecture of transformers is read and written.

    `read`: the structure that the entries of a config.json say. `write`: the entries
    that say all of a structure, besides those that every architecture has. `lacking`:
    what a structure of its kind has, or lacks, that there is no entry for; `None` if
    there is an entry for all.
    """

    model_type: str
    spec: type[BlockSpec]
    read: Callable[[Entries], Structure]
    write: Callable[[Structure], dict[str, Any]]
    names: Names
    lacking: Callable[[Structure], list[str]] | None = None
