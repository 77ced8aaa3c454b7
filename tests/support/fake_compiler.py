"""A machine whose C++ compiler does what a test tells it to."""

import hashlib
import shlex
from pathlib import Path

import pytest
from support.processes import run_python

from capibara_eqx.kernels._native import Unavailable, handlers
from capibara_eqx.kernels._native._compiler import find_compiler
from capibara_eqx.kernels._native._library import _load


ANSWER = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""

FAKE = """#!/bin/sh
case "$*" in *--version*) . {folder}/versions; exit;; esac
echo >> {folder}/calls
for target; do :; done
. {folder}/behaviour
exec cp {library} "$target"
"""

# What another process does; ends with the library's answer.
OTHER = """
from pathlib import Path
from capibara_eqx.kernels._native._library import _load
print(_load(Path({source!r})).answer())
"""


class Machine:
    """A machine with a compiler, a cache, and a source of its own."""

    def __init__(self, folder: Path, library: Path):
        self.folder, self.cache, self.scratch = folder, folder / "c", folder / "tmp"
        self.scratch.mkdir()
        self.source = folder / "_tiny" / "answer.cc"
        self.source.parent.mkdir()
        self.source.write_text(ANSWER)
        self.source.with_suffix(".h").write_text("#define ANSWER 42")
        self.versions("echo fake 1.0")
        self.behave("")
        (folder / "calls").touch()
        self.compiler = folder / "c++"
        self.compiler.write_text(
            FAKE.format(folder=shlex.quote(str(folder)), library=library)
        )
        self.compiler.chmod(0o755)

    def behave(self, shell: str) -> None:
        """What the compiler does before it compiles."""
        (self.folder / "behaviour").write_text(shell + "\n")

    def versions(self, shell: str) -> None:
        (self.folder / "versions").write_text(shell + "\n")

    def calls(self) -> int:
        return len((self.folder / "calls").read_text().splitlines())

    def files(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir())

    def assert_whole(self) -> None:
        """The cache holds one library and its digest, the scratch folder nothing."""
        digest, library = sorted(self.cache.iterdir())
        assert digest.stem == library.stem == f"tiny-{self.key()}"
        content = library.read_bytes()
        assert digest.read_text() == hashlib.sha256(content).hexdigest()
        assert list(self.scratch.iterdir()) == []

    def assert_nothing_left(self) -> None:
        assert list(self.scratch.iterdir()) == []
        assert not self.cache.exists() or self.files() == []

    def key(self) -> str:
        compiler = find_compiler()
        assert compiler is not None
        return compiler.key(self.source)

    def answer(self) -> int:
        return _load(self.source).answer()

    def in_another_process(self):
        code = OTHER.format(source=str(self.source))
        return run_python(code, env={"TMPDIR": str(self.scratch)})

    def assert_unavailable(self, *words: str) -> str:
        with pytest.raises(Unavailable) as caught:
            handlers(self.source, ())
        for word in words:
            assert word in str(caught.value)
        return str(caught.value)
