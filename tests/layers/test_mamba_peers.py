"""The Mamba layer against the one of transformers, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mamba_oracle import parameters
from support.model_oracle import moved
from support.tolerances import assert_close

from capibara_eqx.layers import Mamba


pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
modeling_mamba = pytest.importorskip(
    "transformers.models.mamba.modeling_mamba", reason="needs the extra `peers`"
)


def peer_of(layer, options):
    """A mixer of transformers that holds the parameters of `layer`."""
    config = modeling_mamba.MambaConfig(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        conv_kernel=layer.conv.kernel_size,
        expand=layer.d_inner // layer.d_model,
        time_step_rank=layer.dt_rank,
        use_bias=options.get("bias", False),
        use_conv_bias=options.get("conv_bias", True),
        hidden_act=options.get("activation", "silu"),
        num_hidden_layers=1,
    )
    mixer = modeling_mamba.MambaMixer(config, layer_idx=0)
    values = {
        name: torch.tensor(np.array(value)) for name, value in parameters(layer).items()
    }
    mixer.load_state_dict(values, strict=True)
    return mixer.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4},
        {"bias": True, "conv_bias": False},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_transformers(options):
    layer = moved(Mamba(8, **options, key=jax.random.key(0)), 0)
    x = np.random.default_rng(1).standard_normal((2, 37, 8)).astype("float32")

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2), layer(x)

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        layer, jnp.asarray(x)
    )
    peer = peer_of(layer, options)
    want = peer(torch.tensor(x))
    (want**2).sum().backward()
    assert_close(y, want.detach().numpy(), dtype="float32", length=37 * 16)
    wanted = dict(peer.named_parameters())
    for name, value in parameters(gradient).items():
        assert_close(
            value,
            wanted[name].grad.numpy(),
            dtype="float32",
            length=2 * 37 * 16,
            name=name,
        )


def test_a_loop_of_step_is_that_of_transformers():
    layer = moved(Mamba(8, key=jax.random.key(2)), 2)
    x = np.random.default_rng(3).standard_normal((2, 9, 8)).astype("float32")
    with torch.no_grad():
        want = peer_of(layer, {})(torch.tensor(x)).numpy()
    cache, step = layer.init_cache((2,)), jax.jit(lambda x, cache: layer.step(x, cache))
    for t in range(9):
        y, cache = step(jnp.asarray(x[:, t]), cache)
        assert_close(y, want[:, t], dtype="float32", length=9 * 16)
