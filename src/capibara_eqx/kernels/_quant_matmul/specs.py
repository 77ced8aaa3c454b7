from typing import NamedTuple


class Spec(NamedTuple):
    """A packed product that matters, for tests and benchmarks alike."""

    name: str
    tokens: int
    in_features: int
    out_features: int
    bits: int
    group_size: int | None = None
    zero: bool = False
    activations: str | None = None


TEST_SPECS = (
    Spec("ternary", 5, 13, 7, 2),
    Spec("ternary_int8", 5, 13, 7, 2, activations="int8"),
    Spec("one_token", 1, 9, 4, 4, activations="int8"),
    Spec("int4_groups", 3, 11, 5, 4, group_size=4),
    Spec("int4_groups_int8", 3, 11, 5, 4, 4, activations="int8"),
    Spec("int3_zero", 4, 10, 3, 3, zero=True),
    Spec("int8", 6, 7, 9, 8),
    Spec("int8_zero_int8", 6, 7, 9, 8, zero=True, activations="int8"),
    Spec("int4_groups_zero_int8", 3, 10, 4, 4, 4, zero=True, activations="int8"),
    Spec("ternary_static", 5, 13, 7, 2, activations="static_int8"),
    Spec("int4_groups_zero_static", 3, 10, 4, 4, 4, True, "static_int8"),
)

BENCHMARK_SPECS = (
    Spec("W1.58A8", 256, 2048, 2048, 2, activations="int8"),
    Spec("W8A8", 256, 2048, 2048, 8, activations="int8"),
    Spec("W4g128", 256, 2048, 2048, 4, 128),
    Spec("W1.58A8 one token", 1, 2048, 2048, 2, activations="int8"),
    Spec("W8A8 one token", 1, 2048, 2048, 8, activations="int8"),
    Spec("W1.58 one token", 1, 2048, 2048, 2),
)
