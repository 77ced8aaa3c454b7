"""A layer with an adapter beside peft's, forward and backward."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import assert_close

from capibara_eqx.arrays import LoRA, LoRAArray


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="needs the extra `peers`")


@pytest.mark.parametrize("rs", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_values_and_gradients_are_those_of_peft(rs, dora):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5, bias=False))
    options = {"use_rslora": rs, "use_dora": dora}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **options)
    net = peft.get_peft_model(net, config)
    theirs = {
        name: parameter for name, parameter in net.named_parameters() if "lora_" in name
    }
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((4, 7)), rng.standard_normal((4, 5))
    y = net(torch.tensor(x, dtype=torch.float32))
    (y * torch.tensor(g, dtype=torch.float32)).sum().backward()

    parts = {"lora_A": "a", "lora_B": "b", "lora_magnitude": "magnitude"}
    found = {
        ours: next(p for name, p in theirs.items() if kind in name)
        for kind, ours in parts.items()
        if any(kind in name for name in theirs)
    }
    base = net.base_model.model[0].base_layer.weight
    arrays: dict[str, Any] = {
        name: jnp.asarray(p.detach().numpy()) for name, p in found.items()
    }
    spec = LoRA(3, alpha=5, rs=rs, dora=dora)
    node = LoRAArray(jnp.asarray(base.detach().numpy()), spec=spec, **arrays)
    inputs = jnp.asarray(x, "float32")
    assert_close(node.product(inputs), y.detach().numpy(), dtype="float32", length=16)

    @eqx.filter_jit
    @eqx.filter_grad
    def grads(node, x, g):
        return jnp.sum(g * node.product(x))

    ours = grads(node, inputs, jnp.asarray(g, "float32"))
    assert set(found) == {"a", "b"} | ({"magnitude"} if dora else set())
    for name, parameter in found.items():
        want = parameter.grad.numpy()
        got = getattr(ours, name)
        assert_close(got, want, dtype="float32", length=64, terms=1, name=name)
    assert jax.tree.leaves(ours.base)
