import re

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ._dispatch import SCOPE


_SCOPE = re.compile(rf"{re.escape(SCOPE)}(\w+)\.(\w+)")


def traced_implementations(program: ClosedJaxpr | Jaxpr) -> frozenset[tuple[str, str]]:
    """The operations that a traced program computes, each with its implementation.

    A fused kernel that was not named is `"fused"`: which one that is shows when the
    program is lowered for a platform.

    **Arguments:**

    - `program`: what `jax.make_jaxpr` returns.

    **Returns:**

    Pairs `(operation, implementation)`, empty if there is no operation of `kernels`.

    !!! example

        ```python
        program = jax.make_jaxpr(lambda x: mixer(x))(x)
        assert ("selective_scan", "fused") in traced_implementations(program)
        ```
    """
    found: set[tuple[str, str]] = set()
    inner = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in inner.eqns:
        found.update(_SCOPE.findall(str(equation.source_info.name_stack)))
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        for part in filter(_is_program, parts):
            found |= traced_implementations(part)
    return frozenset(found)


def _is_program(value: object) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
