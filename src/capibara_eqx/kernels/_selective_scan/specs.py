from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of the selective scan that matters, for tests and benchmarks alike."""

    name: str
    batch: int
    seq: int
    d_inner: int
    d_state: int


# Small and odd on purpose: no axis is a multiple of a vector or of a chunk.
TEST_SPECS = (
    Spec("one_token", 2, 1, 3, 4),
    Spec("one_row", 1, 33, 5, 4),
    Spec("odd", 3, 65, 7, 5),
    # More states than a CPU keeps together: it reads one row after the other.
    Spec("many_states", 3, 37, 49, 23),
)

BENCHMARK_SPECS = (
    Spec("small_batch", 2, 1024, 256, 16),
    Spec("mamba_130m_row", 1, 2048, 1536, 16),
)
