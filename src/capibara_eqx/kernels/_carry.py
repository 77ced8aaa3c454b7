import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, DTypeLike, PyTree, Shaped


def start_of(
    state: Shaped[Array, "*state"] | None,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *entering: Shaped[Array, "..."] | None,
) -> Shaped[Array, "*state"]:
    """What a scan starts from, typed like what enters it.

    Inside `jax.shard_map` the type of an array says along which axes of the mesh it
    varies, and on a mesh with explicit axes how it is sharded. Fresh zeros do neither,
    and a carry may not change its type on the way. A sum has the type of all its terms.

    **Arguments:**

    - `state`: the initial state; zeros if not given.
    - `shape`, `dtype`: of the result.
    - `entering`: what the state will meet, each in a shape that broadcasts to `shape`.

    **Returns:**

    `state` in `dtype`.
    """
    start = jnp.zeros(shape, dtype) if state is None else state.astype(dtype)
    for x in entering:
        if x is not None:
            start = start + jnp.broadcast_to(jnp.zeros_like(x, dtype), shape)
    return start


def alike(operands: PyTree[Shaped[Array, "..."]]) -> PyTree[Shaped[Array, "..."]]:
    """The operands of one primitive, typed alike inside `jax.shard_map`.

    A primitive with a rule of its own knows one type for all that it takes: what does
    not vary along an axis of the mesh is made to, and its cotangent is summed there.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return operands
    zero = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(operands):
        zero = zero + jnp.sum(jnp.zeros_like(x, jnp.float32))

    def typed(x):
        nothing = jnp.broadcast_to(zero, x.shape)
        if x.dtype == jnp.bool_:
            return x | (nothing != 0)
        return x + nothing.astype(x.dtype)

    return jax.tree.map(typed, operands)


def type_of(*arrays: Shaped[Array, "..."]) -> jax.ShapeDtypeStruct:
    """The type of a number that depends on all of `arrays`.

    Inside `jax.shard_map` it says along which axes of the mesh a result varies; how it
    says so is not the same in all versions of jax, hence no word of it here.
    """

    def number(*arrays):
        return sum((jnp.sum(jnp.zeros_like(x, jnp.float32)) for x in arrays), 0.0)

    return jax.eval_shape(number, *arrays)
