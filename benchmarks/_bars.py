"""What the library claims about its speed and memory, computed from measurements."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ._measured import Measured, Unmeasured, there
from ._records import Bar, Measurement
from ._slope import LONGEST, SHORTEST, slope


_SCAN = "selective_scan"
_SMALL = "small_batch"
_ROW = "mamba_130m_row"
_SMALL_WORDS = "2 rows of 1024 tokens, 256 channels"
_ROW_WORDS = "1 row of 2048 tokens, 1536 channels"
_BOTH = "forward_backward"
# As one would write them at first; `plain_scan_rows` knows one of the XLA form's tricks
# and stands in the table beside them.
_PLAIN = ("reference", "plain_scan")
_EXPERTS = ("experts", "fine_grained")
_OTHERS = ("capacity", "dense", "scan")
_DUAL = ("ssd", "mamba2_130m_row")


@dataclass(frozen=True)
class _Claim:
    name: str
    statement: str
    limit: float
    at_least: bool
    unit: str
    compute: Callable[[Measured], float]


def bars(measurements: Iterable[Measurement]) -> Iterator[Bar]:
    """Yield every bar whose measurements are all there.

    **Arguments:**

    - `measurements`: of one run on one device.
    """
    measured = Measured(measurements)
    for claim in _CLAIMS:
        try:
            value = claim.compute(measured)
        except Unmeasured:
            continue
        yield Bar(
            claim.name,
            claim.statement,
            float(f"{value:.4g}"),
            claim.limit,
            claim.at_least,
            claim.unit,
        )


def _ratio(
    of: tuple[str, str, str], slow: str, fast: str
) -> Callable[[Measured], float]:
    """How many times as long `slow` takes as `fast`; `of` is operation, shape, mode."""
    return lambda measured: measured.ms(*of, slow) / measured.ms(*of, fast)


def _faster(
    of: tuple[str, str, str], ours: str, *others: str
) -> Callable[[Measured], float]:
    """How many times faster `ours` is than the fastest of the others."""

    def compute(measured):
        return min(measured.ms(*of, o) for o in others) / measured.ms(*of, ours)

    return compute


def _temporaries(measured: Measured) -> float:
    measurement = measured.get(_SCAN, _ROW, _BOTH, "cpu")
    spec = measurement.spec
    states = 4 * spec["seq"] * spec["d_inner"] * spec["d_state"]
    return there(measurement.temp_bytes) / states


def _from_linear(mode: str) -> Callable[[Measured], float]:
    """How far the slope of time against length is from one, to either side."""

    def compute(measured):
        lengths = {
            m.spec["seq"]: there(m.median_ms)
            for m in measured.of("selective_scan_scaling", mode, "cpu")
        }
        if not {SHORTEST, LONGEST} <= set(lengths):
            raise Unmeasured
        return abs(there(slope(lengths.items())) - 1)

    return compute


def _memory_slope(mode: str) -> Callable[[Measured], float]:
    """Slope of the temporaries of attention in blocks against the length."""

    def compute(measured):
        needed = {
            m.spec["key"]: there(m.temp_bytes)
            for m in measured.of("attention", mode, "blockwise")
        }
        return there(slope(needed.items()))

    return compute


def _less_memory(measured: Measured) -> float:
    """How many times the temporaries of the nested inner loop go into the plain's."""
    of = ("meta_memory", "steps_64", "gradient")
    plain, nested = (measured.get(*of, name) for name in ("none", "nested"))
    return there(plain.temp_bytes) / there(nested.temp_bytes)


def _layer_gib(measured: Measured) -> float:
    key = ("mamba_layer_memory", "100000_tokens", "forward", "default")
    return there(measured.get(*key).peak_rss_bytes) / 2**30


def _step(batch: int) -> Callable[[Measured], float]:
    return _ratio(
        ("mamba_step", f"batch_{batch}", "step"), "mamba_step", "dense_product"
    )


def _layout(spec: str) -> Callable[[Measured], float]:
    of = ("selective_scan_layout", f"{spec}_1", "forward")
    return _ratio(of, "channels_first", "channels_last")


def _cores(mode: str) -> Callable[[Measured], float]:
    return _ratio(("selective_scan_cores", _ROW, mode), "cpu_1_core", "cpu_2_cores")


def _in_probes(mode: str) -> Callable[[Measured], float]:
    return _ratio((_SCAN, _ROW, mode), "cpu", "probe")


