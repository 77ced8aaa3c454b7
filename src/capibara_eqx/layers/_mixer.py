import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray


class AbstractAux(eqx.Module):
    """What a layer reports beside its output: routing, losses, counts.

    A layer that has one returns `(y, aux)`, always. Blocks and stacks hand it up, and
    the train step adds what `losses` names, each by its own weight.

    !!! example

        ```python
        class Routing(AbstractAux):
            load: Float[Array, " experts"]

            def losses(self):
                return {"balance": jnp.var(self.load)}
        ```
    """

    @abc.abstractmethod
    def losses(self) -> dict[str, Float[Array, ""]]:
        """Named scalar losses, empty if there are none."""


class AbstractSequenceMixer(eqx.Module):
    """A layer that mixes information along a causal sequence and can be streamed.

    Four methods, no flag that changes a return type. They agree with each other:
    `__call__` equals `prefill` from a fresh cache, equals any split of it into
    chunks, equals a loop of `step`. A cache is a value: it can be copied, rolled back
    and branched.

    `segment_ids` packs several documents in one row. A document starts where the id
    differs from that of the previous valid token; nothing crosses that boundary, and
    the packed result equals that of the separate documents. A negative id is
    padding, left, right or between: it changes no state and its output is zero.

    !!! example

        ```python
        y, cache = mixer.prefill(x, mixer.init_cache((2,)))
        for _ in range(3):                     # y_t is (*batch, d_out)
            y_t, cache = mixer.step(x_t, cache)
        packed = mixer(x, segment_ids=jnp.array([[0, 0, 1, 1, -1]] * 2))
        ```
    """

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> (
        Float[Array, "*batch seq d_out"]
        | tuple[Float[Array, "*batch seq d_out"], AbstractAux]
    ):
        """Mix a whole sequence.

        **Arguments:**

        - `x`: `(*batch, seq, d_model)`, any number of batch axes.
        - `segment_ids`: document of each token, `(*batch, seq)`; negative is padding.
        - `key`: for layers that draw random numbers; ignored by the others.

        **Returns:**

        `(*batch, seq, d_out)`, in the dtype of `x`; layers that report something
        return `(y, aux)`, always.
        """

    @abc.abstractmethod
    def init_cache(
        self, batch_shape: tuple[int, ...] = (), *, max_len: int | None = None
    ) -> Any:
        """A cache that has seen nothing.

        **Arguments:**

        - `batch_shape`: batch axes of what will be read.
        - `max_len`: number of tokens that the cache must hold; layers whose state has
            a fixed size ignore it.

        **Returns:**

        An `eqx.Module` of arrays; recurrent states are float32 or wider.
        """

    @abc.abstractmethod
    def prefill(
        self,
        x: Float[Array, "*batch seq d_model"],
        cache: Any,
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
    ) -> tuple[Float[Array, "*batch seq d_out"], Any]:
        """Read one or more tokens, continuing from `cache`.

        **Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `cache`: what was read before.
        - `segment_ids`: as in `__call__`. The first token continues the document that
            the cache ended in if it has the same id, or if there are no ids.

        **Returns:**

        The outputs and the cache after the last valid token.
        """

    @abc.abstractmethod
    def step(
        self, x: Float[Array, "*batch d_model"], cache: Any
    ) -> tuple[Float[Array, "*batch d_out"], Any]:
        """Read one token of the document that `cache` ended in.

        **Arguments:**

        - `x`: `(*batch, d_model)`.
        - `cache`: what was read before.

        **Returns:**

        The output `(*batch, d_out)` and the new cache.
        """


def check_mixer(layer: str, part: str, mixer: object, d_model: int) -> None:
    """Raise `ValueError` unless `mixer` is one, of this width if it says its width."""
    if not isinstance(mixer, AbstractSequenceMixer):
        raise ValueError(
            f"{layer}: `{part}` must be a sequence mixer, such as Mamba or Attention, "
            f"got {type(mixer).__name__}. Subclass AbstractSequenceMixer for one of "
            "your own."
        )
    width = getattr(mixer, "d_model", d_model)
    if width != d_model:
        raise ValueError(
            f"{layer}: `{part}` must have the width of the layer, d_model={d_model}, "
            f"got {type(mixer).__name__} of d_model={width}. Build both with one width."
        )


def check_mixed(
    layer: str, part: str, x: Float[Array, "..."], y: Any
) -> Float[Array, "..."]:
    """`y`, made of `x` by a part; `ValueError` unless it is an array of its shape."""
    if isinstance(y, tuple):
        raise ValueError(
            f"{layer}: `{part}` must return its output alone, got a tuple of {len(y)}. "
            "Mixers that report something beside it stand in blocks of `models`."
        )
    if y.shape != x.shape:
        raise ValueError(
            f"{layer}: `{part}` must keep the shape of its input, {x.shape}, got "
            f"{y.shape}. Build it with equal widths in and out."
        )
    return y
