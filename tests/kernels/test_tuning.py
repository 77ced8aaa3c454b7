"""The table of block sizes, and that a size changes the cut but not the numbers."""

import json
import math

import jax
import pytest
from support import numpy_oracles as oracles
from support.kernel_cases import cast, rounded, scan_arguments
from support.tolerances import assert_close

from benchmarks import tune
from benchmarks._harness import QUICK
from capibara_eqx.kernels import _backends
from capibara_eqx.kernels._pallas_gpu_launch import unavailable
from capibara_eqx.kernels._selective_scan import _tuning, fused, pallas_gpu
from capibara_eqx.kernels._selective_scan._operands import pack
from capibara_eqx.kernels._selective_scan._pallas_gpu_work import tiles_for
from capibara_eqx.kernels._selective_scan._pallas_tpu_launch import tile_for
from capibara_eqx.kernels._selective_scan._tuning import Sizes, sizes_for


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that replaces the table."""

    def replace(entries):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps(entries))
        monkeypatch.setattr(_tuning, "TABLE", path)
        _tuning._table.cache_clear()
        return path

    yield replace
    _tuning._table.cache_clear()


def test_the_table_holds_sizes_of_kernels():
    for kind, kernels in json.loads(_tuning.TABLE.read_text()).items():
        assert kind
        for kernel, sizes in kernels.items():
            assert kernel in fused.NAMES
            assert Sizes(**sizes).chunk > 0


def test_a_device_in_the_table_has_its_sizes_and_others_the_rule(table):
    table({_backends.device_kind(): {"cpu": {"chunk": 48}}, "other": {"cpu": {}}})
    assert sizes_for("cpu", 1000) == Sizes(48)
    assert sizes_for("cpu", 5) == Sizes(5)
    assert sizes_for("pallas_gpu", 1000) == Sizes(16)
    table({})
    assert sizes_for("cpu", 1000) == Sizes(64)
    table({_backends.device_kind(): {"pallas_tpu": {"tile": 256}}})
    assert sizes_for("pallas_tpu", 5) == Sizes(128, tile=256)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_cut_gives_the_same(chunk):
    inputs = cast(scan_arguments((2,), 21, 5, 4), "float32")

    @jax.jit
    def run(inputs):
        return fused.selective_scan(
            "cpu", **inputs, delta_softplus=True, sizes=Sizes(chunk)
        )

    y, state = run(inputs)
    want = oracles.selective_scan(**rounded(inputs), delta_softplus=True)
    assert_close(y, want[0], dtype="float32", length=25, name="y")
    assert_close(state, want[1], dtype="float32", length=25, name="state")


def operands(seq, d_inner, d_state):
    shapes = cast(scan_arguments((1,), seq, d_inner, d_state, options=()), "float32")
    return pack(*shapes.values(), *[None] * 5)


def test_sizes_are_followed_where_there_is_room():
    small = operands(64, 128, 16)
    assert tiles_for(small, Sizes(16))[:3] == (8, 8, 2)
    assert tiles_for(small, Sizes(16, group=16, stages=1))[:3] == (16, 4, 1)
    assert tiles_for(small, Sizes(16, group=8, stages=3))[:3] == (8, 8, 3)
    # Not 16 of 24 states, nor in memory that is not there.
    assert tiles_for(operands(64, 128, 24), Sizes(16, group=16, stages=1)).group == 8
    assert tiles_for(small, Sizes(16, group=8, stages=99)).stages == 2
    assert tile_for(1024, 16, 128) == 512
    assert tile_for(1024, 16, 128, 256) == 256
    assert tile_for(100, 16, 128, 256) == 100
    assert tile_for(4096, 64, 512, 4096) < 4096


@pytest.mark.skipif(unavailable() is not None, reason="needs a newer jax")
def test_what_there_is_no_room_for_is_not_refused_but_a_chunk_that_fits_no_tile_is():
    small = operands(64, 128, 16)
    assert pallas_gpu.refusal(small, Sizes(16, stages=99, group=8)) is None
    assert "multiple of 8" in str(pallas_gpu.refusal(small, Sizes(12)))


def test_a_better_size_must_be_worth_a_change():
    now, other = Sizes(64), Sizes(128)
    assert tune.better({now: 1.02, other: 1.0}, now) == now
    assert tune.better({now: 1.05, other: 1.0}, now) == other
    assert tune.better({now: math.inf, other: 1.0}, now) == other
    with pytest.raises(RuntimeError, match="no block sizes"):
        tune.better({now: math.inf}, now)


def test_tuning_measures_and_notes_the_best(table, monkeypatch, capsys):
    path = table({"other": {"cpu": {"chunk": 5}}})
    monkeypatch.setitem(tune._CHOICES, "cpu", {"chunk": (2, 4)})
    monkeypatch.setattr(tune, "BENCHMARK_SPECS", [tune.Spec("tiny", 1, 8, 4, 2)])
    monkeypatch.setattr(tune, "better", lambda costs, now: list(costs)[2])
    monkeypatch.setattr(tune, "FULL", QUICK)
    assert tune.main() == 0
    found = json.loads(path.read_text())
    assert found["other"] == {"cpu": {"chunk": 5}}
    assert found[_backends.device_kind()] == {"cpu": {"chunk": 4}}
    text = capsys.readouterr().out
    assert all(f"chunk {chunk}: " in text for chunk in (2, 4, 64))