def _of_roofline(mode: str) -> Callable[[Measured], float]:
    """Times as long as the chip needs at least; only for chips whose rates are known.

    All of these are Hopper's.
    """

    def compute(measured):
        key = ("gpu_selective_scan", "mamba_130m_batch", mode, "pallas_gpu")
        found = measured.get(*key)
        return there(found.median_ms) / there(found.roofline_ms)

    return compute


_CLAIMS = (
    _Claim(
        "probe_forward",
        "Compiled scan forward, in times of the probe: its exponentials and "
        f"multiply-adds alone ({_ROW_WORDS})",
        *(2.0, False, "times"),
        _in_probes("forward"),
    ),
    _Claim(
        "probe_gradients",
        "Compiled scan forward and backward, in times of the same probe",
        *(7.0, False, "times"),
        _in_probes(_BOTH),
    ),
    _Claim(
        "cores_forward",
        f"Compiled scan forward, faster on two cores than on one ({_ROW_WORDS})",
        *(1.7, True, "times"),
        _cores("forward"),
    ),
    _Claim(
        "cores_gradients",
        "Compiled scan forward and backward, faster on two cores than on one",
        *(1.7, True, "times"),
        _cores(_BOTH),
    ),
    _Claim(
        "pscan_forward",
        f"Compiled scan forward, faster than mambapy's `pscan` ({_SMALL_WORDS})",
        *(6.0, True, "times"),
        _faster((_SCAN, _SMALL, "forward"), "cpu", "mambapy_pscan"),
    ),
    _Claim(
        "pscan_gradients",
        "Compiled scan forward and backward, faster than mambapy's `pscan` "
        f"({_SMALL_WORDS})",
        *(30.0, True, "times"),
        _faster((_SCAN, _SMALL, _BOTH), "cpu", "mambapy_pscan"),
    ),
    _Claim(
        "slope_forward",
        "Distance from 1 of the slope of log time against log length, compiled scan "
        f"forward, results in place ({SHORTEST} to {LONGEST} tokens, 256 channels)",
        *(0.05, False, ""),
        _from_linear("forward"),
    ),
    _Claim(
        "slope_gradients",
        "The same, forward and backward",
        *(0.05, False, ""),
        _from_linear(_BOTH),
    ),
    _Claim(
        "demo",
        'Training steps of `capibara demo`, faster than with `implementation="xla"`',
        *(2.0, True, "times"),
        _ratio(("demo", "demo", "train"), "xla", "default"),
    ),
    _Claim(
        "token_1",
        "Compiled update by one token, faster than XLA's (batch 1, 1536 channels)",
        *(1.0, True, "times"),
        _ratio(("selective_scan_step", "batch_1", "step"), "xla", "cpu"),
    ),
    _Claim(
        "token_8",
        "The same for a batch of 8",
        *(1.0, True, "times"),
        _ratio(("selective_scan_step", "batch_8", "step"), "xla", "cpu"),
    ),
    _Claim(
        "conv_forward",
        f"Compiled depthwise convolution forward, faster than XLA's ({_ROW_WORDS})",
        *(1.0, True, "times"),
        _ratio(("causal_conv", _ROW, "forward"), "xla", "cpu"),
    ),
    _Claim(
        "conv_gradients",
        "The same, forward and backward",
        *(1.0, True, "times"),
        _ratio(("causal_conv", _ROW, _BOTH), "xla", "cpu"),
    ),
    _Claim(
        "plain_gradients",
        "XLA form forward and backward, faster than through a plain scan, the faster "
        f"of `reference` and `plain_scan` ({_ROW_WORDS})",
        *(3.0, True, "times"),
        _faster((_SCAN, _ROW, _BOTH), "xla", *_PLAIN),
    ),
    _Claim(
        "temporaries",
        "Temporary memory of the compiled scan forward and backward, in arrays of all "
        f"states ({_ROW_WORDS})",
        *(1 / 3, False, "arrays"),
        _temporaries,
    ),
    _Claim(
        "layer_memory",
        "Peak memory of a process: Mamba layer of 768 over 100,000 tokens, forward",
        *(5.0, False, "GiB"),
        _layer_gib,
    ),
    _Claim(
        "step_1",
        "Decode step of a Mamba layer of 768, in dense products of its size (batch 1)",
        *(3.0, False, "times"),
        _step(1),
    ),
    _Claim(
        "step_8",
        "The same for a batch of 8",
        *(3.0, False, "times"),
        _step(8),
    ),
    _Claim(
        "attention_memory_forward",
        "Slope of log temporary memory against log length, attention in blocks forward "
        "(2048 to 8192 tokens)",
        *(1.1, False, ""),
        _memory_slope("forward"),
    ),
    _Claim(
        "attention_memory_gradients",
        "The same, forward and backward",
        *(1.1, False, ""),
        _memory_slope(_BOTH),
    ),
    _Claim(
        "llama_1",
        "Tokens of a Llama of 4 layers of 256 with a cache, faster than transformers', "
        "the fastest of its ways (batch 1)",
        *(3.0, True, "times"),
        _faster(
            ("llama_decode", "batch_1", "generate"),
            *("generate", "transformers", "transformers_static"),
            "transformers_1_thread",
        ),
    ),
    _Claim(
        "experts_forward",
        "The default of the experts, `ragged`, faster than the fastest of the others "
        "(512 tokens of 768, 2 of 32 experts of 64)",
        *(1.0, True, "times"),
        _faster((*_EXPERTS, "forward"), "ragged", *_OTHERS),
    ),
    _Claim(
        "experts_gradients",
        "The same, forward and backward",
        *(1.0, True, "times"),
        _faster((*_EXPERTS, _BOTH), "ragged", *_OTHERS),
    ),
    _Claim(
        "quant_ternary",
        "Compiled product of ternary weights with tokens of 8 bits, faster than that "
        "in float32 (256 tokens, 2048 to 2048)",
        *(3.0, True, "times"),
        _faster(("quant_matmul", "W1.58A8", "forward"), "cpu", "float32"),
    ),
    _Claim(
        "quant_int8",
        "The same of weights of 8 bits",
        *(3.0, True, "times"),
        _faster(("quant_matmul", "W8A8", "forward"), "cpu", "float32"),
    ),
    _Claim(
        "ssd_forward",
        "State space dual forward, faster than transformers' `mamba2_chunk_scan` in "
        "its default chunks (1 row of 2048 tokens, 24 heads of 64, 128 states)",
        *(5.0, True, "times"),
        _faster((*_DUAL, "forward"), "cpu", "transformers_scan"),
    ),
    _Claim(
        "ssd_gradients",
        "The same, forward and backward",
        *(5.0, True, "times"),
        _faster((*_DUAL, _BOTH), "cpu", "transformers_scan"),
    ),
    _Claim(
        "mamba2_step",
        "Decode step of a Mamba-2 layer of 768, in the dense products that it does "
        "(128 states, heads of 64, batch 1)",
        *(1.5, False, "times"),
        _ratio(("mamba2_step", "batch_1", "step"), "mamba2_step", "layer_products"),
    ),
    _Claim(
        "gptq",
        "GPTQ of a weight of 1024 by 1024 to 4 bits, in times of blocked PyTorch",
        *(2.0, False, "times"),
        _ratio(("gptq", "square_1024", "forward"), "gptq", "torch_gptq"),
    ),
    _Claim(
        "meta_step_higher",
        "Step of meta-training on sines, called from Python, faster than `higher` (25 "
        "tasks, 10 shots, 1 inner step)",
        *(25.0, True, "times"),
        _faster(("meta_step", "sinusoid", "train"), "make_meta_step", "higher"),
    ),
    _Claim(
        "meta_step_torch_func",
        "The same, faster than `torch.func` with its tasks in a batch",
        *(3.0, True, "times"),
        _faster(("meta_step", "sinusoid", "train"), "make_meta_step", "torch_func"),
    ),
    _Claim(
        "meta_memory",
        "Temporary memory of a meta-gradient through 64 inner steps, plain over "
        '`remat="nested"`',
        *(20.0, True, "times"),
        _less_memory,
    ),
    # "About twice": what rounds to two or more.
    _Claim(
        "layout_small",
        "Plain scan forward, channels last over channels first (1024 tokens, 256 "
        "channels)",
        *(1.5, True, "times"),
        _layout(_SMALL),
    ),
    _Claim(
        "layout_row",
        f"The same ({_ROW_WORDS})",
        *(1.5, True, "times"),
        _layout(_ROW),
    ),
    _Claim(
        "roofline_forward",
        "Fused scan forward on a Hopper GPU, in times of its roofline (8 rows of 4096 "
        "tokens, 1536 channels, bfloat16)",
        *(2.0, False, "times"),
        _of_roofline("forward"),
    ),
    _Claim(
        "roofline_backward",
        "The same, backward",
        *(2.0, False, "times"),
        _of_roofline("backward"),
    ),
)

NAMES = tuple(claim.name for claim in _CLAIMS)
