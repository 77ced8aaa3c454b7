"""The fused kernels, behind the signature that all implementations share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from .. import _backends
from . import xla
from ._decode import Packing
from ._operands import Operands


_PACKAGE = __name__.rpartition(".")[0]
NAMES = ("cpu", "pallas_tpu", "pallas_gpu")


def implementation(name: str | None) -> Callable[..., Any]:
    """The kernel `name`, or with `None` that of the platform that is lowered for."""
    return functools.partial(quant_matmul, name)


def quant_matmul(
    name: str | None, operands: Operands, packing: Packing, activations: str | None
) -> Float[Array, "tokens out"]:
    """`kernels.quant_matmul` by a fused kernel.

    **Raises:**

    `NotImplementedError` with the reason if the kernel cannot serve: the one called
    `name`, or the own one of the platform that jax runs on.
    """
    own = _backends.serving(NAMES, name)

    def refusal(module):
        return module.refusal(operands, packing, activations)

    _backends.require(_PACKAGE, own, operands.x, refusal)
    return _batched(functools.partial(_run, own, name, packing, activations))(operands)


def _run(own, name, packing, activations, operands):
    """The kernel where it runs; elsewhere its interpreter, or without a name XLA."""
    module = _backends.load(_PACKAGE, own)
    forward = functools.partial(
        module.forward, packing=packing, activations=activations
    )
    by_name = {kernel: platform for platform, kernel in _backends.PLATFORMS.items()}
    branches = {by_name[own]: forward}
    if name is None:
        branches["default"] = functools.partial(
            xla.quant_matmul, packing=packing, activations=activations
        )
    elif own != "cpu":
        # Step by step: slow, for tests.
        branches["cpu"] = functools.partial(forward, interpret=True)
    return jax.lax.platform_dependent(operands, **branches)


def _batched(run: Callable[[Operands], Any]) -> Callable[[Operands], Any]:
    """`run`, for which batches of tokens are more tokens, of matrices a loop."""

    @custom_vmap
    def call(operands):
        return run(operands)

    @call.def_vmap
    def _(size, is_batched, operands):
        (batched,) = is_batched
        if not any(jax.tree.leaves(batched._replace(x=False))):
            tokens, width = operands.x.shape[1:]
            flat = operands._replace(x=operands.x.reshape(size * tokens, width))
            y = call(flat)
            return y.reshape(size, tokens, y.shape[-1]), True

        def one(index):
            return call(
                jax.tree.map(lambda x, own: x[index] if own else x, operands, batched)
            )

        return jax.lax.map(one, jnp.arange(size)), True

    return call
