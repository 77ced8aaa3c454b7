from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of the experts that matters, for tests and benchmarks alike."""

    name: str
    tokens: int
    d_model: int
    num_experts: int
    d_ff: int
    top_k: int


TEST_SPECS = (
    Spec("one_token", 1, 3, 4, 2, 2),
    Spec("one_expert", 5, 3, 1, 4, 1),
    Spec("odd", 37, 5, 7, 3, 3),
    Spec("every_expert", 4, 2, 3, 5, 3),
)

BENCHMARK_SPECS = (
    Spec("fine_grained", 512, 768, 32, 64, 2),
    Spec("wide", 512, 512, 8, 1024, 2),
    Spec("one_token", 1, 768, 32, 64, 2),
)
