"""Records as Markdown tables."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._records import MEASURED


Record = dict[str, Any]

# What a shape says of the work of a call, the unit of that a second, and its size.
_RATES = {"tokens_per_call": ("tokens/s", 1.0), "bytes_per_call": ("GB/s", 1e9)}


def bar_table(bars: Iterable[Record]) -> list[str]:
    """Claims, limits and what was measured."""
    rows = []
    for bar in bars:
        relation = "at least" if bar["at_least"] else "at most"
        wanted = f"{relation} {bar['limit']:.3g} {bar['unit']}".strip()
        verdict = "met" if bar["passed"] else "**missed**"
        rows.append([bar["statement"], wanted, f"{bar['value']:.3g}", verdict])
    return markdown_table(["claim", "wanted", "measured", ""], "lrrl", rows)


def tables(measurements: Sequence[Record]) -> list[str]:
    """One table a shape, or one of all shapes where each has one implementation."""
    specs: dict[str, list[Record]] = {}
    for measurement in measurements:
        specs.setdefault(measurement["spec"]["name"], []).append(measurement)
    if all(len({m["implementation"] for m in own}) == 1 for own in specs.values()):
        # Nothing to compare within a shape: the shapes themselves are the rows.
        return _measurement_table(measurements, by_spec=True)
    lines = []
    for own in specs.values():
        sizes = [f"{k} {v}" for k, v in own[0]["spec"].items() if k != "name"]
        lines += [f"`{own[0]['spec']['name']}`: {', '.join(sizes)}", ""]
        lines += _measurement_table(own, by_spec=False)
        lines += _without_roofline(own)
    return lines


def length_tables(measurements: Sequence[Record]) -> list[str]:
    """One table a mode and quantity: lengths down, implementations across."""
    lines = []
    for mode in dict.fromkeys(m["mode"] for m in measurements):
        own = [m for m in measurements if m["mode"] == mode]
        for title, text in _QUANTITIES.items():
            lines += [f"{mode.replace('_', ' ').capitalize()}, {title}:", ""]
            lines += _length_table(own, text)
    absent = [m for m in measurements if m["status"] != MEASURED]
    reasons = {
        f"- A dash: `{m['implementation']}` is {m['status']}: {m['reason']}."
        for m in absent
    }
    return [*lines, *sorted(reasons), ""]


def exchange_table(measurements: Sequence[Record]) -> list[str]:
    """What each device computes, keeps and sends: operations and modes down."""
    rows = []
    for m in measurements:
        spec, formula = m["spec"], m["spec"]["sent_by_formula"]
        rows.append(
            [
                m["mode"].replace("_", " "),
                f"`{spec['name']}`",
                f"{spec['updates']:,}",
                f"{spec['updates_share']:.3f}",
                f"{spec['operations']:,}",
                f"{spec['operations_share']:.3f}",
                "" if formula is None else f"{formula:,}",
                f"{spec['sent_compiled']:,}",
                _mebibytes(m),
                _milliseconds(m),
                f"{spec['difference']:.1e}",
                _error(m),
            ]
        )
    titles = ["mode", "operation and devices", "updates by formula", "share"]
    titles += ["operations as compiled", "share"]
    titles += ["sent by formula, bytes", "sent as compiled, bytes"]
    titles += ["temporaries, MiB", "ms"]
    titles += ["difference", "error"]
    return markdown_table(titles, "ll" + "r" * (len(titles) - 2), rows)


def _length_table(
    measurements: Sequence[Record], text: Callable[[Record], str]
) -> list[str]:
    names = list(dict.fromkeys(m["implementation"] for m in measurements))
    cells = {(m["spec"]["seq"], m["implementation"]): m for m in measurements}
    rows = []
    for seq in dict.fromkeys(m["spec"]["seq"] for m in measurements):
        own = [cells.get((seq, name)) for name in names]
        rows.append([str(seq), *("" if m is None else _cell(m, text) for m in own)])
    titles = ["tokens", *(f"`{name}`" for name in names)]
    return markdown_table(titles, "r" * len(titles), rows)


def _cell(measurement: Record, text: Callable[[Record], str]) -> str:
    return text(measurement) if measurement["status"] == MEASURED else "-"


def _without_roofline(measurements: Sequence[Record]) -> list[str]:
    """Why a table has no column for it, if it should have one."""
    reasons = {
        f"No roofline: {m['roofline_of']}."
        for m in measurements
        if m.get("roofline_of") is not None and m["roofline_ms"] is None
    }
    return [*sorted(reasons), ""] if reasons else []


def _measurement_table(measurements: Sequence[Record], *, by_spec: bool) -> list[str]:
    """Times beside that of the first of the same mode, or of the row before."""
    base: dict[str, float] = {}
    rows = []
    rates = {
        k: v for k, v in _RATES.items() if any(k in m["spec"] for m in measurements)
    }
    rooflines = any(m.get("roofline_ms") is not None for m in measurements)
    peaks = any(m["peak_rss_bytes"] is not None for m in measurements)
    for m in measurements:
        name = m["spec"]["name"] if by_spec else m["implementation"]
        head = [m["mode"].replace("_", " "), f"`{name}`"]
        if m["status"] != MEASURED:
            rows.append([*head, f"{m['status']}: {m['reason']}"])
            continue
        median = m["median_ms"]
        ratio = median / base.get(m["mode"], median)
        if by_spec or m["mode"] not in base:
            base[m["mode"]] = median
        row = [*head, f"{median:.4g}", f"{ratio:.2f}"]
        row += _roofline(m) if rooflines else []
        for key, (_, unit) in rates.items():
            work = m["spec"].get(key)
            row.append("" if work is None else f"{work / median * 1e3 / unit:,.5g}")
        row += [_mebibytes(m), _seconds(m)]
        if peaks:
            row.append(_mebibytes(m, "peak_rss_bytes"))
        rows.append([*row, _error(m), str(len(m["evaluation_ms"]))])
    what = "of the row above" if by_spec else "of the first"
    titles = ["mode", "shape" if by_spec else "implementation", "ms", what]
    titles += ["roofline, ms", "share of it"] if rooflines else []
    titles += [title for title, _ in rates.values()]
    titles += ["temporaries, MiB", "compile, s"]
    titles += ["peak resident, MiB"] if peaks else []
    titles += ["error", "calls"]
    return markdown_table(titles, "ll" + "r" * (len(titles) - 2), rows)


def markdown_table(
    titles: Sequence[str], align: str, rows: Sequence[list[str]]
) -> list[str]:
    """A table; its columns are left, `"l"`, or right, `"r"`; rows may be short."""
    marks = [{"l": "---", "r": "---:"}[side] for side in align]
    full = [row + [""] * (len(titles) - len(row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in [titles, marks, *full]] + [""]


def _milliseconds(measurement: Record) -> str:
    return f"{measurement['median_ms']:.4g}"


def _roofline(measurement: Record) -> list[str]:
    least = measurement.get("roofline_ms")
    if least is None:
        return ["", ""]
    share = least / measurement["median_ms"]
    return [f"{least:.4g} ({measurement['roofline_of']})", f"{share:.0%}"]


def _mebibytes(measurement: Record, key: str = "temp_bytes") -> str:
    count = measurement[key]
    return "" if count is None else f"{count / 2**20:.1f}"


def _seconds(measurement: Record) -> str:
    milliseconds = measurement["compile_ms"]
    return "" if milliseconds is None else f"{milliseconds / 1e3:.2f}"


def _error(measurement: Record) -> str:
    return f"{measurement['max_error']:.1e}"


_QUANTITIES = {
    "ms": _milliseconds,
    "temporaries in MiB": _mebibytes,
    "compile time in s": _seconds,
    "error": _error,
}
