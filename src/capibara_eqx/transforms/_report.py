import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ..arrays import AbstractWeight, FakeQuantArray, LoRAArray, as_array
from ..internal import accumulate
from ._places import places


class Entry(eqx.Module):
    r"""What became of one weight.

    - `path`, `scheme`, `shape`: which one, in what form, for what array.
    - `nbytes`, `original_bytes`: of all that is kept of it now, and of the array.
    - `density`: the share of values other than zero.
    - `sqnr`: $10 \log_{10} (\sum w^2 / \sum (w - \hat w)^2)$ in decibel, against the
        weight it was made of: infinite where nothing was lost, `None` where that is
        not known.
    - `details`: what else the transform says of it, by name.

    !!! example

        ```python
        model, found = quantize(model, [Rule(".*weight", Affine(4))])
        found.entries[0].bits_per_weight
        ```
    """

    path: str = eqx.field(static=True)
    scheme: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    nbytes: int = eqx.field(static=True)
    original_bytes: int = eqx.field(static=True)
    density: Float[Array, ""]
    sqnr: Float[Array, ""] | None = None
    details: dict[str, Array] = eqx.field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Of all that is kept, steps and zero points too."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


class Report(eqx.Module):
    """What became of the parameters of a model. `print` shows it as a table.

    - `entries`: of every weight that is kept in another form.
    - `left_alone`: path, shape and bytes of every other floating point parameter.

    !!! example

        ```python
        model, found = quantize(model, [Rule(".*weight", Affine(4))])
        print(found)
        ```
    """

    entries: tuple[Entry, ...]
    left_alone: tuple[tuple[str, tuple[int, ...], int], ...] = eqx.field(static=True)

    @property
    def nbytes(self) -> int:
        """Of all parameters as they are kept."""
        return sum(entry.nbytes for entry in self.entries) + self._others

    @property
    def original_bytes(self) -> int:
        """Of all parameters as plain arrays."""
        return sum(entry.original_bytes for entry in self.entries) + self._others

    @property
    def _others(self) -> int:
        return sum(nbytes for _, _, nbytes in self.left_alone)

    def __str__(self) -> str:
        head = ("path", "scheme", "shape", "bits", "bytes", "SQNR dB", "density")
        rows = [head, *(_row(entry) for entry in self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [_line(row, widths) for row in rows]
        lines += [line for entry in self.entries for line in _fallback(entry)]
        count = len(self.left_alone)
        if count:
            lines.append(f"left alone: {count} parameters, {self._others:,} bytes")
            lines += [f"  {path} {shape}" for path, shape, _ in self.left_alone]
        ratio = self.original_bytes / max(1, self.nbytes)
        lines.append(
            f"all parameters: {self.nbytes:,} bytes of {self.original_bytes:,}, "
            f"{ratio:.2f} times smaller"
        )
        return "\n".join(lines)


def report(model: PyTree, reference: PyTree | None = None) -> Report:
    """The forms in which the weights of a model are kept, and their true bytes.

    **Arguments:**

    - `model`: any PyTree.
    - `reference`: the model before, with plain arrays, to measure the errors against.

    **Returns:**

    A `Report`.

    **Raises:**

    `ValueError` if the reference has no array of the same shape at the path of a
    weight.

    !!! example

        ```python
        small, _ = quantize(model, [Rule(".*weight", Ternary())])
        print(report(small, model))
        ```
    """
    original = {}
    if reference is not None:
        original = {place.path: place.whole for place in places(reference)}
    entries, left = [], []
    for place in places(model):
        if not isinstance(place.whole, AbstractWeight):
            left.append((place.path, place.value.shape, place.value.nbytes))
            continue
        weight = None
        if reference is not None:
            weight = original.get(place.path)
            _check_reference(place, weight)
        entries.append(entry(place.path, place.whole, weight))
    return Report(tuple(entries), tuple(left))


def entry(
    path: str,
    node: AbstractWeight,
    weight: Array | AbstractWeight | None,
    details: dict[str, Array] | None = None,
) -> Entry:
    """The entry of a node that was made of `weight`."""
    density, sqnr = quality(node, None if weight is None else as_array(weight))
    return Entry(
        path=path,
        scheme=scheme(node),
        shape=node.shape,
        nbytes=node.nbytes,
        original_bytes=node.size * node.dtype.itemsize,
        density=density,
        sqnr=sqnr,
        details={} if details is None else details,
    )


def scheme(node: AbstractWeight) -> str:
    """The form that a weight is kept in, in a few words."""
    if isinstance(node, LoRAArray):
        base = node.base
        below = scheme(base) if isinstance(base, AbstractWeight) else str(base.dtype)
        return f"{node.spec} over {below}"
    words = str(getattr(node, "spec", type(node).__name__))
    return f"fake {words}" if isinstance(node, FakeQuantArray) else words


@eqx.filter_jit
def quality(node, weight):
    """Density of a node, and its SQNR against the weight it was made of, if given."""
    dense = accumulate(as_array(node))
    density = jnp.mean((dense != 0).astype(dense.dtype))
    if weight is None:
        return density, None
    wide = accumulate(weight.reshape(dense.shape))
    # Squares of small weights would vanish.
    size = jnp.max(jnp.abs(wide), initial=jnp.finfo(wide.dtype).tiny)
    signal = jnp.sum(jnp.square(wide / size))
    noise = jnp.sum(jnp.square((wide - dense) / size))
    return density, jnp.where(noise > 0, 10 * jnp.log10(signal / noise), jnp.inf)


def _check_reference(place, weight) -> None:
    if weight is None or weight.size != place.value.size:
        found = "nothing" if weight is None else f"shape {weight.shape}"
        raise ValueError(
            f"report: `reference` must have an array of shape {place.value.shape} at "
            f"{place.path!r}, it has {found}. Pass the model before it was compressed."
        )


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.path,
        entry.scheme,
        "x".join(str(size) for size in entry.shape),
        f"{entry.bits_per_weight:.3f}",
        f"{entry.nbytes:,}",
        "" if entry.sqnr is None else _number(entry.sqnr, ".2f"),
        _number(entry.density, ".3f"),
    )


def _fallback(entry: Entry) -> list[str]:
    """What an entry says of a `gptq` that had nothing to go by."""
    fallback = entry.details.get("fallback")
    if fallback is None or isinstance(fallback, Tracer) or not fallback.any():
        return []
    some = f" ({int(fallback.sum())} of {fallback.size})" if fallback.size > 1 else ""
    return [f"ROUNDED TO NEAREST, without a usable Hessian: {entry.path}{some}"]


def _number(x: Array, form: str) -> str:
    return "traced" if isinstance(x, Tracer) else format(float(x), form)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = [text.ljust(width) for text, width in zip(row[:3], widths[:3], strict=True)]
    right = [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]
    return "  ".join(left + right).rstrip()
