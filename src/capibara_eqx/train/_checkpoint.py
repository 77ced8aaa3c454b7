import errno
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ..internal import check_positive, require_extra


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left."""


class Checkpointer:
    """Whole states of a run on disk, the newest few.

    A checkpoint appears under its step number only when it is complete, so that a
    process may die at any moment. Arrays are written by Orbax, under their path in
    the PyTree; functions and settings are not written but taken from the template
    that `restore` is given.

    !!! example

        ```python
        with Checkpointer("run/checkpoints") as checkpoints:
            checkpoints.save(100, state, {"elapsed": 12.5})
            state, meta = checkpoints.restore(state)
        ```
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """**Arguments:**

        - `folder`: made if it does not exist.
        - `keep`: number of checkpoints to keep, newest first.

        **Raises:**

        `ImportError` with the install command if Orbax is not installed.
        """
        check_positive("keep", keep)
        self._ocp = require_extra("orbax.checkpoint", "train")
        self.folder = Path(folder).absolute()
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        # Named here, so that what another process wrote can be described too.
        handlers = {
            "state": self._ocp.StandardCheckpointHandler(),
            "meta": self._ocp.JsonCheckpointHandler(),
        }
        self._manager = self._ocp.CheckpointManager(
            self.folder, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is being written."""
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, `None` if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Write `state` and `meta`, unless this step is there already.

        **Arguments:**

        - `step`: number of the checkpoint.
        - `state`: any PyTree; its arrays are written.
        - `meta`: what JSON can hold.

        **Raises:**

        `CheckpointError` if it could not be written. Earlier ones are left as they are.
        """
        if step == self.latest_step():
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_named_arrays(state)),
            meta=self._ocp.args.JsonSave(meta),
        )
        try:
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint.

        **Arguments:**

        - `template`: a PyTree of the structure that was saved; its arrays give shapes
            and dtypes, everything else is taken from it.

        **Returns:**

        `(state, meta)`.

        **Raises:**

        `CheckpointError` if there is no checkpoint, or it is of another structure.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(
                f"There is no whole checkpoint in {self.folder}: the run ended before "
                "its first one. Start it again."
            )
        arrays = _named_arrays(template)
        self._check_structure(step, arrays)
        specs = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
            )
            for name, leaf in arrays.items()
        }
        restored = self._manager.restore(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(specs),
                meta=self._ocp.args.JsonRestore(),
            ),
        )
        saved = restored["state"]

        def fill(path, leaf):
            return saved[_name(path)] if eqx.is_array(leaf) else leaf

        return jax.tree_util.tree_map_with_path(fill, template), restored["meta"]

    def _check_structure(self, step, arrays):
        found = self._manager.item_metadata(step)["state"]
        found = {name: tuple(entry.shape) for name, entry in found.items()}
        wanted = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
        if found == wanted:
            return
        differing = [
            f"{name}: saved {found.get(name)}, wanted {wanted.get(name)}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        raise CheckpointError(
            f"The checkpoint of step {step} in {self.folder} is of another model: "
            f"{len(differing)} arrays differ, first {differing[0]}. Build the model "
            "with the settings that it was trained with."
        )

    def _write_error(self, step, error):
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        cause = "the disk is full" if full else str(error).splitlines()[0]
        kept = self.latest_step()
        left = "no earlier one" if kept is None else f"the one of step {kept} is kept"
        return CheckpointError(
            f"Could not write the checkpoint of step {step} to {self.folder}: {cause}; "
            f"{left}. Free some space or choose another folder, then resume."
        )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path)


def _named_arrays(tree: PyTree) -> dict[str, jax.Array | np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {_name(path): leaf for path, leaf in leaves}
