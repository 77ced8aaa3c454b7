"""From calibrated ranges to models whose inputs are rounded by one step a weight."""

import functools
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import packed_oracle as oracle
from support.messages import refused
from support.quant_cases import random, wide
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.arrays import AffineArray, FakeQuantArray, LoRA, as_array
from capibara_eqx.layers import MLP, BitNet158, MoE
from capibara_eqx.transforms import (
    NM,
    Affine,
    Calibration,
    Rule,
    Ternary,
    calibrate,
    collect_hessian,
    convert,
    dequantize,
    gptq,
    lora,
    merge,
    prepare_qat,
    quantize,
    report,
    trainable_spec,
)


STATIC = "static_int8"
SPECS = [
    Affine(8, activations=STATIC),
    Affine(4, symmetric=False, group_size=3, activations=STATIC),
    Ternary(activations=STATIC),
]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
specs = pytest.mark.parametrize("spec", [SPECS[1], *map(slow, SPECS[::2])], ids=str)
D, FF, LAYERS = 4, 6, 3


def rules(spec):
    return [Rule(".*weight", spec)]


def one_of(seed: int):
    return filled(MLP, D, FF, "relu", seed=seed, size=0.6)


@functools.cache
def stack():
    """Layers of a scan."""
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0],
        *[one_of(seed) for seed in range(LAYERS)],
    )


@eqx.filter_jit
def scanned(stack, x):
    arrays, static = eqx.partition(stack, eqx.is_array)
    step = lambda x, layer: (2 * eqx.combine(layer, static)(x), None)
    return jax.lax.scan(step, x, arrays)[0]


@functools.cache
def found():
    """Ranges that leave a part of the inputs out."""
    batches = [random((2, 5, D), seed) for seed in range(2)]
    return calibrate(
        stack(), scanned, batches, [".*weight"], range="percentile", percentile=75.0
    )


@functools.cache
def small(spec):
    return quantize(stack(), rules(spec), calibration=found())[0]


@functools.cache
def fake(spec):
    return prepare_qat(stack(), rules(spec), calibration=found())[0]


def loop(model, x):
    """Every layer by NumPy, its inputs rounded by the steps of the calibration."""
    x = wide(x)
    clipped = 0
    for i in range(LAYERS):
        for name in ("up_proj", "down_proj"):
            layer = getattr(model, name)
            step = wide(found().ranges[f"{name}/weight"])[i] / 127
            x, inside = oracle.round_by_one_step(x, step)
            clipped += np.sum(~inside)
            x = x @ wide(as_array(layer.weight))[i].T
            x = x + wide(layer.bias)[i]
            if name == "up_proj":
                x = np.maximum(x, 0)
        x = 2 * x
    assert clipped > 0
    return x


@specs
def test_a_scanned_model_rounds_inputs_by_the_steps_of_the_calibration(spec):
    x = random((2, 5, D), 7)
    want = loop(small(spec), x)
    close = {"dtype": "float32", "length": 3 * FF}
    assert_close(scanned(small(spec), x), want, **close)
    assert_close(scanned(fake(spec), x), want, **close)
    node = small(spec).up_proj.weight
    np.testing.assert_array_equal(node.input_scale, found().steps["up_proj/weight"])
    # Of a layer alone, and under `checkpoint`.
    for i in range(LAYERS):
        take = lambda leaf, i=i: leaf[i] if eqx.is_array(leaf) else leaf
        one = jax.tree.map(take, small(spec))
        assert one.up_proj.weight.input_scale.shape == ()
    run = eqx.filter_jit(eqx.filter_checkpoint(scanned))
    assert_close(run(small(spec), x), want, **close)


@specs
def test_training_ends_in_what_quantize_makes(spec):
    assert isinstance(fake(spec).up_proj.weight, FakeQuantArray)
    assert eqx.tree_equal(convert(fake(spec)), small(spec))
    again, _ = quantize(small(spec), rules(spec))
    assert eqx.tree_equal(again, small(spec))
    again, _ = quantize(small(spec), rules(spec), calibration=found())
    assert eqx.tree_equal(again, small(spec))
    again, _ = prepare_qat(fake(spec), rules(spec))
    assert eqx.tree_equal(again, fake(spec))


def test_training_moves_weights_and_no_step_of_inputs():
    spec = SPECS[0]
    learns, rest = eqx.partition(fake(spec), trainable_spec(fake(spec)))
    assert learns.up_proj.weight.weight is not None
    assert learns.up_proj.weight.input_scale is None
    assert rest.up_proj.weight.input_scale is not None
    x = random((2, 5, D), 7)

    def loss(learns):
        return jnp.sum(jnp.sin(scanned(eqx.combine(learns, rest), x)))

    gradient = jax.jit(jax.grad(loss))(learns)
    assert np.all(np.any(wide(gradient.up_proj.weight.weight) != 0, axis=(1, 2)))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@specs
