"""Work that is counted in compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks._operations import operations


def count(function, *shapes) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile().as_text()
    assert program is not None
    return operations(program)


def test_elements_products_and_sums():
    assert count(lambda x, y: jnp.exp(x * y) + x, (3, 5), (3, 5)) == 3 * 3 * 5
    assert count(lambda x: jnp.sum(x * x), (7,)) == 7 + 6
    assert count(lambda x: x.reshape(5, 3).T, (3, 5)) == 0
    pairs = count(lambda x, y: x @ y, (16, 32), (32, 8))
    assert pairs == 2 * 16 * 32 * 8


def test_whole_numbers_are_no_work():
    assert count(lambda x: x[jnp.arange(4, dtype=jnp.int32) * 2 + 1], (9,)) == 0


@pytest.mark.parametrize("turns", [3, 50])
def test_a_loop_counts_as_often_as_it_runs(turns):
    def inner(state, x):
        return state * x + state, None

    def outer(state, xs):
        return jax.lax.scan(inner, state, xs)

    shapes = (4,), (turns, 4)
    assert count(outer, *shapes) == turns * 2 * 4

    def nested(state, xs):
        return jax.lax.scan(lambda s, _: outer(s, xs), state, length=10)

    assert count(nested, *shapes) == 10 * turns * 2 * 4


def test_a_loop_of_unknown_length_is_refused():
    def run(x):
        return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x * 2, x)

    with pytest.raises(ValueError, match="loop of unknown length"):
        count(run, (2,))


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="work of 'sort' is unknown"):
        count(jnp.sort, (9,))
