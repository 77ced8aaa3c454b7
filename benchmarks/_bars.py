"""What the library claims about its speed and memory, computed from measurements."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ._records import Bar, Measurement


_SMALL = "small_batch"
_ROW = "mamba_130m_row"
_SMALL_WORDS = "2 rows of 1024 tokens, 256 channels"
_ROW_WORDS = "1 row of 2048 tokens, 1536 channels"
_BOTH = "forward_backward"
# As one would write them at first; `plain_scan_rows` knows one of the library's tricks
# and stands in the table beside them.
_PLAIN = ("reference", "plain_scan")


class _Unmeasured(Exception):
    """A claim's figures are not among the measurements."""


class _Measured:
    """Measurements of one run by name; `_Unmeasured` for those that are not there."""

    def __init__(self, measurements: Iterable[Measurement]):
        self._by_key = {m.key: m for m in measurements}

    def get(self, operation: str, spec: str, mode: str, name: str) -> Measurement:
        if (operation, spec, mode, name) not in self._by_key:
            raise _Unmeasured
        return self._by_key[operation, spec, mode, name]

    def ms(self, operation: str, spec: str, mode: str, name: str) -> float:
        return _there(self.get(operation, spec, mode, name).median_ms)

    def of(self, operation: str, mode: str) -> list[Measurement]:
        found = [
            m
            for m in self._by_key.values()
            if (m.operation, m.mode) == (operation, mode)
        ]
        return sorted(found, key=lambda m: m.spec["seq"])


@dataclass(frozen=True)
class _Claim:
    name: str
    statement: str
    limit: float
    at_least: bool
    unit: str
    compute: Callable[[_Measured], float]


def bars(measurements: Iterable[Measurement]) -> Iterator[Bar]:
    """Yield every bar whose measurements are all there.

    **Arguments:**

    - `measurements`: of one run on one device.
    """
    measured = _Measured(measurements)
    for claim in _CLAIMS:
        try:
            value = claim.compute(measured)
        except _Unmeasured:
            continue
        yield Bar(
            claim.name,
            claim.statement,
            float(f"{value:.4g}"),
            claim.limit,
            claim.at_least,
            claim.unit,
        )


def _there(value: float | None) -> float:
    if value is None:
        raise _Unmeasured
    return value


def _faster(spec: str, mode: str, *others: str) -> Callable[[_Measured], float]:
    """How many times faster the library's scan is than the fastest of `others`."""

    def compute(measured):
        ours = measured.ms("selective_scan", spec, mode, "xla")
        return min(measured.ms("selective_scan", spec, mode, o) for o in others) / ours

    return compute


def _temporaries(measured: _Measured) -> float:
    measurement = measured.get("selective_scan", _ROW, _BOTH, "xla")
    spec = measurement.spec
    states = 4 * spec["seq"] * spec["d_inner"] * spec["d_state"]
    return _there(measurement.temp_bytes) / states


def _doubling(mode: str) -> Callable[[_Measured], float]:
    def compute(measured):
        lengths = measured.of("selective_scan_scaling", mode)
        times = [_there(m.median_ms) for m in lengths]
        if len(times) < 2:
            raise _Unmeasured
        return max(b / a for a, b in zip(times, times[1:], strict=False))

    return compute


def _layer_gib(measured: _Measured) -> float:
    key = ("mamba_layer_memory", "100000_tokens", "forward", "xla")
    return _there(measured.get(*key).peak_rss_bytes) / 2**30


def _step(batch: int) -> Callable[[_Measured], float]:
    def compute(measured):
        key = ("mamba_step", f"batch_{batch}", "step")
        return measured.ms(*key, "mamba_step") / measured.ms(*key, "dense_product")

    return compute


def _layout(spec: str) -> Callable[[_Measured], float]:
    def compute(measured):
        key = ("selective_scan_layout", f"{spec}_1", "forward")
        first = measured.ms(*key, "channels_first")
        return first / measured.ms(*key, "channels_last")

    return compute


_CLAIMS = (
    _Claim(
        "pscan_forward",
        f"Selective scan forward, faster than mambapy's `pscan` ({_SMALL_WORDS})",
        *(6.0, True, "times"),
        _faster(_SMALL, "forward", "mambapy_pscan"),
    ),
    _Claim(
        "pscan_gradients",
        f"Forward and backward, faster than mambapy's `pscan` ({_SMALL_WORDS})",
        *(3.5, True, "times"),
        _faster(_SMALL, _BOTH, "mambapy_pscan"),
    ),
    _Claim(
        "plain_gradients",
        "Forward and backward, faster than through a plain scan, the faster of "
        f"`reference` and `plain_scan` ({_ROW_WORDS})",
        *(3.0, True, "times"),
        _faster(_ROW, _BOTH, *_PLAIN),
    ),
    _Claim(
        "temporaries",
        "Temporary memory of forward and backward, in arrays of all states "
        f"({_ROW_WORDS})",
        *(1 / 3, False, "arrays"),
        _temporaries,
    ),
    _Claim(
        "doubling_forward",
        "Worst cost of twice the length, forward (512 to 16384 tokens)",
        *(2.2, False, "times"),
        _doubling("forward"),
    ),
    _Claim(
        "doubling_gradients",
        "Worst cost of twice the length, forward and backward",
        *(2.2, False, "times"),
        _doubling(_BOTH),
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
)

NAMES = tuple(claim.name for claim in _CLAIMS)
