from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of attention that matters, for tests and benchmarks alike."""

    name: str
    batch: int
    query: int
    key: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_dim: int


TEST_SPECS = (
    Spec("one_token", 2, 1, 7, 2, 1, 4, 4),
    Spec("square", 2, 9, 9, 2, 2, 4, 4),
    Spec("grouped", 1, 5, 11, 6, 2, 3, 5),
    Spec("more_queries_than_keys", 1, 13, 4, 3, 3, 2, 1),
)

BENCHMARK_SPECS = tuple(
    Spec(f"length_{length}", 2, length, length, 8, 8, 64, 64)
    for length in (512, 2048, 8192)
)
