from typing import NamedTuple


class Spec(NamedTuple):
    """A shape of the causal convolution that matters, for tests and benchmarks."""

    name: str
    batch: int
    seq: int
    c_in: int
    c_out: int
    width: int
    groups: int = 1
    dilation: int = 1


TEST_SPECS = (
    Spec("pointwise", 2, 5, 3, 4, 1),
    Spec("depthwise", 2, 33, 6, 6, 4, groups=6),
    Spec("grouped", 3, 17, 6, 4, 3, groups=2),
    Spec("dilated", 1, 29, 3, 5, 3, dilation=4),
    Spec("shorter_than_kernel", 2, 2, 3, 3, 5, dilation=2),
)

BENCHMARK_SPECS = (Spec("mamba_130m_row", 1, 2048, 1536, 1536, 4, groups=1536),)
