"""`python -m benchmarks`: measure every subject, print and record the results."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from . import (
    attention,
    causal_conv,
    cores,
    decode,
    demo_speed,
    gptq,
    gpu,
    layer,
    layer_memory,
    layout,
    linear_recurrence,
    llama_decode,
    machine,
    mamba2_decode,
    meta_mamba,
    meta_memory,
    meta_step,
    moe,
    one_token,
    quant_matmul,
    s4d,
    scaling,
    second_order,
    selective_scan,
    sequence_parallel,
    ssd,
)
from ._bars import bars
from ._environment import RESULTS, ROOT
from ._harness import FULL, QUICK, Settings
from ._records import MEASURED, Bar, Measurement, Recorder


SUBJECTS: dict[str, Callable[[Settings], Iterator[Measurement]]] = {
    "machine": machine.measure,
    "selective_scan": selective_scan.measure,
    "cores": cores.measure,
    "scaling": scaling.measure,
    "second_order": second_order.measure,
    "one_token": one_token.measure,
    "decode": decode.measure,
    "ssd": ssd.measure,
    "mamba2_decode": mamba2_decode.measure,
    "s4d": s4d.measure,
    "layer": layer.measure,
    "layer_memory": layer_memory.measure,
    "demo_speed": demo_speed.measure,
    "layout": layout.measure,
    "linear_recurrence": linear_recurrence.measure,
    "causal_conv": causal_conv.measure,
    "attention": attention.measure,
    "llama_decode": llama_decode.measure,
    "moe": moe.measure,
    "quant_matmul": quant_matmul.measure,
    "sequence_parallel": sequence_parallel.measure,
    "gptq": gptq.measure,
    "meta_step": meta_step.measure,
    "meta_memory": meta_memory.measure,
    "meta_mamba": meta_mamba.measure,
    "gpu": gpu.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, record, print; return 0 whether or not the bars are met."""
    options = _parser().parse_args(arguments)
    settings = QUICK if options.quick else FULL
    results = options.results
    if results is None:
        # A trial leaves nothing among the records that reports quote.
        results = ROOT / ".cache" / "benchmarks" if options.quick else RESULTS
    recorder = Recorder(results, quick=options.quick)
    found = _measure(options.only or list(SUBJECTS), settings, recorder)
    if not options.quick:
        _judge(found, recorder)
    print(f"\nRecorded in {recorder.path}")
    return 0


def _measure(
    names: Sequence[str], settings: Settings, recorder: Recorder
) -> list[Measurement]:
    found = []
    for name in names:
        print(f"\n{name}", flush=True)
        for measurement in SUBJECTS[name](settings):
            recorder.measurement(measurement)
            print(f"  {_line(measurement)}", flush=True)
            found.append(measurement)
    return found


def _judge(found: Sequence[Measurement], recorder: Recorder) -> None:
    judged = list(bars(found))
    if judged:
        print("\nbars")
    for bar in judged:
        recorder.bar(bar)
        print(f"  {_verdict(bar)}")
    missed = sum(not bar.passed for bar in judged)
    if missed:
        print(f"{missed} of {len(judged)} bars MISSED; was the machine busy?")


def _line(m: Measurement) -> str:
    name = f"{m.spec['name']:<18} {m.mode:<20} {m.implementation:<20}"
    if m.status != MEASURED:
        return f"{name} {m.status}: {m.reason}"
    parts = [f"{m.median_ms:>10.3f} ms", f"error {m.max_error:.1e}"]
    if m.roofline_ms is not None:
        parts.append(f"roofline {m.roofline_ms:.3f} ms ({m.roofline_of})")
    if m.temp_bytes is not None:
        parts.append(f"temporaries {m.temp_bytes / 2**20:.1f} MiB")
    if m.peak_rss_bytes is not None:
        parts.append(f"peak {m.peak_rss_bytes / 2**30:.2f} GiB")
    parts.append(f"{len(m.evaluation_ms)} calls")
    return f"{name} {', '.join(parts)}"


def _verdict(bar: Bar) -> str:
    relation = ">=" if bar.at_least else "<="
    verdict = "met   " if bar.passed else "MISSED"
    figure = f"{bar.value:.3g} {bar.unit} (wanted {relation} {bar.limit:.3g})"
    return f"{verdict} {bar.statement}: {figure}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the library beside its peers and record the results.",
        epilog="python -m benchmarks.report then writes docs/benchmarks.md.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, a few calls: a trial"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(SUBJECTS),
        help="this subject alone; may be given several times",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help=f"folder of the records (default {RESULTS.relative_to(ROOT)})",
    )
    return parser


if __name__ == "__main__":
    # What is found compiled would be recorded as compiled in no time.
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main())
