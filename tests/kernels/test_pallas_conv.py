"""The Pallas kernel of the depthwise convolution: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import numpy_oracles as oracles
from support.kernel_cases import cast, conv_arguments, rounded, smooth_loss, split_fixed
from support.precision import enable_x64
from support.tolerances import assert_close

from capibara_eqx.internal import accumulate
from capibara_eqx.kernels import causal_conv
from capibara_eqx.kernels._causal_conv.specs import BENCHMARK_SPECS, TEST_SPECS


PLATFORMS = {"pallas_gpu": "cuda"}
each = pytest.mark.parametrize("implementation", PLATFORMS)
DEPTHWISE = [
    spec
    for spec in (*TEST_SPECS, *BENCHMARK_SPECS)
    if spec.groups == spec.c_in == spec.c_out
]


def loss_of(implementation, fixed, **static):
    def loss(smooth):
        known = {name: jnp.asarray(values) for name, values in fixed.items()}
        results = causal_conv(
            **smooth, **known, **static, implementation=implementation
        )
        wide = [accumulate(x) for x in results]
        return smooth_loss(jnp, wide)

    return loss


@each
@pytest.mark.parametrize(
    ("batch", "seq", "channels", "width", "dilation", "activation"),
    [(2, 33, 6, 4, 1, "silu"), (1, 7, 3, 3, 3, None)],
)
def test_values_and_gradients(
    batch, seq, channels, width, dilation, activation, implementation
):
    static = {"groups": channels, "dilation": dilation}
    arguments = conv_arguments((batch,), seq, channels, channels, width, **static)
    smooth, fixed = split_fixed(arguments)
    inputs = cast(smooth, "float32")
    static = static | {"activation": activation}
    y, _ = jax.jit(
        functools.partial(causal_conv, **static, implementation=implementation)
    )(**inputs, **{name: jnp.asarray(v) for name, v in fixed.items()})
    want, _ = oracles.causal_conv(**rounded(inputs), **fixed, **static)
    assert_close(y, want, dtype="float32", length=width + 4, name="y")
    got = jax.jit(jax.grad(loss_of(implementation, fixed, **static)))(inputs)
    with enable_x64(True):
        exact = jax.grad(loss_of("reference", fixed, **static))(
            cast(rounded(inputs), "float64")
        )
        exact = {name: np.asarray(values) for name, values in exact.items()}
    for name, values in exact.items():
        length = batch * seq * width
        assert_close(got[name], values, dtype="float32", length=length, name=name)


@each
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", DEPTHWISE, ids=lambda spec: spec.name)
def test_a_gradient_lowers(spec, dtype, implementation):
    shapes = {
        "x": (spec.batch, spec.seq, spec.c_in),
        "weight": (spec.c_out, 1, spec.width),
        "bias": (spec.c_out,),
    }
    types = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()}
    loss = loss_of(
        implementation,
        {},
        groups=spec.groups,
        dilation=spec.dilation,
        activation="silu",
    )
    exported = export.export(
        jax.jit(jax.value_and_grad(loss)), platforms=[PLATFORMS[implementation]]
    )(types)
    assert exported.mlir_module().count("mosaic") >= 2
