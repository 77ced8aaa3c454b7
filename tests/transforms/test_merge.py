"""Adapters added to their weights, and taken out again."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_oracle import adapter_of, whole
from support.tolerances import as_wide, assert_close

from capibara_eqx.arrays import Affine, LoRA, LoRAArray, Ternary, as_array, compress
from capibara_eqx.layers import Linear
from capibara_eqx.transforms import Rule, lora, merge, prepare_qat, report, unmerge


pytestmark = pytest.mark.slow


KEY = jax.random.key(0)
seeds = st.integers(0, 2**16)
SPECS = [LoRA(2, alpha=3), LoRA(2, rs=True, dora=True)]
# Under the adapter: nothing, or these.
FORMS = [None, Affine(4), Affine(3, group_size=3, symmetric=False), Ternary()]
SHAPE = (5, 7)


def normal(rng, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), "float32")


def layer_of(spec: LoRA, form: Any, seed: int, size: float = 0.5) -> Any:
    """A layer whose weight has an adapter that is zero nowhere."""
    rng = np.random.default_rng(seed)
    out, width = SHAPE
    base = normal(rng, out, width)
    node = LoRAArray(
        base=base if form is None else compress_(base, form),
        a=normal(rng, spec.rank, width),
        b=size * normal(rng, out, spec.rank),
        magnitude=1 + jnp.abs(normal(rng, out)) if spec.dora else None,
        spec=spec,
    )
    return eqx.tree_at(lambda layer: layer.weight, LINEAR, node)


LINEAR = jax.tree.map(
    lambda leaf: jnp.ones(leaf.shape),
    eqx.filter(
        eqx.filter_eval_shape(lambda: Linear(7, 5, key=KEY)),
        lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
    ),
)
compress_ = eqx.filter_jit(compress)
merged_ = eqx.filter_jit(merge)
unmerged_ = eqx.filter_jit(unmerge)


@settings(max_examples=50)
@given(spec=st.sampled_from(SPECS), form=st.sampled_from(FORMS), seed=seeds)
def test_merged_weights_are_plain_and_those_of_the_loop(spec, form, seed):
    layer = layer_of(spec, form, seed)
    merged = merged_(layer)
    assert jax.tree.structure(merged) == jax.tree.structure(LINEAR)
    want = whole(adapter_of(layer.weight))
    assert_close(merged.weight, want, dtype="float32", length=8)


@settings(max_examples=50)
@given(spec=st.sampled_from(SPECS), form=st.sampled_from(FORMS), seed=seeds)
def test_unmerge_undoes_merge(spec, form, seed):
    layer = layer_of(spec, form, seed)
    again = unmerged_(merged_(layer), layer)
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    want = as_wide(as_array(layer.weight.base))
    got = as_array(again.weight.base)
    terms = float(np.max(np.abs(whole(adapter_of(layer.weight)) - want)))
    if isinstance(form, Ternary):
        # The scale is measured again, of the same codes.
        assert_close(got, want, dtype="float32", length=35, terms=terms)
    elif form is None:
        assert_close(got, want, dtype="float32", length=8, terms=terms + 1)
    else:
        assert eqx.tree_equal(again.weight.base, layer.weight.base)
    assert eqx.tree_equal(again.weight.adapter, layer.weight.adapter)


@settings(max_examples=50)
@given(seed=seeds)
def test_what_a_merged_model_learns_stays_after_unmerge(seed):
    layer = layer_of(SPECS[0], None, seed)
    change = normal(np.random.default_rng(seed + 1), *SHAPE)
    merged = eqx.tree_at(
        lambda m: (m.weight, m.bias), merged_(layer), replace_fn=lambda leaf: leaf + 1
    )
    merged = eqx.tree_at(lambda m: m.weight, merged, merged.weight - 1 + change)
    again = unmerged_(merged, layer)
    want = as_wide(layer.weight.base) + as_wide(change)
    assert_close(again.weight.base, want, dtype="float32", length=8, terms=4)
    np.testing.assert_array_equal(again.bias, merged.bias)


@settings(max_examples=50)
@given(seed=seeds)
def test_a_small_update_is_lost_in_four_bits_and_kept_in_plain_weights(seed):
    """Three per cent of the weight: below half of a step of nearly all of them."""
    rng = np.random.default_rng(seed)
    weight = normal(rng, 64, 64)
    a, b = normal(rng, 2, 64), normal(rng, 64, 2)
    update = as_wide(b) @ as_wide(a)
    b = b * float(0.03 * np.linalg.norm(weight) / np.linalg.norm(update))
    base = compress_(weight, Affine(4))
    node = LoRAArray(base, a, b, LoRA(2))
    update = as_wide(node.update())
    start = as_wide(dense(base))

    def kept(merged) -> float:
        """How much of the update the merged weight holds, along it."""
        change = as_wide(dense(merged)) - start
        return float(np.sum(change * update) / np.sum(update**2))

    assert kept(merged_([node])[0]) > 1 - 1e-4
    assert abs(kept(requantized([node])[0])) < 0.25


dense = eqx.filter_jit(as_array)
requantized = eqx.filter_jit(lambda model: merge(model, requantize=True))


def test_requantized_weights_keep_form_and_steps():
    for form in FORMS[1:]:
        layer = layer_of(LoRA(2), form, 0)
        small = requantized(layer)
        assert type(small.weight) is type(layer.weight.base)
        assert small.weight.spec == form
        unchanged = layer_of(LoRA(2), form, 0, size=0.0)
        same = requantized(unchanged).weight
        assert np.array_equal(same.codes, unchanged.weight.base.codes)
    assert type(requantized(layer_of(LoRA(2), None, 0)).weight) is not LoRAArray


def test_fake_codes_are_trained_on_after_a_merge():
    layer, _ = prepare_qat(layer_of(LoRA(2), None, 0), [Rule("weight", Affine(4))])
    scheme = report(requantized(layer)).entries[0].scheme
    assert scheme == "fake int4"
    assert not report(merged_(layer)).entries


def test_rows_of_no_length_come_back():
    """DoRA with m = 0 makes a row zero, which says nothing of what it was."""
    layer = layer_of(SPECS[1], None, 0)
    node = layer.weight
    magnitude = node.magnitude.at[1].set(0)
    layer = eqx.tree_at(lambda m: m.weight.magnitude, layer, magnitude)
    merged = merged_(layer)
    np.testing.assert_array_equal(merged.weight[1], 0)
    again = unmerged_(merged, layer)
    assert_close(again.weight.base, node.base, dtype="float32", length=8, terms=4)


def test_convolutions_are_restored():
    conv = eqx.nn.Conv1d(2, 4, 3, key=KEY)
    adapted, _ = lora(conv, [Rule("weight", LoRA(2))], key=KEY)
    b = normal(np.random.default_rng(0), 4, 2)
    adapted = eqx.tree_at(lambda m: m.matrix.b, adapted, b)
    merged = merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(conv)
    want = whole(adapter_of(adapted.matrix)).reshape(4, 2, 3)
    assert_close(merged.weight, want, dtype="float32", length=4)
    again = unmerge(merged, adapted)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert_close(again.matrix.base, adapted.matrix.base, dtype="float32", terms=2)
