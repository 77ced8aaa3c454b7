"""What README and the documentation show runs as it stands."""

import re
from pathlib import Path

import jax
import pytest


ROOT = Path(__file__).parent.parent


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def promotion_of_users():
    # The examples run as in a user's process, which has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.mark.usefixtures("promotion_of_users")
def test_the_examples_run_and_learn(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of("README.md")
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(block, names)
    # Guessing among 256 bytes costs 5.5 nats, among the text's 28 letters 3.3.
    assert float(names["value"]) < 1.0
    assert names["out"].tokens.shape == (1, 40)
    assert (tmp_path / "checkpoint" / "config.json").exists()
    assert names["model"].stack.num_blocks == 2
    assert names["report"].nbytes < names["report"].original_bytes / 4
    # A sine of amplitude 2.6, as they are on average, is 4 off zero.
    assert float(names["adapted_error"]) < 4


@pytest.mark.usefixtures("promotion_of_users")
def test_the_hybrid_model_of_the_documentation_generates():
    (block,) = blocks_of("docs/attention.md")
    names: dict = {}
    exec(block, names)
    assert names["out"].tokens.shape == (1, 16)
