import errno
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ..internal import check_positive, require_extra
from ._files import checksums, find_damage, read_object, write_json
from ._lock import hold_lock
from ._quiet import LateErrors


_FULL = (errno.ENOSPC, errno.EDQUOT)
# What Orbax raises over files that are missing or hold something else.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
# Beside the parts of a checkpoint: size and checksum of each of their files.
_CHECKSUMS = "checksums.json"
_PARTS = ("state", "meta")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message says what is left."""


class Checkpointer:
    """Whole states of a run on disk, the newest few.

    A checkpoint appears under its step number only when it is complete, so that a
    process may die at any moment. Arrays are written by Orbax, under their path in
    the PyTree; functions and settings are not written but taken from the template
    that `restore` is given.

    One process at a time may write; any number may read meanwhile.

    !!! example

        ```python
        with Checkpointer("run/checkpoints") as checkpoints:
            checkpoints.save(100, state, {"elapsed": 12.5})
            state, meta = checkpoints.restore(state)
        ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        read_only: bool = False,
        warn: Callable[[str], None] | None = None,
    ):
        """**Arguments:**

        - `folder`: made if it does not exist, unless `read_only`.
        - `keep`: number of checkpoints to keep, newest first.
        - `read_only`: change nothing in `folder`, where another process may be writing;
            `save` is refused.
        - `warn`: given a sentence when `restore` passes over a damaged checkpoint; a
            Python warning if not given.

        **Raises:**

        `ImportError` with the install command if Orbax is not installed;
        `CheckpointError` if another process has `folder` open to write.
        """
        check_positive("keep", keep)
        self._ocp = require_extra("orbax.checkpoint", "train")
        self.folder = Path(folder).absolute()
        self.read_only = read_only
        self._warn = _warn if warn is None else warn
        self._lock = None if read_only else self._hold_lock()
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            enable_async_checkpointing=False,
            # What a dead process left; a reader would delete what is being written.
            cleanup_tmp_directories=not read_only,
        )
        # Named here, so that what another process wrote can be described too.
        handlers = {
            "state": self._ocp.StandardCheckpointHandler(),
            "meta": self._ocp.JsonCheckpointHandler(),
        }
        self._manager: Any = None
        if self.folder.is_dir():
            self._manager = _look_again(
                lambda: self._ocp.CheckpointManager(
                    self.folder, options=options, item_handlers=handlers
                )
            )

    def _hold_lock(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return hold_lock(self.folder / "lock")
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.folder} is being written by {error}: two trainings cannot "
                "share a run folder. Wait for that one or stop it, or start another "
                "run with --out."
            ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is being written, and let others write."""
        if self._manager is not None:
            self._manager.close()
        if self._lock is not None:
            self._lock.close()

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, `None` if there is none."""
        return max(self._steps(), default=None)

    def _steps(self):
        return [] if self._manager is None else list(self._manager.all_steps())

    def save(self, step: int, state: PyTree, meta: dict[str, Any]) -> None:
        """Write `state` and `meta`, unless the newest checkpoint is of this step.

        **Arguments:**

        - `step`: number of the checkpoint, not below that of the newest.
        - `state`: any PyTree; its arrays are written.
        - `meta`: what JSON can hold.

        **Raises:**

        `CheckpointError` if it could not be written; earlier ones are left as they are.
        `ValueError` for a `step` below the newest, or `meta` that JSON cannot hold.
        """
        latest = self.latest_step()
        self._check_save(step, latest, meta)
        if step == latest:
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_named_arrays(state)),
            meta=self._ocp.args.JsonSave(meta),
        )
        with LateErrors(str(self.folder)):
            try:
                self._manager.save(step, args=args)
                self._manager.wait_until_finished()
                target = self.folder / str(step)
                write_json(target / _CHECKSUMS, checksums(target, _PARTS))
            except (OSError, ValueError, RuntimeError) as error:
                self._discard(step)
                raise self._write_error(step, error) from error

    def _check_save(self, step, latest, meta):
        if self.read_only:
            raise ValueError(
                f"The checkpoints in {self.folder} were opened with `read_only`, so "
                f"the one of step {step} cannot be saved. Open them without it."
            )
        if step < 0 or (latest is not None and step < latest):
            raise ValueError(
                f"`step` must not be below {0 if latest is None else latest}, the "
                f"newest in {self.folder}, got {step}. Steps of a run only go up; give "
                "another run another folder."
            )
        try:
            json.dumps(meta)
        except TypeError as error:
            raise ValueError(
                f"`meta` must be what JSON can hold, but {error}. Turn arrays into "
                "numbers or lists, or put them into `state`."
            ) from error

    def _discard(self, step):
        """Remove what a failed save left: it is what fills the disk."""
        # Its threads may still write a file or two into the folder.
        for _ in range(20):
            left = list(self.folder.glob(f"{step}.*tmp*"))
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            if not left:
                return
            time.sleep(0.05)

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest checkpoint that can be read.

        A damaged one is passed over with a warning and, unless `read_only`, put aside
        as `STEP.damaged`, so that the run may go on from the one before.

        **Arguments:**

        - `template`: a PyTree of the structure that was saved; its arrays give shapes
            and dtypes, everything else is taken from it.

        **Returns:**

        `(state, meta)`.

        **Raises:**

        `CheckpointError` if there is no checkpoint, none that can be read, or it is of
        another structure.
        """
        arrays = _named_arrays(template)
        restored = self._restore_newest(arrays)
        saved = restored["state"]

        def fill(path, leaf):
            return saved[_name(path)] if eqx.is_array(leaf) else leaf

        return jax.tree_util.tree_map_with_path(fill, template), restored["meta"]

    def _restore_newest(self, arrays):
        steps = sorted(self._steps(), reverse=True)
        if not steps:
            raise CheckpointError(
                f"There is no whole checkpoint in {self.folder}: the run ended before "
                "its first one. Start it again."
            )
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, arrays)
            except CheckpointError:
                raise
            except _UNREADABLE as error:
                if self._moved_on(steps):
                    return self._restore_newest(arrays)
                damaged[step] = str(error).partition("\n")[0] or type(error).__name__
            else:
                self._put_aside(damaged, step)
                return restored
        every = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
        raise CheckpointError(
            f"Every checkpoint in {self.folder} is damaged ({every}). Put back a copy "
            "of one if you have it, or start a new run with --out."
        )

    def _moved_on(self, steps):
        """Whether a training has replaced `steps` while this process was reading."""
        if self.read_only:
            _look_again(self._manager.reload)
        return max(steps) != self.latest_step()

    def _put_aside(self, damaged, used):
        for step, text in damaged.items():
            message = (
                f"The checkpoint of step {step} in {self.folder} is damaged ({text}); "
                f"the one of step {used} is used instead."
            )
            if not self.read_only:
                aside = self.folder / f"{step}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                os.replace(self.folder / str(step), aside)
                message += f" The damaged one is now {aside}."
            self._warn(message)
        if damaged and not self.read_only:
            self._manager.reload()

    def _read(self, step, arrays):
        folder = self.folder / str(step)
        # One saved by another process this moment, or by an old version, has none.
        if (folder / _CHECKSUMS).exists():
            expected = read_object(folder / _CHECKSUMS, "It is damaged.")
            damage = find_damage(folder, expected)
            if damage is not None:
                raise ValueError(damage)
        self._check_structure(step, arrays)
        specs = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
            )
            for name, leaf in arrays.items()
        }
        return self._manager.restore(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(specs),
                meta=self._ocp.args.JsonRestore(),
            ),
        )

    def _check_structure(self, step, arrays):
        found = self._manager.item_metadata(step)["state"]
        found = {name: _describe(entry) for name, entry in found.items()}
        wanted = {name: _describe(leaf) for name, leaf in arrays.items()}
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
        kept = self.latest_step()
        left = (
            "there is no earlier one, so the run will start again"
            if kept is None
            else f"the one of step {kept} is whole, and the run can go on from it"
        )
        return CheckpointError(
            f"Could not write the checkpoint of step {step} to {self.folder}: "
            f"{_cause(error)}; {left}. Free some space on that disk, then resume the "
            "run."
        )


def _look_again(look: Callable[[], Any]) -> Any:
    """A training deletes old checkpoints, also while they are being listed."""
    for _ in range(9):
        try:
            return look()
        except FileNotFoundError:
            continue
    return look()


def _cause(error: Exception) -> str:
    """Why a write failed, in the words of the system."""
    code = getattr(error, "errno", None)
    inner = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None and inner is not None:
        code = int(inner[1])
    if code in _FULL or "No space left" in str(error):
        return "the disk is full"
    if code is not None:
        return os.strerror(code)
    return str(error).partition("\n")[0] or type(error).__name__


def _describe(array: Any) -> str:
    shape = ", ".join(map(str, array.shape))
    return f"{np.dtype(array.dtype).name}[{shape}]"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path)


def _named_arrays(tree: PyTree) -> dict[str, jax.Array | np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {_name(path): leaf for path, leaf in leaves}
