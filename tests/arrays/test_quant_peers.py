"""Codes against torchao, PyTorch, transformers and quanto, in float32.

Needs torch and the libraries, each where it is there.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quant_cases import compiled, wide
from support.tolerances import assert_close

from capibara_eqx.arrays import Affine, FakeQuantArray, Ternary


os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch", reason="needs the extra `peers`")
pytestmark = pytest.mark.slow

OUT, IN, GROUP = 5, 12, 4


def weight_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)


def imported(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs the extra `peers`")


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("kind", ["full", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, GROUP])
def test_torchao(count, kind, group_size):
    primitives = imported("torchao.quantization.quant_primitives")
    weight = weight_of()
    symmetric = kind == "full"
    spec = Affine(
        count, symmetric, group_size=group_size, range="full" if symmetric else None
    )
    node = compiled()(jnp.asarray(weight), spec)
    low, high = spec.limits
    block = (1, group_size or IN)
    dtype = torch.int8 if symmetric else torch.uint8
    mapping = primitives.MappingType
    x = torch.tensor(weight)
    scale, zero = primitives.choose_qparams_affine(
        x,
        mapping.SYMMETRIC if symmetric else mapping.ASYMMETRIC,
        block,
        dtype,
        low,
        high,
        eps=1e-12,
        zero_point_dtype=torch.int32,
    )
    assert_close(node.scale, scale.reshape(node.scale.shape), dtype="float32")
    if not symmetric:
        np.testing.assert_array_equal(node.zero_points, zero.reshape(OUT, -1))
    codes = primitives.quantize_affine(x, block, scale, zero, dtype, low, high)
    want = primitives.dequantize_affine(codes, block, scale, zero, dtype, low, high)
    got, want = wide(node.dense()), wide(want.numpy())
    # The end of a full range is a tie: there either neighbour is as near.
    step = np.repeat(wide(node.scale), group_size or IN, axis=1)
    tie = np.abs(np.abs(weight) / step - (high + 0.5)) < 1e-4
    if kind == "full":
        assert tie.sum() == node.scale.size
        assert np.all(np.abs(got - want)[tie] <= step[tie] * (1 + 1e-5))
    else:
        tie = np.zeros_like(tie)
    assert_close(got[~tie], want[~tie], dtype="float32")


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_of_torch(symmetric):
    """Values, and gradients of what lies beyond the range."""
    weight = weight_of(1)
    spec = Affine(4, symmetric, calibration="percentile", percentile=80.0)
    packed = compiled()(jnp.asarray(weight), spec)
    fake = FakeQuantArray.of(jnp.asarray(weight), spec)
    x = torch.tensor(weight, requires_grad=True)
    zero = packed.zero_points
    zero = np.zeros((OUT, 1)) if zero is None else np.asarray(zero)
    want = torch.fake_quantize_per_channel_affine(
        x,
        torch.tensor(np.asarray(packed.scale)[:, 0]),
        torch.tensor(zero[:, 0].astype(np.int32)),
        0,
        *spec.limits,
    )
    cotangent = weight_of(2)
    want.backward(torch.tensor(cotangent))
    got, pull = jax.vjp(lambda w: FakeQuantArray.of(w, spec).dense(), fake.weight)
    assert_close(got, want.detach(), dtype="float32")
    assert_close(pull(jnp.asarray(cotangent))[0], x.grad, dtype="float32")
    beyond = np.mean(wide(x.grad) == 0)
    # A fifth of the sizes, or a fifth at each end.
    assert 0.1 < beyond < 0.41


def test_bitnet_of_transformers():
    bitnet = imported("transformers.integrations.bitnet")
    weight, x, g = weight_of(), weight_of(3), weight_of(4)[:, :OUT]
    other, tokens = [torch.tensor(a, requires_grad=True) for a in (weight, x)]
    rounded = bitnet.WeightQuant.apply(other)
    want = bitnet.ActQuant.apply(tokens) @ rounded.T
    want.backward(torch.tensor(g))
    fake = FakeQuantArray.of(jnp.asarray(weight), Ternary(activations="int8"))
    assert_close(fake.dense(), rounded.detach(), dtype="float32", length=OUT * IN)

    def product(w, x):
        return FakeQuantArray.of(w, fake.spec).product(x)

    got, pull = jax.vjp(product, fake.weight, jnp.asarray(x))
    assert_close(got, want.detach(), dtype="float32", length=OUT * IN)
    for ours, theirs in zip(pull(jnp.asarray(g)), (other, tokens), strict=True):
        assert_close(ours, theirs.grad, dtype="float32", length=OUT * IN)


def test_narrow_codes_of_quanto():
    quanto = imported("optimum.quanto")
    weight = weight_of()
    layer = torch.nn.Linear(IN, OUT, bias=False)
    layer.weight.data = torch.tensor(weight)
    model = torch.nn.Sequential(layer)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    want = model[0].weight.dequantize().detach()
    got = compiled()(jnp.asarray(weight), Affine(8, range="narrow"))
    assert_close(got.dense(), want, dtype="float32")
