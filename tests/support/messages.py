"""What an error message has to say."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a `ValueError` whose message holds all of `words`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        yield
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"the message does not say {missing}: {message}"
