import os
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara_eqx.train import Corpus, read_stdlib_corpus, read_text_corpus


def write(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def many_files(count, size=100):
    """Files of equal size that a NUL never appears in, each with its own content."""
    return {
        f"part{i % 3}/file{i:03}.txt": (b"%03d " % i) * (size // 4)
        for i in range(count)
    }


def documents(part):
    return part.tobytes().split(b"\0")


@pytest.fixture(scope="module")
def stdlib():
    return read_stdlib_corpus()


def test_stdlib_is_the_running_pythons_own_source(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    texts = documents(stdlib.train) + documents(stdlib.heldout)
    assert len(texts) == stdlib.files
    assert len(documents(stdlib.heldout)) == stdlib.heldout_files
    for name in ["argparse.py", "json/decoder.py", "asyncio/tasks.py"]:
        assert texts.count((root / name).read_bytes()) == 1
    assert stdlib.train.size > 5_000_000
    assert stdlib.source.startswith("standard library of Python 3.")


def test_stdlib_leaves_out_tests_and_installed_packages(stdlib):
    texts = set(documents(stdlib.train) + documents(stdlib.heldout))
    assert Path(pytest.__file__).read_bytes() not in texts
    root = Path(sysconfig.get_path("stdlib"))
    suites = [*root.glob("test/test_j*.py"), *root.glob("idlelib/idle_test/*.py")]
    assert not texts & {file.read_bytes() for file in suites if file.stat().st_size}


def test_stdlib_holds_out_whole_files(stdlib):
    train, heldout = documents(stdlib.train), documents(stdlib.heldout)
    root = Path(sysconfig.get_path("stdlib"))
    tops = [file for file in root.iterdir() if file.name != "site-packages"]
    files = [*root.glob("*.py"), *(file for top in tops for file in top.rglob("*.py"))]
    sources = {file.read_bytes() for file in files}
    assert set(heldout) <= sources
    assert set(train) <= sources
    total = stdlib.train.size + stdlib.heldout.size
    assert 0.039 < stdlib.heldout.size / total < 0.08


def test_stdlib_reads_the_same_twice(stdlib):
    again = read_stdlib_corpus(heldout_fraction=0.02)
    assert again.sha256 == stdlib.sha256
    assert re.fullmatch(r"[0-9a-f]{64}", stdlib.sha256)
    assert again.heldout.size < stdlib.heldout.size


def test_documents_are_joined_by_one_nul_in_the_order_of_their_names(tmp_path):
    files = {"b.txt": b"bbb", "a/z.txt": b"zz", "a.txt": b"aaaaaaa", "B.txt": b"BBBB"}
    corpus = read_text_corpus(write(tmp_path, files), heldout_fraction=0.1)
    # Every file is larger than a tenth of the bytes, so the smallest is held out.
    assert corpus.heldout.tobytes() == b"zz"
    assert corpus.train.tobytes() == b"BBBB\0aaaaaaa\0bbb"
    assert (corpus.files, corpus.heldout_files, corpus.skipped) == (4, 1, 0)
    assert corpus.source == str(tmp_path)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.5),
)
def test_the_parts_are_the_files(tmp_path_factory, sizes, fraction):
    files = {f"{i}.txt": bytes([65 + i]) * size for i, size in enumerate(sizes)}
    folder = write(tmp_path_factory.mktemp("corpus"), files)
    corpus = read_text_corpus(folder, heldout_fraction=fraction)
    train, heldout = documents(corpus.train), documents(corpus.heldout)
    assert sorted(train + heldout) == sorted(files.values())
    assert len(heldout) == corpus.heldout_files
    held = sum(map(len, heldout))
    share = fraction * sum(sizes)
    if any(size <= share for size in sizes):
        assert held < 2 * share
        assert all(len(text) <= share for text in heldout)
    else:
        assert held == min(sizes)


def test_the_choice_is_a_hash_of_the_name(tmp_path):
    files = many_files(100)
    first = read_text_corpus(write(tmp_path / "a", files), heldout_fraction=0.1)
    assert first.heldout_files == 10
    # Other content of the same sizes under the same names: the same files.
    swapped = {name: content.upper() for name, content in files.items()}
    swapped = {name: content.replace(b" ", b"-") for name, content in swapped.items()}
    second = read_text_corpus(write(tmp_path / "b", swapped), heldout_fraction=0.1)
    assert second.heldout.tobytes() == first.heldout.tobytes().replace(b" ", b"-")
    # Written down once: every machine must hold out these.
    numbers = [int(text[:3]) for text in documents(first.heldout)]
    assert sorted(numbers) == [4, 13, 15, 29, 38, 42, 62, 71, 76, 81]
    # Spread over the folder, not its first or last files.
    assert min(numbers) < 30
    assert max(numbers) > 70


def test_a_larger_fraction_only_adds_files(tmp_path):
    folder = write(tmp_path, many_files(60))
    small, large = (
        set(documents(read_text_corpus(folder, heldout_fraction=fraction).heldout))
        for fraction in (0.05, 0.3)
    )
    assert len(small) == 3
    assert len(large) == 18
    assert small < large


def test_the_hash_sees_every_byte_and_name(tmp_path):
    files = many_files(6)
    name = next(iter(files))
    moved = {("moved.txt" if n == name else n): c for n, c in files.items()}
    flipped = files | {name: b"\x01" + files[name][1:]}
    # The same bytes in a row, cut elsewhere.
    first, second = sorted(files)[:2]
    cut = files | {
        first: files[first] + files[second][:1],
        second: files[second][1:],
    }
    fewer = {n: c for n, c in files.items() if n != name}
    digests = {
        read_text_corpus(write(tmp_path / str(i), variant)).sha256
        for i, variant in enumerate([files, moved, flipped, cut, fewer])
    }
    assert len(digests) == 5
    copy = read_text_corpus(write(tmp_path / "elsewhere", files), heldout_fraction=0.5)
    assert copy.sha256 in digests


def test_a_single_file_is_cut_near_its_end(tmp_path):
    content = bytes(range(256)) * 4
    file = tmp_path / "data.bin"
    file.write_bytes(content)
    corpus = read_text_corpus(file, heldout_fraction=0.1)
    assert corpus.train.tobytes() == content[:922]
    assert corpus.heldout.tobytes() == content[922:]
    assert (corpus.files, corpus.heldout_files, corpus.skipped) == (1, 0, 0)
    assert read_text_corpus(str(file)).source == str(file)
    other = tmp_path / "renamed.bin"
    other.write_bytes(content)
    assert read_text_corpus(other).sha256 != corpus.sha256


def test_folders_leave_out_hidden_binary_and_empty_files(tmp_path):
    late_nul = b"x" * 9000 + b"\0" + b"y"
    files = {
        "one.txt": b"one" * 90,
        "two.md": b"two" * 100,
        "late.txt": late_nul,
        ".hidden": b"h",
        ".git/config": b"h",
        "image.png": b"\x89PNG\0\0",
        "edge.bin": b"x" * 8191 + b"\0",
        "empty.txt": b"",
    }
    folder = write(tmp_path, files)
    (folder / "broken-link").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    os.mkfifo(folder / "pipe")
    corpus = read_text_corpus(folder, heldout_fraction=0.01)
    assert corpus.files == 3
    assert corpus.skipped == 5
    assert corpus.train.tobytes() == late_nul + b"\0" + b"two" * 100
    assert corpus.heldout.tobytes() == b"one" * 90


def test_a_pattern_chooses_by_file_name(tmp_path):
    folder = write(tmp_path, {"a.md": b"a" * 9, "b/c.md": b"c" * 8, "d.txt": b"d"})
    corpus = read_text_corpus(folder, pattern="*.md")
    assert corpus.train.tobytes() == b"a" * 9
    assert corpus.heldout.tobytes() == b"c" * 8


def test_a_corpus_cannot_change(tmp_path):
    corpus = read_text_corpus(write(tmp_path, many_files(4)))
    assert isinstance(corpus, Corpus)
    for part in (corpus.train, corpus.heldout):
        assert part.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1
    with pytest.raises(AttributeError):
        corpus.files = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.errors
@pytest.mark.parametrize("name", ["missing", "", "file.txt/below"])
def test_a_missing_path_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "file.txt").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"`path` .*'{name}' does not exist"):
        read_text_corpus(name)


