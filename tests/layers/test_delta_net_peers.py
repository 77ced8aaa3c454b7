"""Gated DeltaNet against the one of transformers, with the same parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.fast_weight_oracle import parameters
from support.quick import filled
from support.tolerances import assert_close

from capibara_eqx.layers import DeltaNet


pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
qwen = pytest.importorskip(
    "transformers.models.qwen3_next.modeling_qwen3_next",
    reason="needs the extra `peers`",
)
EPS = 1e-3


def peer_of(layer):
    """A layer of transformers that holds the parameters of `layer`."""
    config = qwen.Qwen3NextConfig(
        hidden_size=layer.d_model,
        linear_num_value_heads=layer.n_heads,
        linear_num_key_heads=layer.n_heads,
        linear_key_head_dim=layer.head_dim,
        linear_value_head_dim=layer.v_head_dim,
        linear_conv_kernel_dim=layer.conv.kernel_size,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        hidden_act="silu",
        rms_norm_eps=EPS,
    )
    peer = qwen.Qwen3NextGatedDeltaNet(config, 0)
    p = parameters(layer)

    def by_head(*names):
        """Rows of each head next to each other."""
        heads = [p[name].reshape(layer.n_heads, -1, layer.d_model) for name in names]
        return np.concatenate(heads, axis=1).reshape(-1, layer.d_model)

    values: dict[str, Any] = {
        "in_proj_qkvz.weight": by_head("q", "k", "v", "gate"),
        "in_proj_ba.weight": by_head("beta", "dt"),
        "conv1d.weight": p["conv"],
        "dt_bias": p["dt_bias"],
        "A_log": p["A_log"],
        "norm.weight": p["norm"],
        "out_proj.weight": p["o"],
    }
    values = {name: torch.tensor(np.array(value)) for name, value in values.items()}
    peer.load_state_dict(values, strict=True)
    return peer.eval()


@pytest.mark.parametrize("seq", [3, 70])
@pytest.mark.parametrize("v_head_dim", [3, 5])
def test_values_and_gradients_are_those_of_transformers(seq, v_head_dim):
    # There queries are divided by the root of their width, in front of the norm.
    layer = filled(
        DeltaNet,
        *(6, 2, 3, v_head_dim),
        gated=True,
        output_gate=True,
        norm_eps=3 * EPS,
        seed=0,
        size=0.7,
    )
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((2, 2, seq, 6)).astype("float32")
    got, back = jax.jit(lambda x: jax.vjp(layer, x))(jnp.asarray(x))
    inputs = torch.tensor(x, requires_grad=True)
    want = peer_of(layer)(inputs)
    assert_close(got, want.detach().numpy(), dtype="float32", length=1000)
    (want * torch.tensor(weights)).sum().backward()
    (slope,) = back(jnp.asarray(weights))
    assert_close(slope, inputs.grad.numpy(), dtype="float32", length=1000)
