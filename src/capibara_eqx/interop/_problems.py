from collections.abc import Sequence


def refuse(function: str, what: str, problems: Sequence[str]) -> None:
    """Raise one `ValueError` that lists all `problems`, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise ValueError(f"{function}: {what}: {problems[0]}")
    listed = "\n".join(f"- {problem}" for problem in problems)
    raise ValueError(f"{function}: {what}, {len(problems)} problems:\n{listed}")


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
