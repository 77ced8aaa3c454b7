"""The cache of compiled libraries: when one is used, made again, or done without."""

import concurrent.futures
import ctypes
import hashlib
import os
import resource
import shlex
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

from capibara_eqx.kernels._native import _compiler, handlers
from capibara_eqx.kernels._native._cache import (
    cache_folder,
    read_library,
    write_library,
)
from capibara_eqx.kernels._native._compiler import find_compiler


def put(path, content):
    """Replace a file, which a process may have loaded, by another."""
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


# What is kept, and when it is used.


def test_a_compiled_library_is_kept_and_used_again(machine):
    assert machine.answer() == 42
    machine.assert_whole()
    machine.behave("exit 1")
    assert machine.answer() == 42
    assert machine.calls() == 1


def test_another_process_does_not_compile(machine):
    assert machine.answer() == 42
    machine.behave("exit 1")
    done = machine.in_another_process()
    assert done.stdout == "42\n"
    assert machine.calls() == 1


def test_handlers_load_once(machine):
    handlers(machine.source, ())
    machine.behave("exit 1")
    for path in machine.cache.iterdir():
        path.unlink()
    handlers(machine.source, ())
    assert machine.calls() == 1


def test_the_real_compiler_sees_source_and_headers(machine, real, monkeypatch):
    monkeypatch.setenv("CXX", shlex.join(real.command))
    find_compiler.cache_clear()
    for value in (17, 18):
        machine.source.with_suffix(".h").write_text(f"#define ANSWER {value}")
        assert machine.answer() == value
    assert len(machine.files()) == 4


def source(machine, monkeypatch):
    machine.source.write_text(machine.source.read_text() + "// changed")


def header(machine, monkeypatch):
    machine.source.with_suffix(".h").write_text("#define ANSWER 43")


def new_header(machine, monkeypatch):
    (machine.source.parent / "new.h").write_text("")


def compiler_path(machine, monkeypatch):
    other = machine.folder / "g++"
    other.write_bytes(machine.compiler.read_bytes())
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))


def compiler_argument(machine, monkeypatch):
    monkeypatch.setenv("CXX", f"{shlex.quote(str(machine.compiler))} -m64")


def compiler_version(machine, monkeypatch):
    machine.versions("echo fake 1.1")


def flags(machine, monkeypatch):
    monkeypatch.setattr(_compiler, "_FLAGS", (*_compiler._FLAGS, "-g"))


def processor(machine, monkeypatch):
    monkeypatch.setattr(_compiler, "_processor", lambda: "another")


def jaxlib(machine, monkeypatch):
    monkeypatch.setattr(_compiler, "version", lambda package: f"another {package}")


