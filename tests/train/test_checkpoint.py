"""Checkpoints that others read or write meanwhile, that are damaged, or do not fit."""

import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.processes import run_python

from capibara_eqx.train import Checkpointer, CheckpointError


STATE = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}


def saved(folder: Path, *steps: int) -> Path:
    """`folder` with a checkpoint of each of `steps`, its arrays `step` times STATE."""
    with Checkpointer(folder) as checkpoints:
        for step in steps:
            state = {name: step * array for name, array in STATE.items()}
            checkpoints.save(step, state, {"step": step})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_reader_changes_nothing(tmp_path):
    folder = saved(tmp_path / "c", 1, 2)
    half_written = folder / "3.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "part").write_text("being written")
    before = files(folder)
    with Checkpointer(folder, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
        state, meta = checkpoints.restore(STATE)
    assert meta == {"step": 2}
    np.testing.assert_array_equal(state["b"], 2 * STATE["b"])
    assert files(folder) == before


def test_reader_of_nothing_makes_nothing(tmp_path):
    with Checkpointer(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "none").exists()


_WRITER = """
import sys
import jax.numpy as jnp
from capibara_eqx.train import Checkpointer
state = {"a": jnp.arange(300_000.0)}
with Checkpointer(sys.argv[1]) as checkpoints:
    for step in range(1, 41):
        checkpoints.save(step, state, {"step": step})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_readers_do_no_harm_to_a_writer(tmp_path):
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "c")]
    writer = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "1\n"
    read = []
    while writer.poll() is None:
        with Checkpointer(tmp_path / "c", read_only=True) as checkpoints:
            state, meta = checkpoints.restore({"a": jnp.zeros(300_000)})
        assert float(state["a"][-1]) == 299_999
        read.append(meta["step"])
    shown = writer.stdout.read()
    writer.stdout.close()
    assert writer.returncode == 0, shown
    assert shown.endswith("\n40\n")
    assert read == sorted(read)
    assert len(read) > 3


_HOLDER = """
import sys, time
from capibara_eqx.train import Checkpointer
checkpoints = Checkpointer(sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""


def test_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "c")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    with pytest.raises(CheckpointError, match=f"process {holder.pid} on .*--out"):
        Checkpointer(tmp_path / "c")
    Checkpointer(tmp_path / "c", read_only=True).close()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    saved(tmp_path / "c", 1)
    saved(tmp_path / "c", 2)  # closed, so free again


def _truncate(folder: Path):
    for file in (folder / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _alter(folder: Path):
    file = max((folder / "state" / "d").iterdir(), key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGE = {
    "no state": (lambda folder: shutil.rmtree(folder / "state"), "state/.* is missing"),
    "no meta": (lambda folder: shutil.rmtree(folder / "meta"), "meta/.* is missing"),
    "truncated": (_truncate, r"has \d+ bytes instead of"),
    "altered": (_alter, "has changed"),
    "no sums": (lambda folder: (folder / "checksums.json").write_text("{"), "no JSON"),
}


@pytest.mark.parametrize(
    ("kind", "checked"),
    # What only the checksums tell is not asked of a checkpoint without them.
    [*((kind, True) for kind in DAMAGE), ("no state", False), ("no meta", False)],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, kind, checked):
    folder = saved(tmp_path / "c", 4, 8)
    damage, message = DAMAGE[kind]
    if not checked:
        # As a process leaves it that dies before it notes them.
        (folder / "8" / "checksums.json").unlink()
        message = "state|meta"
    damage(folder / "8")
    before = files(folder)
    match = f"step 8 in .*/c is damaged .*{message}.*of step 4 is used"
    with (
        Checkpointer(folder, read_only=True) as checkpoints,
        pytest.warns(UserWarning, match=match),
    ):
        _, meta = checkpoints.restore(STATE)
    assert meta == {"step": 4}
    assert files(folder) == before
    said = []
    with Checkpointer(folder, warn=said.append) as checkpoints:
        state, meta = checkpoints.restore(STATE)
        np.testing.assert_array_equal(state["a"], 4 * STATE["a"])
        assert (folder / "8.damaged").is_dir()
        # The run comes by the same steps again.
        assert checkpoints.latest_step() == 4
        checkpoints.save(6, state, {"step": 6})
        checkpoints.save(8, state, {"step": 8})
        assert checkpoints.restore(STATE)[1] == {"step": 8}
    assert len(said) == 1
    assert str(folder / "8.damaged") in said[0]


def test_whole_checkpoint_without_checksums_is_read(tmp_path):
    folder = saved(tmp_path / "c", 4, 8)
    (folder / "8" / "checksums.json").unlink()
    with warnings.catch_warnings(action="error"), Checkpointer(folder) as checkpoints:
        assert checkpoints.restore(STATE)[1] == {"step": 8}


_FULL = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from capibara_eqx.train import Checkpointer, CheckpointError
rng = np.random.default_rng(0)
state = {f"a{i}": jnp.asarray(rng.normal(size=5000)) for i in range(30)}
with Checkpointer(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, state, {})
    except CheckpointError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    checkpoints.restore(state)
    checkpoints.save(3, state, {})
    assert checkpoints.latest_step() == 3
"""


def test_failed_save_says_one_sentence_and_leaves_nothing(tmp_path):
    folder = tmp_path / "c"
    done = run_python(_FULL.replace("sys.argv[1]", repr(str(folder))))
    assert done.returncode == 0, done.stdout
    # Orbax before 0.12 says the same about its threads at every save, good or bad.
    lines = [x for x in done.stdout.splitlines() if "_SignalingThread.join" not in x]
    # Not a line of the threads that wrote beside.
    assert lines == [
        f"Could not write the checkpoint of step 2 to {folder}: File too large; the "
        "one of step 1 is whole, and the run can go on from it. Free some space on "
        "that disk, then resume the run."
    ]
    assert {path.name for path in folder.iterdir()} == {"1", "3", "lock"}


@pytest.mark.errors
class TestErrors:
    def test_all_damaged(self, tmp_path):
        folder = saved(tmp_path / "c", 1, 2)
        for step in ("1", "2"):
            shutil.rmtree(folder / step / "state")
        with (
            Checkpointer(folder) as checkpoints,
            pytest.raises(CheckpointError, match=r"step 2: .*step 1: .*--out"),
        ):
            checkpoints.restore(STATE)
        assert (folder / "2").exists()

    def test_other_dtype(self, tmp_path):
        folder = saved(tmp_path / "c", 1)
        wanted = {**STATE, "a": jnp.zeros(3, jnp.int32)}
        with (
            Checkpointer(folder) as checkpoints,
            pytest.raises(
                CheckpointError, match=r"'a'.: saved float32\[3\], wanted int32\[3\]"
            ),
        ):
            checkpoints.restore(wanted)

    def test_arguments_of_save(self, tmp_path):
        folder = saved(tmp_path / "c", 10)
        with Checkpointer(folder) as checkpoints:
            with pytest.raises(ValueError, match="`step` must not be below 10.*got 5"):
                checkpoints.save(5, STATE, {})
            with pytest.raises(ValueError, match="`meta` must be what JSON can hold"):
                checkpoints.save(11, STATE, {"x": object()})
            assert checkpoints.latest_step() == 10
        with Checkpointer(tmp_path / "d") as checkpoints:
            with pytest.raises(ValueError, match="`step` must not be below 0.*got -1"):
                checkpoints.save(-1, STATE, {})

    def test_save_of_a_reader(self, tmp_path):
        folder = saved(tmp_path / "c", 1)
        with (
            Checkpointer(folder, read_only=True) as checkpoints,
            pytest.raises(ValueError, match="`read_only`.*step 2"),
        ):
            checkpoints.save(2, STATE, {})