@pytest.mark.errors
def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"`path` .*empty\.txt' is an empty file"):
        read_text_corpus(tmp_path / "empty.txt")


@pytest.mark.errors
@pytest.mark.parametrize(
    ("files", "pattern", "message"),
    [
        ({}, "*", "`path` .* 0 files match the pattern '\\*', of which 0 are empty"),
        ({"a": b"", "b": b"\0"}, "*", "2 files match the pattern .* 2 are empty"),
        ({"a.txt": b"a", "b.txt": b"b"}, "*.md", "0 files match the pattern '\\*.md'"),
        ({".a": b"a", ".b/c": b"b"}, "*", "hidden files are not read"),
        ({"a.txt": b"a" * 99}, "*", r"one text file only, 'a\.txt'.*Pass that file"),
    ],
)
def test_a_folder_without_enough_text_is_named(tmp_path, files, pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        read_text_corpus(write(tmp_path, files), pattern=pattern)
    assert str(tmp_path) in str(error.value)


@pytest.mark.errors
def test_a_pipe_or_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", os.devnull):
        with pytest.raises(ValueError, match="`path` .* is a device, pipe or socket"):
            read_text_corpus(path)


def deny(name):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", name)

    return denied


# Root may read everything, so the operating system's refusal is put in by hand.
@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "shown"),
    [("os.stat", "corpus"), ("os.scandir", "locked"), ("pathlib.Path.open", "a.txt")],
)
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, call, shown):
    folder = write(tmp_path / "corpus", {"a.txt": b"a" * 50, "b.txt": b"b" * 50})
    message = rf"`path`: no permission to read '.*{shown}'.*chmod"
    with monkeypatch.context() as patch:
        patch.setattr(call, deny("locked"))
        with pytest.raises(PermissionError, match=message):
            read_text_corpus(folder)


