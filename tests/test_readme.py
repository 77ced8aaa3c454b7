"""What README shows runs as it stands."""

import re
from pathlib import Path

import jax
import pytest


README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def promotion_of_users():
    # The examples run as in a user's process, which has JAX's defaults.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.mark.usefixtures("promotion_of_users")
def test_the_examples_run_and_learn():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    # Guessing among 256 bytes costs 5.5 nats, among the text's 28 letters 3.3.
    assert float(names["value"]) < 1.0
    assert names["out"].tokens.shape == (1, 40)
