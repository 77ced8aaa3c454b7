"""What Hypothesis draws for the contract tests: packed rows, and cuts of a row."""

from collections.abc import Sequence

from hypothesis import strategies as st


# Tokens a row. Packed rows are cut into pieces of 1, 2 and 4 tokens: between them
# every point of a row can be a cut, and few functions have to be compiled.
LENGTH = 6
PIECES = (1, 2, 4)

seeds = st.integers(0, 2**32 - 1)
# Documents of any length in any order, ids that come back, padding anywhere.
packed_rows = st.lists(
    st.tuples(st.sampled_from([0, 3, 4, 900, -1, -5]), st.integers(1, 4)),
    min_size=LENGTH,
    max_size=LENGTH,
).map(lambda runs: [name for name, size in runs for _ in range(size)][:LENGTH])
# Cuts of a row into chunks of any length.
chunks = st.sets(st.integers(1, LENGTH - 1)).map(
    lambda cuts: list(zip([0, *sorted(cuts)], [*sorted(cuts), LENGTH], strict=True))
)


def _into_pieces(sizes: Sequence[int]) -> list[tuple[int, int]]:
    start, cuts = 0, []
    for size in sizes:
        size = max(piece for piece in PIECES if piece <= min(size, LENGTH - start))
        cuts.append((start, start + size))
        start += size
        if start == LENGTH:
            break
    return cuts


# Cuts of a row into chunks of the lengths in PIECES.
pieces = st.lists(st.sampled_from(PIECES), min_size=LENGTH, max_size=LENGTH).map(
    _into_pieces
)
