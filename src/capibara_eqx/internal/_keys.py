import jax
from jaxtyping import PRNGKeyArray


def split_or_none(
    key: PRNGKeyArray | None, num: int
) -> tuple[PRNGKeyArray | None, ...]:
    """`num` independent keys, or `num` times `None` where there is no key.

    Layers pass their optional `key` on without asking whether it is there.
    """
    if key is None:
        return (None,) * num
    keys = jax.random.split(key, num)
    return tuple(keys[i] for i in range(num))