def test_bytes_files_and_the_way_back(spec):
    plain = dequantize(small(spec))
    assert jax.tree.structure(plain) == jax.tree.structure(stack())
    listed = report(small(spec))
    for entry in listed.entries:
        name = entry.path.split("/")[0]
        node = getattr(small(spec), name).weight
        arrays = [node.codes, node.scale, getattr(node, "zero", None)]
        kept = sum(a.size * a.dtype.itemsize for a in arrays if a is not None)
        assert entry.nbytes == kept + 4 * LAYERS
        assert entry.scheme.endswith("a8 static")
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, small(spec))
    file.seek(0)
    like = eqx.filter_eval_shape(
        lambda model: quantize(model, rules(spec), calibration=found())[0], stack()
    )
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), small(spec))
    compiled = eqx.filter_jit(
        lambda model, found: quantize(model, rules(spec), calibration=found)[0]
    )
    assert eqx.tree_equal(compiled(stack(), found()), small(spec))


def test_adapters_go_on_top_and_come_off():
    spec = SPECS[0]
    adapted, _ = lora(small(spec), [Rule(".*weight", LoRA(2))], key=jax.random.key(0))
    x = random((2, 5, D), 7)
    assert_close(
        scanned(adapted, x), loop(small(spec), x), dtype="float32", length=3 * FF
    )
    assert eqx.tree_equal(merge(adapted, requantize=True), small(spec))


def test_a_layer_with_a_norm_of_its_own_and_a_share_of_rounding():
    """`BitNet158` before it is in training by itself."""
    layer = filled(BitNet158, 5, 3, use_quantization=False, seed=0, size=1.0)
    x, spec = random((6, 5)), Affine(8, activations=STATIC)
    seen = calibrate(layer, lambda m, x: m(x), [x], ["weight"], range="mse")
    packed, _ = quantize(layer, [Rule("weight", spec)], calibration=seen)
    step = wide(seen.steps["weight"])
    inside, _ = oracle.round_by_one_step(layer.norm(x), step)
    want = inside @ wide(packed.weight.dense()).T
    assert_close(packed(x), want, dtype="float32", length=5)
    half, _ = prepare_qat(layer, [Rule("weight", spec)], calibration=seen)
    half = eqx.tree_at(lambda m: m.warmup, half, 0.5)
    weight = (wide(layer.weight) + wide(packed.weight.dense())) / 2
    want = (inside + wide(layer.norm(x))) / 2 @ weight.T
    assert_close(half(x), want, dtype="float32", length=5)


@pytest.mark.errors
def test_what_a_calibration_lacks():
    model, spec = stack(), SPECS[0]
    steps: Any = found().steps
    for make in (quantize, prepare_qat):
        name = make.__name__
        with refused(name, "up_proj/weight", "static_int8", "Call `calibrate("):
            make(model, rules(spec))
        with refused(name, "`calibration`", "no rule asks"):
            make(model, rules(Affine(8, activations="int8")), calibration=found())
        with refused(name, "`calibration`", "no rule asks"):
            make(model, rules(NM(1, 2)), calibration=found())
        with refused(name, "`calibration`", "`calibrate` returns"):
            make(model, rules(spec), calibration=steps)
        with refused(name, "'up_proj/weight'", "(3,)", "before the model was stacked"):
            one = calibrate(
                one_of(0), lambda m, x: m(x), [random((5, D))], [".*weight"]
            )
            make(model, rules(spec), calibration=one)
        with refused(name, "'layers/0/weight'", "no range", "'down_proj/weight'"):
            other = filled(eqx.nn.MLP, D, D, 3, 1, seed=0, size=1.0)
            make(other, rules(spec), calibration=found())


@pytest.mark.errors
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_a_range_that_is_none(wrong):
    ranges = {path: x.at[1].set(wrong) for path, x in found().ranges.items()}
    broken = Calibration(ranges, found().histograms, found().tokens)
    with refused("quantize", "'up_proj/weight'", "finite", "Call `calibrate` again"):
        quantize(stack(), rules(SPECS[0]), calibration=broken)


@pytest.mark.errors
def test_layers_that_round_no_inputs_and_weights_that_saw_none():
    spec = SPECS[0]
    table = filled(eqx.nn.Embedding, 5, 3, seed=0, size=1.0)
    seen = calibrate(
        table, lambda m, i: jax.vmap(m)(i) * 1.0, [jnp.arange(3)], ["weight"]
    )
    with refused("quantize", "'weight'", "no input reached it"):
        quantize(table, rules(spec), calibration=seen)
    conv = filled(eqx.nn.Conv1d, 2, 3, 3, seed=0, size=1.0)
    with refused("'weight'", "Conv1d", "Leave `activations` out"):
        quantize(conv, rules(spec), calibration=found())
    experts = filled(MoE, 3, 4, 2, 5, seed=0, size=1.0)
    seen = calibrate(experts, lambda m, x: m(x)[0], [random((9, 3))], ["up"])
    with refused("'up'", "MoE", "Leave `activations` out"):
        quantize(experts, [Rule("up", spec)], calibration=seen)
    stats = collect_hessian(
        one_of(0), lambda m, x: m(x), [random((5, D))], rules(Affine(4))
    )
    with refused("gptq", "'up_proj/weight'", "calibrate", "'int8'"):
        gptq(one_of(0), stats, rules(spec))


def test_a_calibration_may_know_more_than_is_asked_for():
    mixed = [Rule("up.*weight", SPECS[0]), Rule("down.*weight", Ternary())]
    model, _ = quantize(stack(), mixed, calibration=found())
    assert isinstance(model.up_proj.weight, AffineArray)
    assert model.up_proj.weight.input_scale is not None
    assert model.down_proj.weight.input_scale is None
