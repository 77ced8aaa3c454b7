"""A fused kernel and its derivatives as three primitives closed under differentiation.

- `forward` is the operation. Its tangent is
- `tangent`, linear in the tangents of the operands; the transpose of that is
- `backward`, linear in the cotangents of the results; the transpose of that is
  `tangent` again.

So an operation and its first reverse derivative run fused, by what the platform has to
offer, and everything else is differentiated as the plain XLA form: forward mode, and
whatever is differentiated a second time. All rules are exact at every order.

Batches become rows, which the kernels know, and groups of rows that share weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped


PLATFORMS = ("cpu", "tpu", "cuda")


class Backend(NamedTuple):
    """A fused kernel, its settings already given.

    - `forward(operands, save)`: the results, and after them, if `save`, what is kept
        for `backward` (an array or `None`).
    - `backward(operands, saved, cotangents)`: cotangents in the form of the operands,
        but of weights one entry a row; anything for what is not differentiated.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """What the rules have to know.

    Operands are named tuples of arrays and `None`. Their first array is `(rows, ., .)`
    or has more axes, arrays that are not differentiated come last, and the fields
    called `weights` have one entry for each of `groups` equal runs of rows, all others
    one a row. `static` is what else the operation depends on, hashable.

    - `results(operands, static)`: shapes and dtypes of the results, three axes or more.
    - `saved(operands, static)`: of what a kernel keeps to go backward, or `None`.
    - `plain(operands, static)`: the results in XLA, differentiable at every order.
    - `backend(platform, operands, static)`: the kernel to run on a platform (`None`
        for all without an own name), `None` for the plain form.
    """

    name: str
    weights: frozenset[str]
    results: Callable[..., Sequence[jax.ShapeDtypeStruct]]
    saved: Callable[..., jax.ShapeDtypeStruct | None]
    plain: Callable[..., Sequence[Array]]
    backend: Callable[..., Backend | None]


class Call:
    """The leaves of one set of operands, and where they belong."""

    def __init__(self, tree: Any, leaves: Sequence[Any]):
        self.tree, self.leaves = tree, list(leaves)
        self.operands = jax.tree.unflatten(tree, self.leaves)
        fields = self.operands._asdict()
        self.names = [name for name, leaf in fields.items() if leaf is not None]

    @property
    def smooth(self) -> list[Any]:
        """The operands that can be differentiated; they come first."""
        return [x for x in self.leaves if jnp.issubdtype(x.dtype, jnp.inexact)]

    @property
    def rows(self) -> int:
        return self.leaves[0].shape[0]

    def with_smooth(self, smooth: Sequence[Any]) -> "Call":
        return Call(self.tree, [*smooth, *self.leaves[len(smooth) :]])

    def one_group_a_row(self, weights: frozenset[str]) -> "Call":
        leaves = [
            spread(x, self.rows) if name in weights else x
            for name, x in zip(self.names, self.leaves, strict=True)
        ]
        return Call(self.tree, leaves)


