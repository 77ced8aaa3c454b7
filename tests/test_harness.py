"""What `conftest.py` promises to the other tests."""

import os
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings
from support.processes import ROOT, run_python


FAILING = """
import jax


def test_fails(getkey):
    first, second = getkey(), getkey()
    bits = [int(jax.random.bits(key)) for key in (first, second)]
    assert bits is None
"""


def test_keys_are_fresh(getkey):
    assert len({int(jax.random.bits(getkey())) for _ in range(20)}) == 20


@pytest.mark.slow
def test_a_failure_shows_a_seed_that_repeats_it(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(FAILING)

    def report(**env: str) -> tuple[str, str]:
        result = run_python(
            "import pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', '.']))",
            cwd=tmp_path,
            env={"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), **env},
        )
        assert result.returncode == 1, result.stdout
        seed = re.search(r"CAPIBARA_TEST_SEED=(\d+)", result.stdout)
        bits = re.search(r"assert (\[\d+, \d+\]) is None", result.stdout)
        assert seed is not None, result.stdout
        assert bits is not None, result.stdout
        return seed[1], bits[1]

    seed, bits = report(CI="")
    assert report(CI="", CAPIBARA_TEST_SEED=seed) == (seed, bits)
    assert report(CI="")[0] != seed
    assert report(CI="true") == report(CI="true")


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="promotion"):
        jnp.add(jnp.zeros(3, jnp.float32), jnp.zeros(3, jnp.bfloat16))


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank"):
        jnp.add(jnp.zeros((2, 3)), jnp.zeros(3))


def test_compiled_functions_are_kept():
    assert jax.config.values["jax_compilation_cache_dir"]
    assert os.path.isabs(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0


def test_hypothesis_draws_thirty_examples_without_a_deadline():
    profile = settings()
    assert profile.max_examples == 30
    assert profile.deadline is None
    assert profile.derandomize == (os.environ.get("CI") == "true")
