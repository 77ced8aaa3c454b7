"""The mixture of experts against that of transformers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import assert_close

from capibara_eqx.layers import MoE


@pytest.mark.slow
def test_the_block_of_mixtral():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    mixtral = transformers.models.mixtral.modeling_mixtral
    config = transformers.MixtralConfig(
        hidden_size=6,
        intermediate_size=5,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
        vocab_size=2,
        router_jitter_noise=0.0,
    )
    block = mixtral.MixtralSparseMoeBlock(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in block.parameters():
            values = 0.5 * rng.standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    layer = MoE(6, 4, 2, 5, key=jax.random.key(0))
    gate, up = np.split(block.experts.gate_up_proj.detach().numpy(), 2, axis=1)
    own = [block.gate.weight.detach().numpy(), gate, up]
    own = [jnp.asarray(x) for x in [*own, block.experts.down_proj.detach().numpy()]]
    layer = eqx.tree_at(lambda m: [m.router.weight, m.gate, m.up, m.down], layer, own)
    x = rng.standard_normal((2, 7, 6)).astype("float32")
    with torch.no_grad():
        want = block(torch.from_numpy(x))
    want = want[0] if isinstance(want, tuple) else want
    assert_close(layer(jnp.asarray(x))[0], want.numpy(), dtype="float32", length=12)
