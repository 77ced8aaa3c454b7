"""Calls in a row within one program, where a call alone tells of its dispatch.

A GPU works while Python runs on, and many of its kernels take less time than to ask for
one. So what is timed is a loop of many calls that jax compiles as one program, and the
host waits once, for the last.

Every call needs the one before: its smallest argument has something of the results of
that added, times a zero that XLA does not know to be one. A barrier around all
arguments keeps in the loop what depends on none of this. The loop costs a few small
kernels a call; a chain of nothing, timed beside the others, says how much.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ._harness import Prepared, compile_timed, temp_bytes


# Of a call alone, for the number of calls.
_TRIALS = 3
_MOST_CALLS = 1000


def chained(function: Callable[..., Any], *args: Any, at_least_s: float) -> Prepared:
    """`function` of fixed arguments, again and again.

    Compile time and temporaries are those of a single call, times the mean of a chain,
    whose last results are the result.

    **Arguments:**

    - `function`: of any PyTrees of arrays, one of them of floating point.
    - `at_least_s`: seconds that a chain takes, unless it has very many calls.
    """
    single, compile_ms = compile_timed(function, *args)
    calls = _calls(partial(single, *args), at_least_s)
    zero = jnp.zeros(())
    chain, _ = compile_timed(partial(repeat, function, calls), zero, *args)
    return Prepared(
        lambda: jax.block_until_ready(chain(zero, *args)),
        compile_ms,
        temp_bytes(single),
        calls=calls,
    )


def repeat(function: Callable[..., Any], calls: int, zero: Any, *args: Any) -> Any:
    """The results of the last of `calls` calls, each of which waits for the one before.

    **Arguments:**

    - `zero`: a zero that is not known when this is traced.
    """
    leaves, tree = jax.tree.flatten(args)
    smallest = min(x.size for x in leaves if _floating(x))
    # All of that size: not every argument of a pullback need be used.
    tied = [k for k, x in enumerate(leaves) if _floating(x) and x.size == smallest]

    def call(small):
        own = dict(zip(tied, small, strict=True))
        arguments = [own.get(k, x) for k, x in enumerate(leaves)]
        arguments = jax.lax.optimization_barrier(arguments)
        return function(*jax.tree.unflatten(tree, arguments))

    def step(_, carry):
        small, _ = carry
        results = call(small)
        last = [x.ravel()[0].astype(zero.dtype) for x in jax.tree.leaves(results)]
        nothing = zero * sum(last[1:], last[0])
        return [x + nothing.astype(x.dtype) for x in small], results

    small = [leaves[k] for k in tied]
    empty = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call, small)
    )
    return jax.lax.fori_loop(0, calls, step, (small, empty))[1]


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _calls(call: Callable[[], Any], at_least_s: float) -> int:
    jax.block_until_ready(call())
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(_MOST_CALLS, math.ceil(at_least_s / min(times)))
