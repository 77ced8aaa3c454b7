"""Compilers: the real one, and a few lines of shell in its place."""

import tempfile

import pytest
from support.fake_compiler import ANSWER, Machine

from capibara_eqx.kernels._native._compiler import find_compiler


@pytest.fixture(scope="session")
def real():
    compiler = find_compiler()
    assert compiler is not None, "these tests need a C++ compiler"
    return compiler


@pytest.fixture(scope="session")
def library(real, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "answer.cc").write_text(ANSWER)
    (folder / "answer.h").write_text("#define ANSWER 42")
    real.compile(folder / "answer.cc", folder / "answer.so")
    return folder / "answer.so"


@pytest.fixture
def machine(library, tmp_path, monkeypatch):
    made = Machine(tmp_path, library)
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setenv("CAPIBARA_EQX_CACHE", str(made.cache))
    monkeypatch.setattr(tempfile, "tempdir", str(made.scratch))
    find_compiler.cache_clear()
    yield made
    find_compiler.cache_clear()
