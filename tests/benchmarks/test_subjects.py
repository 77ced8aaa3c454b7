import pytest

from benchmarks import (
    _harness,
    attention,
    cores,
    decode,
    demo_speed,
    layer,
    llama_decode,
    machine,
    meta_mamba,
    meta_memory,
    meta_step,
    one_token,
    probe,
    second_order,
)
from benchmarks._records import Measurement
from benchmarks.scaling import measure as measure_lengths
from capibara_eqx.kernels._native._compiler import find_compiler


TRIAL = _harness.Settings(quick=True, rounds=1, calls=1, turn_s=0.0, budget_s=60.0)

compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def measured(subject) -> dict[str, list[Measurement]]:
    """What was measured, by mode; peers may be missing, and others may not."""
    found: dict[str, list[Measurement]] = {}
    for measurement in subject(TRIAL):
        if measurement.status == "measured":
            assert measurement.median_ms is not None
            assert measurement.median_ms > 0
            found.setdefault(measurement.mode, []).append(measurement)
        else:
            peers = ("higher", "mambapy", "torch", "transformers")
            assert measurement.implementation.startswith(peers)
    return found


def worst(measurements: list[Measurement]) -> float:
    errors = [m.max_error for m in measurements if m.max_error is not None]
    assert len(errors) == len(measurements)
    return max(errors)


def names(measurements: list[Measurement]) -> set[str]:
    return {m.implementation for m in measurements}


@compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("elements", [1, 5000])
def test_the_probe_does_all_of_its_work(elements, threads):
    prepared = probe.scan_work(elements, 4, threads)
    tokens = prepared.run()
    # Three chains of four states; a register holds 4, 8 or 16 numbers.
    assert tokens >= 1
    assert elements <= tokens * threads * 3 * 4 * 16
    assert prepared.outputs is not None
    expected = probe.scan_work_expected(threads)
    assert _harness.max_error(prepared.outputs(tokens), expected) < 2e-6


@compiler
def test_the_bandwidth_is_that_of_a_whole_copy():
    found = measured(machine.measure)["copy"]
    assert worst(found) == 0
    assert found[0].spec["bytes_per_call"] == 2 * 2**16
    prepared = probe.copy(1001, 3)
    target = prepared.run()
    target[500] += 1
    assert prepared.outputs is not None
    assert prepared.outputs(target) == pytest.approx(1000 / 1001)


@compiler
def test_one_token_by_every_implementation():
    found = measured(one_token.measure)["step"]
    assert names(found) >= {"cpu", "xla", "reference"}
    assert worst(found) < 1e-5


@compiler
def test_one_token_through_the_layer():
    found = measured(decode.measure)["step"]
    assert names(found) >= {"mamba_step", "dense_product", "layer_products"}
    assert worst(found) < 1e-5


@pytest.mark.slow
def test_attention_and_its_gradients():
    found = measured(attention.measure)
    for mode in ("forward", "forward_backward"):
        assert names(found[mode]) >= {"blockwise", "xla", "jax_nn"}
        assert worst(found[mode]) < 1e-5


def test_what_needs_too_much_memory_takes_no_part(monkeypatch):
    monkeypatch.setattr(attention, "_MOST_TEMPORARIES", 2**20)
    (spec,) = attention._QUICK
    inputs, _ = attention._inputs(spec)
    contenders = {c.implementation: c for c in attention._ours(inputs, None)}
    assert contenders.pop("blockwise").prepare().temp_bytes
    assert set(contenders) == {"xla", "jax_nn"}
    for contender in contenders.values():
        with pytest.raises(_harness.TooLarge, match="0.0 GiB of temporaries, more"):
            contender.prepare()


@pytest.mark.slow
def test_a_small_llama_generates_the_right_tokens():
    found = measured(llama_decode.measure)["generate"]
    assert names(found) >= {"generate", "weight_products"}
    assert worst([m for m in found if m.implementation == "weight_products"]) < 1e-6
    assert worst([m for m in found if m.implementation != "weight_products"]) == 0
    assert found[0].spec["tokens_per_call"] == 6


@compiler
@pytest.mark.slow
def test_a_hessian_product_by_every_implementation():
    found = measured(second_order.measure)
    assert names(found["forward_over_reverse"]) >= {"cpu", "xla", "associative_scan"}
    assert names(found["reverse_over_reverse"]) >= {"cpu", "xla", "associative_scan"}
    for mode in found:
        assert worst(found[mode]) < 1e-5


@compiler
@pytest.mark.slow
def test_lengths_are_measured_by_every_implementation():
    found = measured(measure_lengths)
    for mode in ("forward", "forward_backward"):
        assert names(found[mode]) >= {"cpu", "xla", "associative_scan"}
        assert {m.spec["seq"] for m in found[mode]} == {32, 64}
        assert worst(found[mode]) < 1e-5


@compiler
@pytest.mark.slow
def test_processes_on_one_core_and_on_two_give_the_same():
    found = measured(cores.measure)
    for mode in ("forward", "forward_backward"):
        assert names(found[mode]) >= {"cpu_1_core", "probe_1_thread"}
        assert worst(found[mode]) < 1e-5


@compiler
@pytest.mark.slow
def test_the_layer_and_all_its_gradients():
    found = measured(layer.measure)
    for mode in ("forward", "forward_backward"):
        assert names(found[mode]) >= {"cpu", "xla"}
        assert worst(found[mode]) < 1e-5


@pytest.mark.slow
def test_the_steps_of_the_demo_begin_with_the_right_loss():
    found = measured(demo_speed.measure)["train"]
    assert names(found) == {"default", "xla"}
    assert worst(found) < 1e-6
    assert found[0].spec["tokens_per_call"] == 4 * 2 * 32


@pytest.mark.slow
def test_a_step_of_meta_training_by_every_way_has_the_right_gradient():
    found = measured(meta_step.measure)["train"]
    assert names(found) >= {"make_meta_step", "scan"}
    assert worst(found) < 1e-5


@pytest.mark.slow
def test_whatever_is_kept_for_it_the_meta_gradient_is_right():
    found = measured(meta_memory.measure)["gradient"]
    assert names(found) == set(meta_memory.REMAT)
    assert worst(found) < 1e-5


@pytest.mark.slow
def test_meta_training_through_a_mamba_layer_has_the_right_gradient():
    found = measured(meta_mamba.measure)["train"]
    assert names(found) >= {"default", "xla", "reference"}
    assert worst(found) < 1e-4
    assert found[0].spec["tokens_per_call"] == 2 * 2 * 1 * 5
