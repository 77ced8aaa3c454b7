"""The page on meta-learning: its examples run, one after the other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from capibara_eqx import meta


PAGE = (Path(__file__).parent.parent / "docs" / "meta.md").read_text()


@pytest.mark.slow
def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 11
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, names)
            if "gradients" in names:
                assert jnp.isfinite(names["value"])
                assert any(
                    bool(jnp.any(leaf != 0))
                    for leaf in jax.tree.leaves(names["gradients"])
                )
        before, after = (
            float(names["loss"](names[name], names["support"]))
            for name in ("model", "adapted")
        )
    assert after < before
    assert int(names["state"].step) == 21
    # ANIL: the first layers are not those that adapt, and are learned.
    head = names["head"]
    assert head.layers[-1].weight and head.layers[-1].bias  # noqa: PT018
    assert sum(jax.tree.leaves(head)) == 2
    assert names["episodes"].support[0].shape == (4, 3, 8)
    assert names["sines"].query[1].shape == (25, 10, 1)
    assert names["logits"].shape == (2, 3)
    # A key of length one, written at a rate of one, is read back.
    assert jnp.allclose(names["read"], names["v"], atol=1e-6)


def test_the_table_names_what_there_is():
    rows = re.findall(r"^\| .* \|$", PAGE, re.MULTILINE)
    called = set(re.findall(r"(\w+)\(", "\n".join(rows)))
    assert {"maml", "meta_sgd", "only", "sgd", "reptile", "imaml", "r2d2"} <= called
    assert called - {"init"} <= set(dir(meta))
