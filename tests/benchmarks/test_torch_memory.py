import pytest

from benchmarks._torch_memory import temp_bytes


torch = pytest.importorskip("torch")


def test_what_is_freed_again_counts_and_results_do_not():
    x = torch.ones(1000)

    def run():
        # Held at once: 8,000 bytes of `wide`, 4,000 of `y`, which is the result.
        wide = torch.cat([x, x])
        y = wide[:1000] * 3.0
        del wide
        return y

    assert temp_bytes(torch, run) == pytest.approx(8000, abs=64)
    assert temp_bytes(torch, lambda: x * 2.0) == pytest.approx(0, abs=64)
