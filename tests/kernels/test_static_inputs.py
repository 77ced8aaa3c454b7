"""Tokens that one given step rounds: values, derivatives, what is clipped, peers.

The products themselves are among the cases of `test_quant_matmul`.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import packed_oracle as oracle
from support.derivatives import quick_jit
from support.packed_cases import arguments, compiled, narrow, run
from support.tolerances import EPSILONS, assert_close

from capibara_eqx.kernels import pack_codes, quant_matmul, round_tokens
from capibara_eqx.kernels._quant_matmul.specs import TEST_SPECS, Spec


BY_NAME = {spec.name: spec for spec in TEST_SPECS}
STATIC = BY_NAME["int4_groups_zero_static"]
seeds = st.integers(0, 2**32 - 1)
rounded = jax.jit(round_tokens)


@jax.jit
def rate(x, step):
    """What rounding makes of ones: the derivative, in `x` and in `step`."""
    tangents = jnp.ones_like(x), jnp.ones_like(step)
    return jax.jvp(round_tokens, (x, step), tangents)[1]


@settings(max_examples=60)
@given(seed=seeds, exponent=st.integers(-60, 60), share=st.floats(0.05, 3))
def test_tokens_are_rounded_and_clipped(seed, exponent, share):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.standard_normal((3, 5)) * 2.0**exponent)
    step = np.float32(share * np.max(np.abs(x)) / 127)
    got = np.asarray(rounded(x, step), np.float64)
    want, inside = oracle.round_by_one_step(x, step)
    # The inverse of the step and the product are rounded: near a tie another code.
    near = 127 * 4 * EPSILONS["float32"]
    steps = np.float64(x) / np.float64(step)
    tie = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < near * np.maximum(
        1, np.abs(steps) / 127
    )
    assert np.all(np.abs(got - want)[~tie] <= EPSILONS["float32"] * np.abs(want)[~tie])
    assert np.all(np.abs(got - want)[tie] <= 1.001 * step)
    np.testing.assert_array_equal(rounded(-x, step), -got)
    np.testing.assert_array_equal(rounded(4 * x, 4 * step), 4 * got)
    # A derivative in what is within, and none in the step.
    np.testing.assert_array_equal(np.asarray(rate(x, step))[~tie], inside[~tie])


def test_half_a_step_beyond_the_last_is_still_within():
    x = jnp.asarray([[126.4, 127.4, 127.6, -127.4, -127.6, jnp.inf, -jnp.inf]])
    step = jnp.asarray(1.0)
    want = [[126, 127, 127, -127, -127, 127, -127]]
    np.testing.assert_array_equal(rounded(x, step), want)
    np.testing.assert_array_equal(rate(x, step), [[1, 1, 0, 1, 0, 0, 0]])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_token_with_a_nan_is_lost_and_no_other(implementation):
    spec = BY_NAME["ternary_static"]
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    want = np.asarray(compiled(spec, implementation)(smooth, fixed))
    broken = smooth | {"x": smooth["x"].at[1, 3].set(jnp.nan)}
    y = np.asarray(compiled(spec, implementation)(broken, fixed))
    assert np.all(np.isnan(y[1]))
    np.testing.assert_array_equal(np.delete(y, 1, 0), np.delete(want, 1, 0))


def test_the_step_of_a_token_gives_what_it_would_find_itself():
    """Of one token at a time, where nothing is clipped, as `"int8"` rounds it."""
    spec = BY_NAME["int4_groups_zero_int8"]._replace(tokens=1)
    smooth, fixed = arguments(spec)
    smooth = narrow(smooth)
    want = compiled(spec)(smooth, fixed)
    step = np.float32(np.max(np.abs(smooth["x"])) / 127)
    given_step = fixed | {"input_scale": step}
    y = compiled(spec._replace(activations="static_int8"))(smooth, given_step)
    assert_close(y, want, dtype="float32", length=10, terms=2.0)


def test_every_step_of_a_batch_of_matrices():
    """`vmap` over matrices and their steps, or over either."""
    rows = [arguments(STATIC, seed=seed) for seed in range(3)]
    for i, (_, fixed) in enumerate(rows):
        fixed["input_scale"] = np.float32(fixed["input_scale"] * (1 + i))
    known = [narrow(smooth) | fixed for smooth, fixed in rows]
    names = set(known[0])

    def product(known):
        smooth = {name: known.pop(name) for name in ("x", "scale")}
        return run(STATIC, None, smooth, known)

    for own in (names, {"input_scale"}, names - {"input_scale"}, {"x"}):
        axes = ({name: 0 if name in own else None for name in names},)
        stacked = {
            name: np.stack([row[name] for row in known]) if name in own else value
            for name, value in known[0].items()
        }
        got = quick_jit(jax.vmap(product, in_axes=axes))(stacked)
        for i, row in enumerate(known):
            mixed = {name: (row if name in own else known[0])[name] for name in names}
            want = oracle.quant_matmul(
                **{name: np.asarray(value) for name, value in mixed.items()},
                bits=4,
                group_size=4,
                activations="static_int8",
            )
            assert_close(got[i], want, dtype="float32", length=10, terms=2.0)


def test_no_derivative_in_the_step_of_any_order():
    smooth, fixed = arguments(STATIC)
    smooth, step = narrow(smooth), jnp.asarray(fixed.pop("input_scale"))

    def slope(step):
        def loss(smooth):
            y = run(STATIC, None, smooth, fixed | {"input_scale": step})
            return jnp.sum(jnp.sin(y))

        gradient = jax.grad(loss)(smooth)
        return loss(smooth) + sum(jnp.sum(x**2) for x in gradient.values())

    assert quick_jit(jax.grad(slope))(step) == 0


def test_whole_numbers_of_torch():
    """Codes by torch's rounding, sums by its product of bytes, derivatives by its."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch = pytest.importorskip("torch", reason="needs the extra `peers`")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 40)).astype(np.float32)
    codes = rng.integers(-127, 128, (24, 40)).astype(np.int8)
    scale = rng.uniform(0.5, 1.5, (24, 1)).astype(np.float32)
    step = np.float32(2 / 127)
    tokens = torch.tensor(x, requires_grad=True)
    seen = torch.fake_quantize_per_tensor_affine(tokens, float(step), 0, -127, 127)
    of_tokens = torch.round(seen.detach() / float(step)).to(torch.int8)
    sums = torch._int_mm(of_tokens, torch.tensor(codes).T.contiguous())
    want = sums.double().numpy() * step * scale.T
    assert np.any(np.abs(of_tokens.numpy()) == 127)
    packed = pack_codes(jnp.asarray(codes.astype(np.int16) + 128, jnp.uint8), 8)
    product = functools.partial(
        quant_matmul,
        codes=packed,
        scale=jnp.asarray(scale),
        bits=8,
        activations="static_int8",
        input_scale=jnp.asarray(step),
    )
    y, pull = jax.vjp(product, jnp.asarray(x))
    # Sums are exact: a few roundings of the result itself.
    assert np.all(np.abs(y - want) <= 4 * EPSILONS["float32"] * np.abs(want))
    cotangent = rng.standard_normal(y.shape).astype(np.float32)
    seen.backward(
        torch.tensor(cotangent) @ torch.tensor(codes.astype(np.float32) * scale)
    )
    assert_close(
        pull(jnp.asarray(cotangent))[0], tokens.grad, dtype="float32", length=24
    )
    assert np.any(tokens.grad.numpy() == 0)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("activations", "step", "words"),
    [
        ("static_int8", None, ["`input_scale`", "static_int8", "none"]),
        ("int8", jnp.ones(()), ["`input_scale`", "'int8'", "shape ()"]),
        (None, jnp.ones(()), ["`input_scale`", "None"]),
        ("static_int8", jnp.ones(3), ["`input_scale`", "one step", "(3,)"]),
    ],
)
def test_a_step_too_many_or_too_few(activations, step, words):
    x, codes, scale = jnp.ones((3, 4)), jnp.ones((2, 1), jnp.uint8), jnp.ones((2, 1))
    with pytest.raises(ValueError, match="quant_matmul") as caught:
        quant_matmul(x, codes, scale, bits=2, activations=activations, input_scale=step)
    for word in words:
        assert word in str(caught.value)


def test_the_longest_sum_is_that_of_int8():
    size = 2**31 // (127 * 255) + 1
    spec = Spec("long", 1, size, 1, 8, activations="static_int8")
    fixed = {"codes": jnp.ones((1, size), jnp.uint8), "input_scale": jnp.ones(())}
    with pytest.raises(ValueError, match="static_int8.*takes up to"):
        run(spec, None, {"x": jnp.ones((1, size)), "scale": jnp.ones((1, 1))}, fixed)