def spread(
    weights: Shaped[Array, "groups ..."], rows: int
) -> Shaped[Array, "rows ..."]:
    """One entry a row, from one a group."""
    groups, *shape = weights.shape
    repeated = jnp.broadcast_to(weights[:, None], (groups, rows // groups, *shape))
    return repeated.reshape(rows, *shape)


def _row_shape(leaf, rows):
    """Of a cotangent: a vector gets an axis of one, so that it has three."""
    _, *shape = leaf.shape
    return (rows, *shape) if len(shape) > 1 else (rows, 1, *shape)


def _is_zero(tangent) -> bool:
    return type(tangent) is ad.Zero


class Closure:
    """The primitives of an operation; called with operands and what is static."""

    def __init__(self, operation: Operation):
        self.operation = operation
        name = operation.name
        self.forward = self._primitive(
            f"{name}_forward", self._forward_types, self._forward, self._forward_jvp
        )
        self.tangent = self._primitive(
            f"{name}_tangent", self._tangent_types, self._tangent, None
        )
        self.backward = self._primitive(
            f"{name}_backward", self._backward_types, self._backward, None
        )
        ad.primitive_jvps[self.tangent] = functools.partial(
            self._linear_jvp, self.tangent, self._plain_tangents
        )
        ad.primitive_jvps[self.backward] = functools.partial(
            self._linear_jvp, self.backward, self._plain_cotangents
        )
        ad.primitive_transposes[self.tangent] = self._tangent_transpose
        ad.primitive_transposes[self.backward] = self._backward_transpose

    def __call__(self, operands: Any, static: Any) -> list[Array]:
        leaves, tree = jax.tree.flatten(operands)
        return self.forward.bind(*leaves, tree=tree, static=static, save=False)

    def _primitive(self, name, types, run, jvp):
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_abstract_eval(types)

        @functools.lru_cache(maxsize=256)
        def compiled(**params):
            return jax.jit(functools.partial(primitive.bind, **params))

        primitive.def_impl(lambda *args, **params: compiled(**params)(*args))
        if jvp is not None:
            ad.primitive_jvps[primitive] = jvp
        batching.primitive_batchers[primitive] = functools.partial(
            self._batch, primitive
        )
        for platform in PLATFORMS:
            rule = mlir.lower_fun(functools.partial(run, platform))
            mlir.register_lowering(primitive, rule, platform)
        mlir.register_lowering(primitive, mlir.lower_fun(functools.partial(run, None)))
        return primitive

    def _call(self, args, tree):
        """The operands, and what else a primitive takes."""
        count = tree.num_leaves
        return Call(tree, args[:count]), list(args[count:])

    # The plain forms of the three.

    def _plain(self, call, static):
        return lambda *smooth: tuple(
            self.operation.plain(call.with_smooth(smooth).operands, static)
        )

    def _plain_tangents(self, call, static, dots):
        primals = tuple(call.smooth)
        return list(jax.jvp(self._plain(call, static), primals, tuple(dots))[1])

    def _plain_cotangents(self, call, static, cotangents):
        apart = call.one_group_a_row(self.operation.weights)
        _, pull = jax.vjp(self._plain(apart, static), *apart.smooth)
        return self._in_row_shapes(call, pull(tuple(cotangents)))

    def _in_row_shapes(self, call, cotangents):
        return [
            x.reshape(_row_shape(leaf, call.rows))
            for x, leaf in zip(cotangents, call.smooth, strict=True)
        ]

    # Types. All have three axes or more, so that each can be made from that of the
    # first operand, which says along which axes of a mesh it varies.

    def _forward_types(self, *leaves, tree, static, save):
        call = Call(tree, leaves)
        results = list(self.operation.results(call.operands, static))
        saved = self.operation.saved(call.operands, static) if save else None
        if saved is not None:
            results.append(saved)
        return [_typed(leaves[0], result.shape, result.dtype) for result in results]

    def _tangent_types(self, *args, tree, static):
        call, _ = self._call(args, tree)
        return self._forward_types(*call.leaves, tree=tree, static=static, save=False)

    def _backward_types(self, *args, tree, static):
        call, _ = self._call(args, tree)
        return [_typed(args[0], _row_shape(x, call.rows), x.dtype) for x in call.smooth]

    # What runs, by platform.

    def _forward(self, platform, *leaves, tree, static, save):
        operation, operands = self.operation, Call(tree, leaves).operands
        kernel = operation.backend(platform, operands, static)
        saved = operation.saved(operands, static) if save else None
        if kernel is not None:
            results = list(kernel.forward(operands, saved is not None))
            return results if saved is not None else results[: len(results) - 1]
        results = list(operation.plain(operands, static))
        # The plain form's backward pass computes what it needs by itself.
        return results if saved is None else [*results, jnp.zeros_like(saved)]

    def _backward(self, platform, *args, tree, static):
        call, (*saved, cotangents) = self._arguments(args, tree, static)
        kernel = self.operation.backend(platform, call.operands, static)
        if kernel is None:
            return self._plain_cotangents(call, static, cotangents)
        found = kernel.backward(call.operands, saved[0] if saved else None, cotangents)
        named = found._asdict()
        smooth = [named[name] for name, _ in zip(call.names, call.smooth, strict=False)]
        return self._in_row_shapes(call, smooth)

    def _tangent(self, platform, *args, tree, static):
        del platform
        call, (*_, dots) = self._arguments(args, tree, static)
        return self._plain_tangents(call, static, dots)

    def _arguments(self, args, tree, static):
        """Operands; what was saved, if anything; what the primitive is linear in."""
        call, rest = self._call(args, tree)
        count = 1 if self._saves(call, static) else 0
        return call, [*rest[:count], rest[count:]]

    def _saves(self, call, static) -> bool:
        return self.operation.saved(call.operands, static) is not None

    # Derivatives. What is saved is a copy of what the operands already say, and so it
    # has no tangent.

    def _forward_jvp(self, primals, tangents, *, tree, static, save):
        call = Call(tree, primals)
        params = {"tree": tree, "static": static}
        out = self.forward.bind(*primals, **params, save=True)
        count = len(self.operation.results(call.operands, static))
        dots = [ad.instantiate_zeros(t) for t in tangents[: len(call.smooth)]]
        rates = self.tangent.bind(*primals, *out[count:], *dots, **params)
        if not save:
            return out[:count], rates
        return out, [*rates, *(ad.Zero(jax.typeof(x)) for x in out[count:])]

    def _linear_jvp(self, primitive, plain, primals, tangents, *, tree, static):
        call, (*saved, linear) = self._arguments(primals, tree, static)
        of_operands = tangents[: tree.num_leaves]
        of_linear = [
            ad.instantiate_zeros(t) for t in tangents[len(tangents) - len(linear) :]
        ]
        params = {"tree": tree, "static": static}
        out = primitive.bind(*primals, **params)
        if all(map(_is_zero, of_operands)):
            # Linear: its own tangent.
            return out, primitive.bind(*call.leaves, *saved, *of_linear, **params)
        of_smooth = [ad.instantiate_zeros(t) for t in of_operands[: len(call.smooth)]]

        def function(smooth, linear):
            return plain(call.with_smooth(smooth), static, linear)

        return out, jax.jvp(function, (call.smooth, linear), (of_smooth, of_linear))[1]

    def _tangent_transpose(self, cotangents, *args, tree, static):
        call, (*saved, dots) = self._arguments(args, tree, static)
        cotangents = [ad.instantiate_zeros(c) for c in cotangents]
        found = self.backward.bind(
            *call.leaves, *saved, *cotangents, tree=tree, static=static
        )
        # Rows of one group share its weights.
        found = [
            jnp.sum(
                x.reshape(leaf.shape[0], call.rows // leaf.shape[0], *leaf.shape[1:]),
                axis=1,
            )
            if leaf.shape[0] != call.rows
            else x.reshape(leaf.shape)
            for x, leaf in zip(found, call.smooth, strict=True)
        ]
        return self._for_undefined(len(args) - len(dots), dots, found)

    def _backward_transpose(self, cotangents, *args, tree, static):
        call, (*saved, linear) = self._arguments(args, tree, static)
        apart = call.one_group_a_row(self.operation.weights)
        dots = [
            ad.instantiate_zeros(c).reshape(leaf.shape)
            for c, leaf in zip(cotangents, apart.smooth, strict=True)
        ]
        found = self.tangent.bind(
            *apart.leaves, *saved, *dots, tree=tree, static=static
        )
        return self._for_undefined(len(args) - len(linear), linear, found)

    def _for_undefined(self, known, linear, found):
        kept = [
            x if ad.is_undefined_primal(argument) else None
            for x, argument in zip(found, linear, strict=True)
        ]
        return [None] * known + kept

    # Batches.

    def _batch(self, primitive, args, dims, *, tree, static, **params):
        size = next(
            x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None
        )
        weights = self._weights(primitive, tree, args)
        among = [(x, d) for x, d, w in zip(args, dims, weights, strict=True) if w]
        # Weights of one group, in no batch, stay those of all rows.
        shared = all(d is None and x.shape[0] == 1 for x, d in among)

        def flat(x, d, weight):
            if weight and shared:
                return x
            if d is None:
                x = jnp.broadcast_to(x, (size, *x.shape))
            else:
                x = jnp.moveaxis(x, d, 0)
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = primitive.bind(
            *map(flat, args, dims, weights), tree=tree, static=static, **params
        )
        split = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in out]
        return split, [0] * len(split)

    def _weights(self, primitive, tree, args):
        """Whether each argument of a primitive has one entry a group, not a row."""
        call, rest = self._call(args, tree)
        kinds = [name in self.operation.weights for name in call.names]
        if primitive is not self.tangent:
            return kinds + [False] * len(rest)
        smooth = kinds[: len(call.smooth)]
        return [*kinds, *[False] * (len(rest) - len(smooth)), *smooth]


def _typed(like, shape, dtype):
    return like.update(shape=shape, dtype=dtype, weak_type=False)