@pytest.mark.errors
def test_other_failures_of_the_disk_are_passed_on(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(5, "Input/output error", "corpus")

    folder = write(tmp_path, many_files(4))
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", broken)
        with pytest.raises(OSError, match="Input/output error"):
            read_text_corpus(folder)


@pytest.mark.errors
def test_too_little_to_hold_out(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"x" * 24)
    message = r"`path`: .*short\.txt' has 24 bytes, too few to hold out 0\.04"
    with pytest.raises(ValueError, match=message):
        read_text_corpus(tmp_path / "short.txt")


@pytest.mark.errors
def test_too_little_to_train_on(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"x" * 1000)
    message = r"`path`: .*leaves 960 bytes for training, but at least 961 are needed"
    with pytest.raises(ValueError, match=message):
        read_text_corpus(tmp_path / "short.txt", min_train_bytes=961)
    corpus = read_text_corpus(tmp_path / "short.txt", min_train_bytes=960)
    assert corpus.train.size == 960
    with pytest.raises(ValueError, match="at least 1000 are needed"):
        read_text_corpus(
            write(tmp_path / "folder", many_files(4)), min_train_bytes=1000
        )


@pytest.mark.errors
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_named(tmp_path, fraction):
    for read in (read_stdlib_corpus, lambda **kw: read_text_corpus(tmp_path, **kw)):
        with pytest.raises(ValueError, match="`heldout_fraction` must lie between"):
            read(heldout_fraction=fraction)


@pytest.mark.errors
def test_a_fraction_that_takes_every_file_is_named(tmp_path):
    folder = write(tmp_path, many_files(3))
    with pytest.raises(ValueError, match=r"`heldout_fraction` 0\.9 holds out all 3"):
        read_text_corpus(folder, heldout_fraction=0.9)


@pytest.mark.errors
def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    for root in (tmp_path, tmp_path / "missing"):
        with monkeypatch.context() as patch:
            patch.setattr(sysconfig, "get_path", lambda name, root=root: str(root))
            with pytest.raises(FileNotFoundError, match="no standard library sources"):
                read_stdlib_corpus()
