"""Products of rows with the matrix of their group, closed under differentiation.

- `matmul`: row m times the matrix of its group, $y_m = W_{g(m)} a_m$.
- `outer`: its transpose in the matrices, $W_g = \\sum_{g(m) = g} a_m b_m^T$.

Both are linear in each of their two operands, and the transpose of either in either is
one of the two again, so derivatives of every order and mode are made of them. Rows come
in any order and a group outside the matrices gives zero, so that a batch is nothing but
more rows, and more groups where the matrices are batched too.

jax's own `ragged_dot` has no second derivative, and on a CPU it computes every row with
the matrices of all groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from ...internal import accumulator_dtype
from .._carry import alike
from . import _grouped_blocks, _grouped_ragged


def grouped_matmul(
    rows: Float[Array, "rows d_in"],
    stacked: Float[Array, "groups d_out d_in"],
    group: Int[Array, " rows"],
) -> Float[Array, "rows d_out"]:
    """Each row times the matrix of its group, zero for a group that is not there.

    **Arguments:**

    - `rows`, `stacked`: in one dtype.
    - `group`: of each row, in any order.

    **Returns:**

    The products, in float32 or wider.
    """
    rows, stacked, group = alike((rows, stacked, group.astype(jnp.int32)))
    # All operands have three axes, so that the type of each can be made from that of
    # another, which says along which axes of a mesh it varies.
    y = _matmul.bind(rows[:, None], stacked, group[:, None, None], flipped=False)
    return y[:, 0]


def _primitive(name, types, run, transpose, batch):
    primitive = Primitive(name)
    primitive.def_abstract_eval(types)

    @functools.lru_cache(maxsize=64)
    def compiled(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *args, **params: compiled(**params)(*args))
    ad.primitive_jvps[primitive] = functools.partial(_bilinear_jvp, primitive)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    for module, platform in ((_grouped_ragged, None), (_grouped_blocks, "cpu")):
        rule = mlir.lower_fun(functools.partial(run, module), multiple_results=False)
        mlir.register_lowering(primitive, rule, platform)
    return primitive


def _bilinear_jvp(primitive, primals, tangents, **params):
    left, right, group = primals
    left_dot, right_dot, _ = tangents
    y = primitive.bind(*primals, **params)
    terms = []
    if type(left_dot) is not ad.Zero:
        terms.append(primitive.bind(left_dot, right, group, **params))
    if type(right_dot) is not ad.Zero:
        terms.append(primitive.bind(left, right_dot, group, **params))
    if not terms:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, sum(terms[1:], start=terms[0])


def _wide(like: Any, shape: tuple[int, ...]) -> Any:
    dtype = accumulator_dtype(like.dtype)
    return like.update(shape=shape, dtype=dtype, weak_type=False)


def _undefined(x: Any) -> bool:
    return ad.is_undefined_primal(x)


# rows: (rows, 1, d_in); stacked: (groups, d_out, d_in), or (groups, d_in, d_out) if
# flipped; group: (rows, 1, 1).


def _matmul_types(rows, stacked, group, *, flipped):
    del group
    return _wide(rows, (rows.shape[0], 1, stacked.shape[2 if flipped else 1]))


def _run_matmul(module, rows, stacked, group, *, flipped):
    y = module.matmul(rows[:, 0], stacked, group[:, 0, 0], flipped)
    return y[:, None]


def _matmul_transpose(cotangent, rows, stacked, group, *, flipped):
    if type(cotangent) is ad.Zero:
        return None, None, None
    if _undefined(rows):
        dtype = rows.aval.dtype
        found = _matmul.bind(
            cotangent.astype(dtype), stacked, group, flipped=not flipped
        )
        return found.astype(dtype), None, None
    dtype = stacked.aval.dtype
    pair = (cotangent.astype(dtype), rows)
    pair = pair[::-1] if flipped else pair
    found = _outer.bind(*pair, group, groups=stacked.aval.shape[0])
    return None, found.astype(dtype), None


# left: (rows, 1, d_left); right: (rows, 1, d_right); group: (rows, 1, 1).


def _outer_types(left, right, group, *, groups):
    del group
    return _wide(left, (groups, left.shape[2], right.shape[2]))


def _run_outer(module, left, right, group, *, groups):
    return module.outer(left[:, 0], right[:, 0], group[:, 0, 0], groups)


def _outer_transpose(cotangent, left, right, group, *, groups):
    del groups
    if type(cotangent) is ad.Zero:
        return None, None, None
    if _undefined(left):
        dtype = left.aval.dtype
        stacked = cotangent.astype(dtype)
        found = _matmul.bind(right, stacked, group, flipped=False)
        return found.astype(dtype), None, None
    dtype = right.aval.dtype
    stacked = cotangent.astype(dtype)
    found = _matmul.bind(left, stacked, group, flipped=True)
    return None, found.astype(dtype), None


def _stack_rows(x, axis, size):
    """The rows of all entries of a batch one after the other."""
    if axis is None:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    else:
        x = jnp.moveaxis(x, axis, 0)
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _stack_groups(group, axis, size, groups):
    """`_stack_rows` of the groups, those of every entry apart from the others'."""
    stacked = _stack_rows(group, axis, size)
    entry = jnp.arange(size, dtype=group.dtype)
    entry = jnp.repeat(entry, stacked.shape[0] // size)[:, None, None]
    inside = (stacked >= 0) & (stacked < groups)
    return jnp.where(inside, stacked + groups * entry, -1)


def _size(args, axes):
    return next(x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None)


def _matmul_batch(args, axes, *, flipped):
    (rows, stacked, group), size = args, _size(args, axes)
    if axes[1] is None:
        group = _stack_rows(group, axes[2], size)
    else:
        stacked = jnp.moveaxis(stacked, axes[1], 0)
        group = _stack_groups(group, axes[2], size, stacked.shape[1])
        stacked = stacked.reshape(-1, *stacked.shape[2:])
    rows = _stack_rows(rows, axes[0], size)
    y = _matmul.bind(rows, stacked, group, flipped=flipped)
    return y.reshape(size, -1, *y.shape[1:]), 0


def _outer_batch(args, axes, *, groups):
    (left, right, group), size = args, _size(args, axes)
    group = _stack_groups(group, axes[2], size, groups)
    left, right = _stack_rows(left, axes[0], size), _stack_rows(right, axes[1], size)
    y = _outer.bind(left, right, group, groups=size * groups)
    return y.reshape(size, groups, *y.shape[1:]), 0


_matmul = _primitive(
    "grouped_matmul", _matmul_types, _run_matmul, _matmul_transpose, _matmul_batch
)
_outer = _primitive(
    "grouped_outer", _outer_types, _run_outer, _outer_transpose, _outer_batch
)
