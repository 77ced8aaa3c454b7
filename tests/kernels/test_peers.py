"""The kernels against the implementations of Hugging Face and PyTorch, in float32.

Needs the extra `peers`. Hugging Face scans in float32 and from a zero state.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_cases import (
    IMPLEMENTATIONS,
    conv_arguments,
    scan_arguments,
    ssd_arguments,
)
from support.numpy_oracles import mamba_layer
from support.tolerances import assert_close

from capibara_eqx.kernels import causal_conv, selective_scan, ssd


torch = pytest.importorskip("torch", reason="needs the extra `peers`")
modeling_mamba = pytest.importorskip(
    "transformers.models.mamba.modeling_mamba", reason="needs the extra `peers`"
)
if not hasattr(modeling_mamba, "mamba_selective_scan"):
    pytest.skip(
        "this release of transformers has no `mamba_selective_scan`",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slow
scans = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["selective_scan"])
convolutions = pytest.mark.parametrize("implementation", IMPLEMENTATIONS["causal_conv"])


def tensors(arguments, channels_first):
    """Torch float32 tensors, `(batch, channels, seq)` for the names given."""
    return {
        name: torch.tensor(
            np.swapaxes(values, -1, -2) if name in channels_first else values,
            dtype=torch.float32,
        )
        for name, values in arguments.items()
    }


def arrays(arguments) -> dict[str, Any]:
    return {name: jnp.asarray(values, "float32") for name, values in arguments.items()}


@scans
@pytest.mark.parametrize("options", [("D",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("seq", [1, 7, 65])
def test_selective_scan_of_transformers(seq, options, implementation):
    arguments = scan_arguments((2,), seq, 5, 16, options=options)
    theirs = tensors(arguments, ("u", "delta", "B", "C", "z"))
    first = [theirs.pop(name) for name in ("u", "delta")]
    want_y, want_state = modeling_mamba.mamba_selective_scan(
        *first, **theirs, delta_softplus=True, return_last_state=True
    )
    y, final_state = selective_scan(
        **arrays(arguments), delta_softplus=True, implementation=implementation
    )
    # Both sides round in float32, so the difference may be twice the tolerance.
    want_y = np.swapaxes(want_y.numpy(), -1, -2)
    assert_close(y, want_y, dtype=np.float32, length=seq + 16, factor=16)
    assert_close(
        final_state, want_state.numpy(), dtype=np.float32, length=seq, factor=16
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS["ssd"])
@pytest.mark.parametrize("options", [(), ("initial_state",)], ids=str)
def test_ssd_of_transformers(options, implementation):
    modeling_mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    names = ("coefficient", *options)
    arguments = ssd_arguments((2,), 21, 6, 4, 2, 5, options=names)
    A = -np.arange(1.0, 7.0)
    dt = np.abs(arguments["coefficient"])
    arguments |= {"coefficient": dt, "log_decay": dt * A}
    theirs = tensors(arguments, ())
    want_y, want_state = modeling_mamba2.mamba2_chunk_scan(
        theirs["x"],
        theirs["coefficient"],
        torch.tensor(A, dtype=torch.float32),
        theirs["B"],
        theirs["C"],
        chunk_size=8,
        initial_states=theirs.get("initial_state"),
        return_final_states=True,
    )
    y, final_state = ssd(**arrays(arguments), implementation=implementation)
    # Both sides round in float32, so the difference may be twice the tolerance.
    assert_close(y, want_y.numpy(), dtype=np.float32, length=26, factor=16)
    assert_close(
        final_state, want_state.numpy(), dtype=np.float32, length=21, factor=16
    )


@convolutions
def test_causal_conv_of_transformers(implementation):
    arguments = conv_arguments((2,), 33, 5, 5, 4, groups=5, options=("bias",))
    theirs = tensors(arguments, ("x",))
    theirs["weight"] = theirs["weight"][:, 0]
    want = modeling_mamba.causal_conv1d_fn(theirs.pop("x"), **theirs)
    y, _ = causal_conv(**arrays(arguments), groups=5, implementation=implementation)
    want = np.swapaxes(want.numpy(), -1, -2)
    assert_close(y, want, dtype=np.float32, length=5, factor=16)


@convolutions
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (2, 3), (4, 2)])
def test_causal_conv_of_torch(groups, dilation, implementation):
    arguments = conv_arguments((2,), 33, 4, 8, 3, groups=groups, options=("bias",))
    theirs = tensors(arguments, ("x",))
    padded = torch.nn.functional.pad(theirs["x"], (2 * dilation, 0))
    want = torch.nn.functional.conv1d(
        padded, theirs["weight"], theirs["bias"], dilation=dilation, groups=groups
    )
    y, _ = causal_conv(
        **arrays(arguments),
        groups=groups,
        dilation=dilation,
        implementation=implementation,
    )
    want = np.swapaxes(want.numpy(), -1, -2)
    assert_close(y, want, dtype=np.float32, length=13, factor=16)


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_mamba_oracle_is_the_layer_of_transformers(use_bias):
    config = modeling_mamba.MambaConfig(
        hidden_size=6,
        state_size=3,
        conv_kernel=4,
        expand=2,
        time_step_rank=2,
        use_bias=use_bias,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    mixer = modeling_mamba.MambaMixer(config, layer_idx=0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    params = {n: value.numpy() for n, value in mixer.state_dict().items()}
    x = np.random.default_rng(0).standard_normal((2, 9, 6))
    with torch.no_grad():
        want = mixer(torch.tensor(x, dtype=torch.float32)).numpy()
    got = mamba_layer(params, x.astype(np.float32))
    assert_close(want, got, dtype=np.float32, length=32)
