"""The fused scan as three primitives that are closed under differentiation.

- `forward_p`: the scan. Its tangent is
- `tangent_p`, linear in the tangents of the operands; the transpose of that is
- `backward_p`, linear in the cotangents of the results; the transpose of that is
  `tangent_p` again.

So the scan and its first reverse derivative run fused, by what the backend of the
platform offers, and everything else is differentiated as the plain XLA form: forward
mode, and whatever is differentiated a second time. All rules are exact at every order.
`saved` is a copy of what the operands already say, hence without a tangent.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from . import _backends, xla
from ._operands import Operands, saved_shape, spread


@dataclass(frozen=True)
class Setting:
    """What is fixed when the scan is traced; `tree` tells which operands there are."""

    tree: Any
    softplus: bool
    chunk: int
    implementation: str | None

    def operands(self, leaves: Sequence[Any]) -> Operands:
        return jax.tree.unflatten(self.tree, leaves)

    @property
    def smooth(self) -> int:
        """How many operands can be differentiated; they come first."""
        operands = self.operands(range(self.tree.num_leaves))
        return self.tree.num_leaves - (operands.reset is not None)


def fused_scan(
    operands: Operands, softplus: bool, chunk: int, implementation: str | None
) -> tuple[Float[Array, "rows seq d_inner"], Float[Array, "rows d_inner d_state"]]:
    """The scan of all rows by a fused kernel, `(y, final_state)`.

    **Arguments:**

    - `operands`: whose types, inside `jax.shard_map`, vary along the same axes.
    - `softplus`: whether step sizes pass through softplus.
    - `chunk`: tokens between two saved states.
    - `implementation`: the kernel's name, `None` for that of the platform.
    """
    leaves, tree = jax.tree.flatten(operands)
    setting = Setting(tree, softplus, chunk, implementation)
    y, final_state = forward_p.bind(*leaves, setting=setting, save=False)
    return y, final_state


def _plain(setting: Setting, leaves: Sequence[Array]) -> Callable[..., Any]:
    """The XLA form as a function of the smooth operands."""
    fixed = leaves[setting.smooth :]
    return lambda *smooth: xla.scan_rows(
        setting.operands([*smooth, *fixed]), setting.softplus
    )


def _plain_tangents(setting, leaves, dots):
    smooth = leaves[: setting.smooth]
    return list(jax.jvp(_plain(setting, leaves), tuple(smooth), tuple(dots))[1])


def _plain_cotangents(setting, leaves, cotangents):
    """One entry a row, in the shapes of the results of `backward_p`."""
    of_rows = jax.tree.leaves(_one_group_a_row(setting.operands(leaves)))
    smooth = of_rows[: setting.smooth]
    _, pull = jax.vjp(_plain(setting, of_rows), *smooth)
    return _in_row_shapes(setting, leaves, pull(tuple(cotangents)))


def _in_row_shapes(setting, leaves, cotangents):
    rows = setting.operands(leaves).u.shape[0]
    return [
        x.reshape(_row_shape(leaf.shape, rows))
        for x, leaf in zip(cotangents, leaves[: setting.smooth], strict=True)
    ]


def _one_group_a_row(operands: Operands) -> Operands:
    rows = operands.u.shape[0]
    weights = {
        name: None if value is None else spread(value, rows)
        for name, value in (("A", operands.A), ("D", operands.D))
    }
    bias = operands.delta_bias
    return operands._replace(
        **weights, delta_bias=None if bias is None else spread(bias, rows)
    )


# Every result has three axes or more, so that its type can be made from that of `u`,
# which says along which axes of a mesh it varies.
def _like(u, shape, dtype):
    return u.update(shape=shape, dtype=dtype, weak_type=False)


def _forward_types(*leaves, setting, save):
    operands = setting.operands(leaves)
    u, A = operands.u, operands.A
    types = [
        _like(u, u.shape, u.dtype),
        _like(u, (u.shape[0], *A.shape[1:]), A.dtype),
    ]
    if save:
        types.append(_like(u, saved_shape(operands, setting.chunk), A.dtype))
    return types


def _tangent_types(*args, setting):
    leaves = args[: setting.tree.num_leaves]
    return _forward_types(*leaves, setting=setting, save=False)


def _backward_types(*args, setting):
    leaves = args[: setting.tree.num_leaves]
    u = setting.operands(leaves).u
    rows = u.shape[0]
    return [
        _like(u, _row_shape(x.shape, rows), x.dtype) for x in leaves[: setting.smooth]
    ]


def _row_shape(shape, rows):
    """Of a cotangent: vectors over channels get an axis of one."""
    return (rows, *shape[1:]) if len(shape) > 2 else (rows, 1, *shape[1:])


def _split(setting, args):
    """The operands, and what else a primitive takes."""
    count = setting.tree.num_leaves
    return list(args[:count]), list(args[count:])


# What the primitives do, by platform.


def _forward(platform, *leaves, setting, save):
    operands = setting.operands(leaves)
    backend = _backends.choose(
        platform, setting.implementation, operands, setting.chunk
    )
    if backend is None:
        results = xla.scan_rows(operands, setting.softplus)
        # The XLA form's backward pass keeps what it needs by itself.
        saved = jnp.zeros(saved_shape(operands, setting.chunk), operands.A.dtype)
        return [*results, saved] if save else list(results)
    results = backend.forward(operands, setting.softplus, setting.chunk, save)
    return list(results) if save else list(results[:2])


def _backward(platform, *args, setting):
    leaves, (saved, *cotangents) = _split(setting, args)
    operands = setting.operands(leaves)
    backend = _backends.choose(
        platform, setting.implementation, operands, setting.chunk
    )
    if backend is None:
        return _plain_cotangents(setting, leaves, cotangents)
    found = backend.backward(
        operands, saved, *cotangents, setting.softplus, setting.chunk
    )
    return _in_row_shapes(setting, leaves, jax.tree.leaves(found))


def _tangent(platform, *args, setting):
    del platform
    leaves, (_, *dots) = _split(setting, args)
    return _plain_tangents(setting, leaves, dots)


# Derivatives.


def _zero(tangent) -> bool:
    return type(tangent) is ad.Zero


def _forward_jvp(primals, tangents, *, setting, save):
    y, final_state, saved = forward_p.bind(*primals, setting=setting, save=True)
    dots = map(ad.instantiate_zeros, tangents[: setting.smooth])
    rates = tangent_p.bind(*primals, saved, *dots, setting=setting)
    if not save:
        return [y, final_state], rates
    return [y, final_state, saved], [*rates, ad.Zero(jax.typeof(saved))]


def _linear_jvp(primitive, plain):
    """The rule of a primitive that is linear in what comes after `saved`."""

    def rule(primals, tangents, *, setting):
        leaves, (saved, *linear) = _split(setting, primals)
        of_leaves, (_, *of_linear) = _split(setting, tangents)
        out = primitive.bind(*primals, setting=setting)
        of_linear = [ad.instantiate_zeros(t) for t in of_linear]
        if all(map(_zero, of_leaves)):
            return out, primitive.bind(*leaves, saved, *of_linear, setting=setting)
        count = setting.smooth
        of_smooth = [ad.instantiate_zeros(t) for t in of_leaves[:count]]

        def function(smooth, linear):
            return plain(setting, [*smooth, *leaves[count:]], linear)

        _, rates = jax.jvp(function, (leaves[:count], linear), (of_smooth, of_linear))
        return out, rates

    return rule


def _tangent_transpose(cotangents, *args, setting):
    leaves, (saved, *dots) = _split(setting, args)
    cotangents = map(ad.instantiate_zeros, cotangents)
    found = backward_p.bind(*leaves, saved, *cotangents, setting=setting)
    smooth = leaves[: setting.smooth]
    # Rows of one group share its weights.
    found = [
        jnp.sum(x.reshape(leaf.shape[0], -1, *leaf.shape[1:]), axis=1)
        for x, leaf in zip(found, smooth, strict=True)
    ]
    of_dots = [
        x if ad.is_undefined_primal(dot) else None
        for x, dot in zip(found, dots, strict=True)
    ]
    return [None] * (len(leaves) + 1) + of_dots


def _backward_transpose(cotangents, *args, setting):
    leaves, (saved, *linear) = _split(setting, args)
    operands = _one_group_a_row(setting.operands(leaves))
    leaves_of_rows = jax.tree.leaves(operands)
    dots = [
        ad.instantiate_zeros(c).reshape(leaf.shape)
        for c, leaf in zip(cotangents, leaves_of_rows[: setting.smooth], strict=True)
    ]
    found = tangent_p.bind(*leaves_of_rows, saved, *dots, setting=setting)
    of_linear = [
        x if ad.is_undefined_primal(v) else None
        for x, v in zip(found, linear, strict=True)
    ]
    return [None] * (len(leaves) + 1) + of_linear


# Batches become rows, and groups of rows where the weights differ.


def _batch(primitive, args, dims, *, setting, **params):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    weights = _weights(primitive, setting)
    apart = [d is not None for d, w in zip(dims, weights, strict=True) if w]
    groups = args[_A].shape[0] if dims[_A] is None else None
    # Weights of one group, in no batch, stay those of all rows.
    shared = groups == 1 and not any(apart)

    def flat(x, d, weight):
        if weight and shared:
            return x
        x = (
            jnp.broadcast_to(x, (size, *x.shape))
            if d is None
            else jnp.moveaxis(x, d, 0)
        )
        return x.reshape(size * x.shape[1], *x.shape[2:])

    flattened = map(flat, args, dims, weights)
    out = primitive.bind(*flattened, setting=setting, **params)
    split = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in out]
    return split, [0] * len(split)


# The position of `A`, which is always there.
_A = Operands._fields.index("A")


def _weights(primitive, setting):
    """Whether each argument of a primitive has one entry a group, not a row."""
    names = [
        name
        for name, leaf in setting.operands(range(setting.tree.num_leaves))
        ._asdict()
        .items()
        if leaf is not None
    ]
    kinds = [name in ("A", "D", "delta_bias") for name in names]
    if primitive is tangent_p:
        return [*kinds, False, *kinds[: setting.smooth]]
    return [*kinds, False, False, False] if primitive is backward_p else kinds


def _primitive(name, types, run, jvp, transpose=None):
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(types)

    @functools.lru_cache(maxsize=256)
    def compiled(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *args, **params: compiled(**params)(*args))
    ad.primitive_jvps[primitive] = jvp(primitive)
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    for platform in _backends.PLATFORMS:
        mlir.register_lowering(
            primitive, mlir.lower_fun(functools.partial(run, platform)), platform
        )
    mlir.register_lowering(primitive, mlir.lower_fun(functools.partial(run, None)))
    return primitive


forward_p = _primitive(
    "selective_scan_forward", _forward_types, _forward, lambda _: _forward_jvp
)
tangent_p = _primitive(
    "selective_scan_tangent",
    _tangent_types,
    _tangent,
    lambda p: _linear_jvp(p, _plain_tangents),
    _tangent_transpose,
)
backward_p = _primitive(
    "selective_scan_backward",
    _backward_types,
    _backward,
    lambda p: _linear_jvp(p, _plain_cotangents),
    _backward_transpose,
)
