"""What the tests of the command share."""

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and then {i + 1}.\n" for i in range(600)))
    return path
