import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..internal import check_choice, check_keys
from ..models import LanguageModel
from ..transforms import NM, Affine, Rule, Ternary, quantize
from ._run import RunFolder


_SPECS: Mapping[str, type | None] = {
    "affine": Affine,
    "ternary": Ternary,
    "nm": NM,
    "none": None,
}
_FORMAT = 1


def read_rules(path: str | Path) -> list[Rule]:
    """The rules in a TOML file, for `transforms.quantize`.

    One table `[[rule]]` a rule: its `pattern`, its `spec` by name, `"affine"`,
    `"ternary"`, `"nm"` or `"none"`, and what the constructor of that spec takes.

    **Arguments:**

    - `path`: of the file.

    **Returns:**

    The rules in their order.

    **Raises:**

    `OSError` if it cannot be read; `ValueError` if it is no TOML, has other keys, or a
    value that the spec refuses: the message names file and rule.

    !!! example

        ```toml
        [[rule]]
        pattern = ".*embedding.*"
        spec = "none"

        [[rule]]
        pattern = ".*weight"
        spec = "affine"
        bits = 4
        group_size = 64
        ```
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    tables = values.pop("rule", [])
    if values or not isinstance(tables, list) or not tables:
        found = ", ".join(values) or "none"
        raise ValueError(
            f"{path} must hold tables [[rule]] and nothing else, got "
            f"{'no rule' if not tables else f'also {found}'}. Begin each rule with a "
            "line [[rule]]."
        )
    return [_rule(table, f"{path}, rule {i + 1}") for i, table in enumerate(tables)]


def write_compression(
    run: RunFolder, rules: Sequence[Rule], facts: Mapping[str, Any]
) -> None:
    """Note in a run folder how its model is compressed; makes it a compressed run."""
    tables = [_table(rule) for rule in rules]
    run.write_compression({"format": _FORMAT, "rules": tables, **facts})


def compress_like(run: RunFolder, model: LanguageModel) -> LanguageModel:
    """A model in the form that the compressed run in a folder has.

    **Raises:**

    `ValueError` if what the folder says of it cannot be read.
    """
    values = run.read_compression()
    where = str(run.compression_path)
    if values.get("format") != _FORMAT or not isinstance(values.get("rules"), list):
        raise ValueError(
            f"{where} is not of format {_FORMAT}. Compress the run again with "
            "`capibara quantize`."
        )
    rules = [
        _rule(table, f"{where}, rule {i + 1}")
        for i, table in enumerate(values["rules"])
    ]
    return quantize(model, rules)[0]


def check_trainable(run: RunFolder) -> None:
    """Raise `ValueError` for a compressed run, whose training cannot go on."""
    if run.compression_path.exists():
        raise ValueError(
            f"{run.path} is a compressed run, which cannot be trained. Continue the "
            "run that it was made of."
        )


def _rule(table: Any, where: str) -> Rule:
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}.")
    arguments = dict(table)
    try:
        for name in ("pattern", "spec"):
            if not isinstance(arguments.get(name), str):
                raise ValueError(f"`{name}` must be text, got {arguments.get(name)!r}.")
        pattern, name = arguments.pop("pattern"), arguments.pop("spec")
        check_choice("spec", name, _SPECS)
        kind = _SPECS[name]
        known = () if kind is None else [f.name for f in dataclasses.fields(kind)]
        check_keys(f'spec = "{name}"', arguments, known)
        rule = Rule(pattern, None if kind is None else kind(**arguments))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if getattr(rule.spec, "activations", None) == "static_int8":
        raise ValueError(
            f'{where}: activations = "static_int8" needs a calibration, which only '
            "`transforms.quantize(model, rules, calibration=found)` takes. Write "
            '"int8", which rounds every token by a step of its own.'
        )
    return rule


def _table(rule: Rule) -> dict[str, Any]:
    by_kind = {kind: name for name, kind in _SPECS.items() if kind is not None}
    if rule.spec is None:
        return {"pattern": rule.pattern, "spec": "none"}
    values = dataclasses.asdict(rule.spec)
    # As a word: JSON holds no dtype.
    given = {
        name: str(value) if name == "scale_dtype" else value
        for name, value in values.items()
        if value is not None
    }
    return {"pattern": rule.pattern, "spec": by_kind[type(rule.spec)], **given}
