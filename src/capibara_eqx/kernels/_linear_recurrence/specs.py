from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of the linear recurrence that matters, for tests and benchmarks alike."""

    name: str
    batch: int
    seq: int
    d: int


TEST_SPECS = (
    Spec("one_token", 2, 1, 3),
    Spec("one_row", 1, 33, 5),
    Spec("odd", 3, 65, 7),
)

BENCHMARK_SPECS = (Spec("wide", 2, 2048, 1024),)