CHANGES = [
    source,
    header,
    new_header,
    compiler_path,
    compiler_argument,
    compiler_version,
    flags,
    processor,
    jaxlib,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_library_depends_on_changes_its_name(machine, monkeypatch, change):
    before = machine.key()
    find_compiler.cache_clear()
    assert machine.key() == before
    change(machine, monkeypatch)
    find_compiler.cache_clear()
    assert machine.key() != before


def test_a_shared_header_changes_the_name(machine, monkeypatch):
    headers = machine.folder / "headers"
    headers.mkdir()
    for path in _compiler.HEADERS.glob("*.h"):
        (headers / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(_compiler, "HEADERS", headers)
    before = machine.key()
    (headers / "lanes.h").write_text("// changed")
    assert machine.key() != before


def test_the_processor_is_told_by_what_it_can_do():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    able = [line for line in lines if line.startswith(("flags", "Features"))]
    assert all(line in _compiler._processor() for line in able)
    assert os.uname().machine in _compiler._processor()


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({"CAPIBARA_EQX_CACHE": "own/deep"}, "own/deep"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/capibara_eqx"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/capibara_eqx"),
        ({"CAPIBARA_EQX_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/capibara_eqx"),
    ],
)
def test_where_the_cache_is(tmp_path, monkeypatch, settings, folder):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("CAPIBARA_EQX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **settings}.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert cache_folder() == tmp_path / folder
    # A library is code: nobody else may put one there.
    assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
    assert cache_folder() == tmp_path / folder


def test_the_cache_may_be_the_working_folder(machine, monkeypatch):
    machine.cache.mkdir()
    monkeypatch.chdir(machine.cache)
    monkeypatch.setenv("CAPIBARA_EQX_CACHE", ".")
    assert machine.answer() == 42
    machine.assert_whole()


# A cache that is damaged, or takes nothing.

DAMAGE = {
    "half": lambda library, digest: put(library, library.read_bytes()[:5000]),
    "empty": lambda library, digest: put(library, b""),
    "one bit": lambda library, digest: put(
        library, library.read_bytes()[:-1] + bytes([library.read_bytes()[-1] ^ 1])
    ),
    "absent": lambda library, digest: library.unlink(),
    "folder": lambda library, digest: (library.unlink(), library.mkdir()),
    "digest of nothing": lambda library, digest: put(digest, b""),
    "digest that is no text": lambda library, digest: put(digest, b"\xff\xfe\x00"),
    "digest of another": lambda library, digest: put(digest, b"0" * 64),
    "digest absent": lambda library, digest: digest.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_not_loaded_but_made_again(machine, damage):
    machine.cache.mkdir()
    library = machine.cache / f"tiny-{machine.key()}.so"
    digest = library.with_suffix(".sha256")
    library.write_bytes(b"\x7fELF" * 2000)
    digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    assert read_library(machine.cache, library.stem) == library
    DAMAGE[damage](library, digest)
    assert read_library(machine.cache, library.stem) is None
    assert machine.answer() == 42
    assert machine.calls() == 1
    if damage == "folder":
        # In the way for ever; the library is compiled for each process.
        assert machine.answer() == 42
        assert list(machine.scratch.iterdir()) == []
    else:
        machine.assert_whole()


def below_a_file(machine):
    (machine.folder / "file").touch()
    return machine.folder / "file" / "cache"


def a_file(machine):
    (machine.folder / "file").touch()
    return machine.folder / "file"


def read_only(machine):
    # Even to root, whom permissions do not bind.
    return Path("/proc/self")


@pytest.mark.parametrize(
    "place", [below_a_file, a_file, read_only], ids=lambda place: place.__name__
)
def test_a_cache_that_takes_nothing_serves_this_process(machine, monkeypatch, place):
    monkeypatch.setenv("CAPIBARA_EQX_CACHE", str(place(machine)))
    for compiled in (1, 2):
        assert machine.answer() == 42
        assert machine.calls() == compiled
    machine.assert_nothing_left()


@pytest.mark.parametrize("place", ["cache", "scratch"])
def test_a_folder_that_may_hold_no_programs(machine, monkeypatch, place):
    folder, load = getattr(machine, place), ctypes.CDLL

    def mounted_noexec(path):
        if folder in Path(path).parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    for _ in range(2):
        assert machine.answer() == 42
        assert machine.calls() == 1
        machine.assert_whole()


def test_a_kept_library_needs_no_folder_for_temporary_files(machine, monkeypatch):
    assert machine.answer() == 42

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert machine.answer() == 42
    assert machine.calls() == 1


def test_a_kept_library_that_does_not_load_is_made_again(machine):
    assert machine.answer() == 42
    other = machine.folder / "no library"
    other.write_bytes(b"of another system")
    assert write_library(machine.cache, f"tiny-{machine.key()}", other) is not None
    assert machine.answer() == 42
    assert machine.calls() == 2
    machine.assert_whole()


def test_nowhere_may_programs_be(machine, monkeypatch):
    def mounted_noexec(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", mounted_noexec)
    with pytest.warns(UserWarning, match="failed to map segment"):
        machine.assert_unavailable("failed to map segment")
    machine.assert_nothing_left()


@pytest.fixture
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_cache_serves_this_process(machine, full_disk):
    machine.behave("ulimit -f unlimited")
    assert machine.answer() == 42
    machine.assert_nothing_left()


def test_a_disk_too_full_to_compile(machine, full_disk):
    with pytest.warns(UserWarning, match="could not be compiled"):
        machine.assert_unavailable(str(machine.compiler))
    machine.assert_nothing_left()


def test_no_folder_for_what_is_unfinished(machine, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(machine.folder / "absent"))
    with warnings.catch_warnings(action="ignore"):
        machine.assert_unavailable()
    machine.assert_nothing_left()


# Several at once.


def test_processes_that_race(machine):
    machine.behave("sleep 0.5")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(machine.in_another_process) for _ in range(3)]
        answers = [one.result().stdout for one in runs]
    assert answers == ["42\n"] * 3
    machine.assert_whole()


def test_threads_of_one_process_compile_once(machine):
    machine.behave("sleep 0.5")
    start = threading.Barrier(3)

    def first_call():
        start.wait()
        handlers(machine.source, ())

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for one in [pool.submit(first_call) for _ in range(3)]:
            one.result()
    assert machine.calls() == 1
    machine.assert_whole()


def test_a_reader_sees_all_of_one_library(tmp_path):
    contents = [bytes([number]) * 400_000 for number in range(3)]
    for number, content in enumerate(contents):
        (tmp_path / f"built{number}").write_bytes(content)
    folder = tmp_path / "cache"
    folder.mkdir()

    def write(number):
        for _ in range(60):
            path = write_library(folder, "name", tmp_path / f"built{number}")
            assert path is not None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, number) for number in range(3)]
        while not all(writer.done() for writer in writers):
            if (folder / "name.so").exists():
                assert (folder / "name.so").read_bytes() in contents
        for writer in writers:
            writer.result()
    assert len(list(folder.iterdir())) == 2
    write(0)
    path = read_library(folder, "name")
    assert path is not None
    assert path.read_bytes() == contents[0]
