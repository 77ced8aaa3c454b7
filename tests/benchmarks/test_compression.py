"""The digits in few bits: what is judged, what is claimed, and the claims (slow)."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.numpy_oracles import rms_norm
from support.quick import filled

from benchmarks.evidence import compression
from capibara_eqx.transforms import NM, Rule, quantize


def test_what_is_judged():
    """Accuracy and loss of float64, and bytes of half of the weights."""
    model = filled(compression.Classifier, 8, seed=0, size=0.5)
    model, _ = quantize(model, [Rule("maps/.*weight", NM(2, 4))])
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 64)), rng.integers(0, 10, 40)
    found = compression.judged(model, jnp.asarray(x, "float32"), jnp.asarray(y))
    h = x
    for i, (norm, linear) in enumerate(zip(model.norms, model.maps, strict=True)):
        weight = np.asarray(linear.weight.dense(), np.float64)
        bias = np.asarray(linear.bias, np.float64)
        h = rms_norm(h, norm.weight) @ weight.T + bias
        h = h if i == 2 else np.maximum(h, 0)
    losses = np.log(np.exp(h).sum(axis=1)) - h[np.arange(40), y]
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], np.mean(h.argmax(1) == y), rtol=1e-6)
    # 8 rows of 64, 8 of 8 and 10 of 8: half of the values, two bits for each place.
    assert found["bytes"] == 8 * (32 * 4 + 8) + 18 * (4 * 4 + 1)


def record(model, accuracy, compressed=None):
    results = {"accuracy": accuracy, "loss": 0.1, "bytes": 7}
    if compressed is not None:
        forms = {form: results | {"accuracy": a} for form, a in compressed.items()}
        results = results | {"compressed": forms}
    return {"model": model, "results": results, "parameters": 3, "wall_s": 1.0}


def test_claims_are_differences_of_means():
    after = {"int8": 0.98, "ternary": 0.9, "2:4": 0.95, "int4": 0.97, "int4 GPTQ": 0.98}
    records = [
        record("float32", 0.99, after),
        record("float32", 0.97, after),
        record("ternary QAT", 0.96),
        record("ternary QAT", 0.98),
        record("2:4 SR-STE", 0.965),
    ]
    bars = {
        bar.name.removeprefix("compression_"): bar for bar in compression.bars(records)
    }
    values = {name: bar.value for name, bar in bars.items()}
    assert values == pytest.approx(
        {
            "ternary_QAT": 1.0,
            "2:4_SR-STE": 1.5,
            "int8_as_it_is": 0.0,
            "ternary_as_it_is": 8.0,
            "gptq": 0.0,
            "one_shot": 1.5,
        }
    )
    missed = [name for name, bar in bars.items() if not bar.passed]
    assert missed == ["2:4_SR-STE"]
    text = "\n".join(compression.tables(records))
    assert "| ternary QAT | 97.0 (96.0 to 98.0) | 0.100 | 7 |" in text


@pytest.mark.slow
def test_the_claims_hold():
    """Three seeds, as in docs/evidence.md."""
    pytest.importorskip("sklearn")
    records = [
        {"model": o.model, "results": o.results, "parameters": o.parameters}
        for o in compression.run(quick=False)
    ]
    missed = [bar for bar in compression.bars(records) if not bar.passed]
    assert missed == []
