"""What a traced program does, read from its equations."""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def turns(program: Jaxpr) -> int:
    """Steps of all `scan` loops that must be taken one after the other."""
    total = 0
    for equation in program.eqns:
        inside = [turns(inner) for inner in _inner(equation.params)]
        most = max(inside, default=0)
        if equation.primitive.name == "scan":
            total += equation.params["length"] * max(1, most)
        else:
            total += most
    return total


def flops(function: Any, *args: Any) -> float:
    """What XLA counts, before it optimises; it counts the body of a loop once."""
    cost: Any = jax.jit(function).lower(*args).cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in jax.tree.leaves(list(params.values()), is_leaf=_is_program):
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
    return found


def _is_program(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
