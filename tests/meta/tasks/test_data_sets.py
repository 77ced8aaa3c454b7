"""Pools that come from files: digits of scikit-learn, Omniglot from an .npz."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from support.messages import refused

from capibara_eqx.meta.tasks import digits, omniglot


@pytest.mark.slow
def test_digits_are_those_of_scikit_learn():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    pool = digits()
    assert pool.num_classes == 10
    assert pool.smallest == 174
    assert pool.x.dtype == jnp.float32
    for label in range(10):
        start, count = int(pool.starts[label]), int(pool.counts[label])
        np.testing.assert_array_equal(
            16 * pool.x[start : start + count], data.data[data.target == label]
        )


def test_omniglot_is_read(tmp_path):
    drawings = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 6), np.uint8)
    np.savez(tmp_path / "some.npz", X=drawings, names=np.array(["a", "b", "c"]))
    pool = omniglot(tmp_path / "some.npz")
    assert (pool.num_classes, pool.smallest) == (3, 4)
    np.testing.assert_array_equal(pool.starts, [0, 4, 8])
    assert pool.x.dtype == jnp.float32
    np.testing.assert_allclose(
        pool.x,
        drawings.reshape(12, 5, 6) / 255,
        rtol=2 * float(np.finfo(np.float32).eps),
    )


@pytest.mark.errors
class TestErrors:
    def test_a_missing_scikit_learn(self, monkeypatch):
        for module in ("sklearn", "sklearn.datasets"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install 'capibara-eqx\[meta\]'"):
            digits()

    def test_a_file_that_is_missing(self, tmp_path):
        path = tmp_path / "none.npz"
        with pytest.raises(FileNotFoundError, match=r"none\.npz.*1623, 20, 28, 28"):
            omniglot(path)

    @pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
    def test_a_file_that_is_no_archive(self, tmp_path, content):
        path = tmp_path / "odd.npz"
        path.write_bytes(content)
        with refused("odd.npz is no .npz file", "(1623, 20, 28, 28)"):
            omniglot(path)

    def test_a_damaged_archive(self, tmp_path):
        path = tmp_path / "damaged.npz"
        np.savez(path, X=np.zeros((2, 2, 9, 9), np.uint8))
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 255
        path.write_bytes(content)
        with refused("damaged.npz cannot be read", "(1623, 20, 28, 28)"):
            omniglot(path)

    def test_other_arrays(self, tmp_path):
        path = tmp_path / "other.npz"
        np.savez(path, images=np.zeros(3), labels=np.zeros(3))
        with refused("other.npz", "images, labels", "no `X`", "(1623, 20, 28, 28)"):
            omniglot(path)

    @pytest.mark.parametrize(
        "x",
        [
            np.zeros((2, 3, 4), np.uint8),
            np.zeros((2, 3, 4, 4), np.float32),
            np.zeros((2, 0, 4, 4), np.uint8),
        ],
    )
    def test_x_of_another_kind(self, tmp_path, x):
        path = tmp_path / "odd.npz"
        np.savez(path, X=x)
        with refused("`X` in", str(x.dtype), str(x.shape), "(1623, 20, 28, 28)"):
            omniglot(path)
