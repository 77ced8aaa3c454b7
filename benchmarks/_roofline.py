"""The least time that a chip needs for an operation: its roofline.

Counted is what an algorithm of the kind does at least, at the largest rates that the
chip is said to have. It is not a proof: exponentials by polynomials on the multiply-add
units, for one, would need fewer of those counted here.

- Bytes: every operand is read once a direction and every result written once, in its
  own dtype; going backward also the states that forward kept, if it kept any. At the
  bandwidth of a copy measured in the same run, bytes read and bytes written.
- Exponentials: for each token, channel and state one decay, and for each token and
  channel one in softplus and one in the gate. Backward has to compute all of them
  again. Logarithms and quotients are left out.
- Multiply-adds, where a product or a sum alone counts as one. Of the scan only what is
  done for each token, channel and state. Forward four: the exponent `dt A`, the input
  `dt u B`, `h = decay h + input`, `y += C h`. Backward twelve: the exponent, the
  decayed state and the state, which forward did not keep; `C dy` on to the state's
  cotangent, and that times the decay; the terms of dB, dC, du and of the output before
  its gate; the cotangent of the exponent, and its terms of dA and of ddelta.

The largest of the three times is the roofline. Backward begins when forward is through:
together they need the sum of their own.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Work(NamedTuple):
    """What one direction of an operation cannot do without."""

    bytes: int
    exponentials: int
    multiply_adds: int


class Rates(NamedTuple):
    """Of each kind of work so many a second."""

    bytes: float
    exponentials: float
    multiply_adds: float


class _Chip(NamedTuple):
    processors: int
    clock_hz: float


# Results a clock of one processor, of compute capability 9.0: the table of arithmetic
# throughput in NVIDIA's CUDA programming guide, rows "exp2f" and "32-bit multiply-add".
_EXPONENTIALS_A_CLOCK = 16
_MULTIPLY_ADDS_A_CLOCK = 128

# By the names that jax gives them. Processors are those of NVIDIA's data sheets, clocks
# the highest: at these the sheets' float32 peaks of 67 and 51 TFLOP/s follow.
_CHIPS: Mapping[str, _Chip] = {
    "NVIDIA H100 80GB HBM3": _Chip(132, 1.98e9),
    "NVIDIA H100 PCIe": _Chip(114, 1.755e9),
    "NVIDIA H200": _Chip(132, 1.98e9),
}


def rates(device_kind: str, bytes_per_s: float) -> Rates | None:
    """What a device can do at best, `None` for one whose chip is not known here.

    **Arguments:**

    - `device_kind`: as jax names it.
    - `bytes_per_s`: the bandwidth that was measured on it.
    """
    chip = _CHIPS.get(device_kind)
    if chip is None:
        return None
    clocks = chip.processors * chip.clock_hz
    return Rates(
        bytes_per_s, _EXPONENTIALS_A_CLOCK * clocks, _MULTIPLY_ADDS_A_CLOCK * clocks
    )


def roofline(passes: Sequence[Work], rates: Rates) -> tuple[float, str]:
    """The least milliseconds for passes one after the other, and what sets them."""
    total, limits = 0.0, []
    for work in passes:
        times = {
            kind.replace("_", "-"): count / rate * 1e3
            for kind, count, rate in zip(Work._fields, work, rates, strict=True)
        }
        limit = max(times, key=times.__getitem__)
        total += times[limit]
        limits.append(limit)
    return total, ", then ".join(dict.fromkeys(limits))


def scan_forward(
    batch: int, seq: int, d_inner: int, d_state: int, itemsize: int, saved_every: int
) -> Work:
    """The scan with step sizes through softplus, skip weights and gate.

    **Arguments:**

    - `itemsize`: bytes of a number in the streams; weights and states have four.
    - `saved_every`: tokens from one state that is kept to the next, 0 for none.
    """
    tokens = batch * seq
    # u, delta, z and y; B and C.
    streams = itemsize * tokens * (4 * d_inner + 2 * d_state)
    states = _saved(batch, seq, d_inner, d_state, saved_every)
    return Work(
        streams + _weights(d_inner, d_state) + states,
        tokens * d_inner * (d_state + 2),
        4 * tokens * d_inner * d_state,
    )


def scan_backward(
    batch: int, seq: int, d_inner: int, d_state: int, itemsize: int, saved_every: int
) -> Work:
    """The cotangents of all operands of `scan_forward`, from that of `y`."""
    tokens = batch * seq
    # u, delta, z, dy, du, ddelta and dz; B, C, dB and dC.
    streams = itemsize * tokens * (7 * d_inner + 4 * d_state)
    states = _saved(batch, seq, d_inner, d_state, saved_every)
    return Work(
        streams + 2 * _weights(d_inner, d_state) + states,
        tokens * d_inner * (d_state + 2),
        12 * tokens * d_inner * d_state,
    )


def scan_step(batch: int, d_inner: int, d_state: int, itemsize: int) -> Work:
    """One token of `scan_forward` from a state, which is read and written."""
    one = scan_forward(batch, 1, d_inner, d_state, itemsize, 0)
    return one._replace(bytes=one.bytes + 2 * 4 * batch * d_inner * d_state)


def conv_forward(
    batch: int, seq: int, channels: int, width: int, itemsize: int
) -> Work:
    """A depthwise convolution with bias and SiLU: `x` in, `y` out."""
    numbers = batch * seq * channels
    weights = channels * (width + 1)
    return Work(itemsize * (2 * numbers + weights), numbers, width * numbers)


def conv_backward(
    batch: int, seq: int, channels: int, width: int, itemsize: int
) -> Work:
    """`x` and dy in, dx out: the convolution again, and its two transposes."""
    numbers = batch * seq * channels
    weights = channels * (width + 1)
    return Work(itemsize * (3 * numbers + 2 * weights), numbers, 3 * width * numbers)


def _weights(d_inner: int, d_state: int) -> int:
    """Bytes of A, D and the bias."""
    return 4 * d_inner * (d_state + 2)


def _saved(batch: int, seq: int, d_inner: int, d_state: int, every: int) -> int:
    """Bytes of the states at the start of each run of `every` tokens."""
    return 4 * batch * -(-seq // every) * d_inner * d_state if every else 0
