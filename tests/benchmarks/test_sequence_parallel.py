import pytest

from benchmarks import _harness, report, sequence_parallel
from benchmarks._records import Recorder, read_records


PROGRAM = """
  %all-gather.1 = f32[8,2,3]{2,1,0} all-gather(%x), channel_id=1
  %all-gather = (f32[8,2]{1,0}, pred[8]{0}) all-gather(%a, %b), channel_id=2
  ROOT %permute = bf16[3,5]{1,0} collective-permute(%y), channel_id=3
  %sum = f32[] all-reduce(%z), channel_id=4
  %part = f32[2]{0} reduce-scatter(%w), channel_id=5
  %all-reduce.7 = f32[1000]{0} fusion(%all-reduce.6), kind=kLoop
"""


def test_what_a_program_sends_is_counted_by_its_operands():
    gathered = 2 * 3 * 4 + 2 * 4 + 1
    assert sequence_parallel.sent_bytes(PROGRAM, 8) == (
        gathered + 3 * 5 * 2 + 4 + 8 * 2 * 4
    )


@pytest.mark.slow
def test_every_device_does_its_share_and_sends_what_the_formula_says(tmp_path):
    recorder = Recorder(tmp_path, quick=True)
    found = {}
    for measurement in sequence_parallel.measure(_harness.QUICK):
        recorder.measurement(measurement)
        assert measurement.median_ms is not None
        assert measurement.median_ms > 0
        assert measurement.max_error is not None
        assert measurement.max_error < 1e-6
        assert measurement.spec["difference"] < 1e-6
        found[measurement.spec["name"], measurement.mode] = measurement
    names = list(sequence_parallel.subjects(quick=True))
    assert len(found) == 4 * len(names)
    for name in names:
        alone, many = (found[f"{name}_{n}", "forward"].spec for n in (1, 8))
        passes = 1 if name == "causal_conv" else 2
        assert many["updates"] * 8 == alone["updates"] * passes
        assert many["updates_share"] == passes / 8
        assert alone["updates_share"] == alone["operations_share"] == 1
        # Pieces of eight tokens: what eight devices gather weighs as much as one piece.
        assert many["operations"] < 0.6 * alone["operations"]
        assert many["sent_by_formula"] == many["sent_compiled"] > 0
        assert alone["sent_by_formula"] == alone["sent_compiled"] == 0
        assert found[f"{name}_8", "forward_backward"].spec["sent_compiled"] > 0
    # Of the weights their own size, not that of the tokens that they met.
    spec = found["causal_conv_8", "forward_backward"].spec
    weights = 4 * spec["channels"] * (spec["width"] + 1)
    forward = found["causal_conv_8", "forward"].spec["sent_compiled"]
    assert spec["sent_compiled"] <= 2 * forward + weights
    page = report.render(read_records(tmp_path.glob("*/*.jsonl")))
    assert "| sent by formula, bytes |" in page
    assert "| operations as compiled | share |" in page
    assert page.count("`selective_scan_8`") == 2
