import pytest

from benchmarks._bars import bars
from benchmarks._records import Measurement
from benchmarks._slope import slope


ROW, BOTH = "mamba_130m_row", "forward_backward"


def measurement(
    implementation,
    mode,
    ms,
    spec="small_batch",
    operation="selective_scan",
    seq=2048,
    **fields,
):
    sizes = {"name": spec, "batch": 1, "seq": seq, "d_inner": 1536, "d_state": 16}
    return Measurement(operation, implementation, sizes, mode, median_ms=ms, **fields)


def test_bars_follow_from_the_medians():
    measurements = [
        measurement("cpu", "forward", 2.0),
        measurement("mambapy_pscan", "forward", 13.0),
        measurement("cpu", "forward", 15.0, ROW),
        measurement("probe", "forward", 10.0, ROW),
        measurement("cpu", BOTH, 80.0, ROW, temp_bytes=2048 * 1536 * 16),
        measurement("probe", BOTH, 10.0, ROW),
        measurement("xla", BOTH, 10.0, ROW),
        measurement("reference", BOTH, 40.0, ROW),
        measurement("plain_scan", BOTH, 25.0, ROW),
        measurement("plain_scan_rows", BOTH, 31.0, ROW),
        measurement("cpu_1_core", BOTH, 10.0, ROW, "selective_scan_cores"),
        measurement("cpu_2_cores", BOTH, 5.0, ROW, "selective_scan_cores"),
        measurement("cpu", "step", 2.0, "batch_8", "selective_scan_step"),
        measurement("xla", "step", 5.0, "batch_8", "selective_scan_step"),
        measurement("cpu", BOTH, 5.0, ROW, "causal_conv"),
        measurement("xla", BOTH, 4.0, ROW, "causal_conv"),
        measurement("generate", "generate", 2.0, "batch_1", "llama_decode"),
        measurement("transformers", "generate", 9.0, "batch_1", "llama_decode"),
        measurement("transformers_static", "generate", 8.0, "batch_1", "llama_decode"),
        measurement(
            "transformers_1_thread", "generate", 7.0, "batch_1", "llama_decode"
        ),
        measurement("ragged", BOTH, 4.0, "fine_grained", "experts"),
        measurement("capacity", BOTH, 5.0, "fine_grained", "experts"),
        measurement("dense", BOTH, 9.0, "fine_grained", "experts"),
        measurement("scan", BOTH, 8.0, "fine_grained", "experts"),
        measurement("cpu", "forward", 2.0, "W8A8", "quant_matmul"),
        measurement("float32", "forward", 5.0, "W8A8", "quant_matmul"),
        measurement("default", "train", 2.0, "demo", "demo"),
        measurement("xla", "train", 5.0, "demo", "demo"),
        measurement("make_meta_step", "train", 0.5, "sinusoid", "meta_step"),
        measurement("scan", "train", 0.25, "sinusoid", "meta_step"),
        measurement("torch_func", "train", 1.0, "sinusoid", "meta_step"),
        measurement("higher", "train", 20.0, "sinusoid", "meta_step"),
        measurement(
            *("none", "gradient", 1.0, "steps_64", "meta_memory"), temp_bytes=300
        ),
        measurement(
            *("nested", "gradient", 3.0, "steps_64", "meta_memory"), temp_bytes=10
        ),
    ]
    found = {bar.name: bar for bar in bars(measurements)}
    assert {name: bar.value for name, bar in found.items()} == {
        "probe_forward": 1.5,
        "probe_gradients": 8.0,
        "cores_gradients": 2.0,
        "pscan_forward": 6.5,
        "demo": 2.5,
        "token_8": 2.5,
        "conv_gradients": 0.8,
        "plain_gradients": 2.5,
        "temporaries": 0.25,
        "llama_1": 3.5,
        "experts_gradients": 1.25,
        "quant_int8": 2.5,
        "meta_step_higher": 40.0,
        "meta_step_torch_func": 2.0,
        "meta_memory": 30.0,
    }
    assert [name for name, bar in found.items() if not bar.passed] == [
        "probe_gradients",
        "conv_gradients",
        "plain_gradients",
        "quant_int8",
        "meta_step_torch_func",
    ]


def lengths(power, *, longest=17, mode="forward", name="cpu"):
    """Times that grow with a power of the length from 2048 tokens on."""
    return [
        measurement(
            name,
            mode,
            max(2.0 ** (power * (k - 11)), 1.0),
            f"{2**k}_tokens",
            "selective_scan_scaling",
            2**k,
        )
        for k in range(8, longest + 1)
    ]


@pytest.mark.parametrize(
    ("power", "distance", "passed"),
    [(1.0, 0.0, True), (1.04, 0.04, True), (0.9, 0.1, False), (1.1, 0.1, False)],
)
def test_a_slope_may_differ_from_one_to_neither_side(power, distance, passed):
    found = list(bars([*lengths(power), *lengths(2.0, name="xla")]))
    assert [bar.name for bar in found] == ["slope_forward"]
    assert found[0].value == pytest.approx(distance, abs=1e-9)
    assert found[0].passed == passed


def temporaries(power, mode):
    for k in (9, 11, 13):
        needed = int(2.0 ** (power * k + 20))
        spec = {"name": f"length_{2**k}", "key": 2**k}
        yield Measurement("attention", "blockwise", spec, mode, temp_bytes=needed)
        other = 2 ** (2 * k + 20)
        yield Measurement("attention", "xla", spec, mode, temp_bytes=other)


@pytest.mark.parametrize(("power", "passed"), [(0.8, True), (1.0, True), (1.2, False)])
def test_memory_of_attention_grows_with_the_length_at_most(power, passed):
    found = list(bars([*temporaries(power, "forward"), *temporaries(1.0, BOTH)]))
    names = ["attention_memory_forward", "attention_memory_gradients"]
    assert [bar.name for bar in found] == names
    assert found[0].value == pytest.approx(power, abs=1e-3)
    assert [bar.passed for bar in found] == [passed, True]


def test_no_slope_is_claimed_without_the_longest_length():
    assert list(bars(lengths(1.0, longest=16))) == []


def test_slope_needs_two_lengths_that_count():
    assert slope([(256, 1.0), (2048, 1.0)]) is None
    assert slope([(256, 9.0), (2048, 1.0), (4096, 4.0)]) == pytest.approx(2.0)
