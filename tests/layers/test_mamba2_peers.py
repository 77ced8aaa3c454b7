"""The Mamba-2 layer against the one of transformers, with the same parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mamba2_oracle import parameters
from support.model_oracle import moved
from support.tolerances import assert_close

from capibara_eqx.layers import Mamba2


pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
modeling_mamba2 = pytest.importorskip(
    "transformers.models.mamba2.modeling_mamba2", reason="needs the extra `peers`"
)
OPTIONS: dict[str, Any] = {"d_state": 5, "head_dim": 4}


def peer_of(layer):
    """A mixer of transformers that holds the parameters of `layer`."""
    config = modeling_mamba2.Mamba2Config(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        conv_kernel=layer.conv.kernel_size,
        expand=layer.d_inner // layer.d_model,
        head_dim=layer.head_dim,
        num_heads=layer.n_heads,
        n_groups=layer.n_groups,
        time_step_limit=layer.dt_limit,
        use_bias=layer.in_proj.bias is not None,
        use_conv_bias=layer.conv.bias is not None,
        hidden_act="silu",
        chunk_size=8,
        num_hidden_layers=1,
    )
    mixer = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
    values = {
        name: torch.tensor(np.array(value)) for name, value in parameters(layer).items()
    }
    mixer.load_state_dict(values, strict=True)
    return mixer.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_groups": 2, "d_conv": 3, "expand": 3, "dt_limit": (0.01, 0.05)},
        {"bias": True, "conv_bias": False},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_transformers(options):
    layer = moved(Mamba2(8, **OPTIONS | options, key=jax.random.key(0)), 0)
    x = np.random.default_rng(1).standard_normal((2, 37, 8)).astype("float32")

    def loss(layer, x):
        return jnp.sum(layer(x) ** 2), layer(x)

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        layer, jnp.asarray(x)
    )
    peer = peer_of(layer)
    want = peer(torch.tensor(x))
    (want**2).sum().backward()
    assert_close(y, want.detach().numpy(), dtype="float32", length=37 * 16)
    wanted = dict(peer.named_parameters())
    for name, value in parameters(gradient).items():
        got = wanted[name].grad.numpy()
        assert_close(value, got, dtype="float32", length=2 * 37 * 16, name=name)


def test_a_loop_of_step_is_that_of_transformers():
    layer = moved(Mamba2(8, **OPTIONS, key=jax.random.key(2)), 2)
    x = np.random.default_rng(3).standard_normal((2, 9, 8)).astype("float32")
    with torch.no_grad():
        want = peer_of(layer)(torch.tensor(x)).numpy()
    cache, step = layer.init_cache((2,)), jax.jit(lambda x, cache: layer.step(x, cache))
    for t in range(9):
        y, cache = step(jnp.asarray(x[:, t]), cache)
        assert_close(y, want[:, t], dtype="float32", length=9 * 16)
