import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax


HEADERS = Path(__file__).parent

# Contraction to fused multiply-adds, and no care for errno, traps or the sign of zero:
# NaN and infinities keep their meaning.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
    "-Wno-psabi",
)

# A compiler that hangs should not hang its caller for ever.
_TIMEOUT_S = 600


class CompileError(Exception):
    """The compiler failed; the text is its message."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler of this machine, and how it is called."""

    command: tuple[str, ...]
    version: str

    def key(self, source: Path) -> str:
        """Changes with everything that the result of compiling `source` depends on."""
        parts = [*self.command, self.version, *_FLAGS, _processor(), version("jaxlib")]
        parts += platform.libc_ver()
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in sources(source):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:32]

    def compile(self, source: Path, target: Path) -> None:
        """Write the shared library of `source` to `target`.

        **Raises:**

        `CompileError` if that fails.
        """
        includes = [f"-I{folder}" for folder in (HEADERS, source.parent)]
        includes += ["-isystem", jax.ffi.include_dir()]
        command = [*self.command, *_FLAGS, *includes, str(source), "-o", str(target)]
        try:
            status, _, message = _run(command)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"{self.command[0]} failed: {error}") from None
        if status != 0 or not target.exists():
            raise CompileError(
                f"{self.command[0]} failed with exit status {status}:\n"
                f"{message.strip()}\nThe command was: {shlex.join(command)}"
            )


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit status, output and messages of a command, which never outlives this call.

    **Raises:**

    `OSError` if it cannot be started, `TimeoutExpired` if it hangs.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A group of its own: a compiler is a driver that starts others.
        start_new_session=True,
    ) as process:
        try:
            output, message = process.communicate(timeout=_TIMEOUT_S)
        except BaseException:
            # An interrupt too: it reaches no other session. What has ended is no group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output, message


def sources(source: Path) -> list[Path]:
    """`source` and the headers that it may include."""
    headers = [*HEADERS.glob("*.h"), *source.parent.glob("*.h")]
    return [source, *sorted(headers)]


@functools.cache
def find_compiler() -> Compiler | None:
    """`$CXX` if it is set, else the first of c++, g++ and clang++ that runs."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        # Quotation marks that do not match.
        return None
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        path = shutil.which(command[0])
        if path is None:
            continue
        try:
            _, told, _ = _run([path, *command[1:], "--version"])
        except (OSError, subprocess.TimeoutExpired):
            continue
        # One that cannot even tell its version says why when it is to compile.
        return Compiler((path, *command[1:]), told)
    return None


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on."""
    parts = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        wanted = ("model name", "flags", "Features", "CPU part")
        lines = cpuinfo.read_text(errors="replace").splitlines()
        parts += sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join(parts)
