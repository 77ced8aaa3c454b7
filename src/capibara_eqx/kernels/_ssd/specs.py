from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of the state space dual that matters, for tests and benchmarks alike."""

    name: str
    batch: int
    seq: int
    n_heads: int
    head_dim: int
    n_groups: int
    d_state: int


# Small and odd on purpose: no axis is a multiple of a vector or of a chunk.
TEST_SPECS = (
    Spec("one_token", 2, 1, 4, 3, 2, 5),
    Spec("one_row", 1, 33, 3, 5, 1, 4),
    Spec("odd", 3, 69, 6, 3, 2, 7),
)

BENCHMARK_SPECS = (
    Spec("small_batch", 2, 1024, 8, 64, 1, 64),
    Spec("mamba2_130m_row", 1, 2048, 24, 64, 1, 128),
)
