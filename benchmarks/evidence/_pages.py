"""What the tables of the experiments share."""

from collections.abc import Sequence

from .._tables import Record


def of_model(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one model, one a seed."""
    return [r for r in records if r["model"] == name]


def percent(share: float) -> float:
    return round(100 * share, 2)


def percents(shares: Sequence[float]) -> str:
    """The mean, and the least and the largest of several seeds."""
    mean = f"{100 * sum(shares) / len(shares):.1f}"
    if len(shares) == 1:
        return mean
    return f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def rest(records: Sequence[Record]) -> list[str]:
    """Parameters, number of seeds and seconds a seed."""
    seconds = sum(r["wall_s"] for r in records) / len(records)
    return [f"{records[0]['parameters']:,}", str(len(records)), f"{seconds:.0f}"]
