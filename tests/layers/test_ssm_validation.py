"""Whether the check of all state space layers tells right from wrong."""

import numpy as np
import pytest

from capibara_eqx.kernels import selective_scan
from capibara_eqx.layers import SSMStatus, _ssm_validation, validate_ssm_system
from capibara_eqx.layers._ssm_config import PARAMETERS


KEYS = ("ssm_available", "mamba_available", "s4_available", "hybrid_available")


@pytest.fixture(scope="module")
def status() -> SSMStatus:
    return validate_ssm_system()


@pytest.mark.slow
def test_the_keys_of_the_documents(status):
    assert set(status) == {*KEYS, "errors", "tolerances"}
    assert [status[key] for key in KEYS] == [True] * 4
    print(f"SSM available: {status['ssm_available']}")


@pytest.mark.slow
def test_every_layer_and_every_loop_was_measured(status):
    layers = [*PARAMETERS, "hybrid_ssm"]
    expected = {*(f"{kind}.step" for kind in layers), *_ssm_validation._CHECKS}
    assert set(status["errors"]) == set(status["tolerances"]) == expected
    for name, error in status["errors"].items():
        assert 0 <= error <= status["tolerances"][name], name
    # Of float32, or of bfloat16 in `ultra`.
    assert all(
        tolerance < 2e-5 or name == "ultra.step" and tolerance < 0.2
        for name, tolerance in status["tolerances"].items()
    )


@pytest.mark.parametrize(
    ("wrong", "unavailable"),
    [
        ("mamba.step", {"mamba_available", "hybrid_available"}),
        ("mamba2.step", {"mamba_available"}),
        ("s4.step", {"s4_available"}),
        ("hybrid.step", {"hybrid_available"}),
        ("hybrid_ssm.step", {"hybrid_available"}),
        ("ultra.step", set()),
        ("selective_scan.numpy", {"mamba_available", "hybrid_available"}),
        ("s4d.numpy", {"s4_available"}),
        ("linear_recurrence.numpy", set()),
    ],
)
@pytest.mark.parametrize("error", [3e-2, np.nan])
def test_an_error_shows(monkeypatch, wrong, unavailable, error):
    """Nothing is computed: what the parts would return is put in their places."""
    name, _, kind = wrong.partition(".")
    right = np.linspace(0.5, 1.0, 8)
    spoiled = right + np.where(np.arange(8) == 3, 10 * error, 0.0)
    layers = [*PARAMETERS, "hybrid_ssm"]
    monkeypatch.setattr(_ssm_validation, "_normal", lambda *args: 0.0)
    monkeypatch.setattr(
        _ssm_validation, "_layers", lambda key: {layer: layer for layer in layers}
    )
    monkeypatch.setattr(
        _ssm_validation,
        "_call",
        lambda layer, x: spoiled if kind == "step" and layer == name else right,
    )
    monkeypatch.setattr(_ssm_validation, "_stream", lambda layer, x: right)
    checks = {
        check: lambda rng, check=check: (spoiled if check == wrong else right, right)
        for check in _ssm_validation._CHECKS
    }
    monkeypatch.setattr(_ssm_validation, "_CHECKS", checks)
    status = validate_ssm_system()
    refused = {"ssm_available", *unavailable}
    assert {key for key in KEYS if not status[key]} == refused
    assert not status["errors"][wrong] <= status["tolerances"][wrong]


def test_what_cannot_run_raises(monkeypatch):
    def broken(rng):
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(_ssm_validation, "_layers", lambda key: {})
    monkeypatch.setattr(_ssm_validation, "_CHECKS", {"selective_scan.numpy": broken})
    with pytest.raises(RuntimeError, match="the kernel is broken"):
        validate_ssm_system()


def test_a_wrong_layer_is_seen(monkeypatch):
    """A scan that forgets half of its decay is found by the loop in NumPy."""

    def wrong(u, delta, A, *args, **options):
        return selective_scan(u, delta, 0.5 * A, *args, **options)

    monkeypatch.setattr(_ssm_validation, "_layers", lambda key: {})
    monkeypatch.setattr(_ssm_validation, "selective_scan", wrong)
    status = validate_ssm_system()
    assert not status["mamba_available"]
    assert not status["ssm_available"]
    assert status["errors"]["selective_scan.numpy"] > 1e-2
