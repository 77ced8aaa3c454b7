"""What the tests of the command share."""

import pytest
from support.tiny import SMALL

from capibara_eqx.cli import main


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and then {i + 1}.\n" for i in range(600)))
    return path


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """A run folder of `capibara train`, and its exit code."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", f"--text={text}", f"--out={out}", "--steps=30", *SMALL]
    return main(arguments), out
