import argparse
import dataclasses
from typing import Any

from ..train import RunConfig, setting_types


def add_settings(parser: argparse.ArgumentParser, defaults: dict[str, Any]) -> None:
    """One flag for each field of `RunConfig`; only given flags appear in the result."""
    types = setting_types()
    for field in dataclasses.fields(RunConfig):
        kinds = types[field.name]
        default = defaults.get(field.name, field.default)
        shown = "none" if default is None else default
        text = f"{field.metadata['help']} (default: {shown})"
        flag = "--" + field.name.replace("_", "-")
        if bool in kinds:
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text,
            )
        else:
            parser.add_argument(
                flag,
                type=_parser(field.name, kinds),
                default=argparse.SUPPRESS,
                metavar=_metavar(kinds),
                help=text.replace("%", "%%"),
            )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by name."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def byte_or_none(text: str) -> int | None:
    """The value of a flag that names a byte, 0 to 255, or `none`."""
    if text == "none":
        return None
    if text.isascii() and text.isdecimal() and int(text) < 256:
        return int(text)
    raise argparse.ArgumentTypeError(
        f"expected a byte, 0 to 255, or none for no such byte, got {text!r}"
    )


def _parser(name, kinds):
    def parse(text: str) -> Any:
        if text == "none" and type(None) in kinds:
            return None
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError:
                    continue
        if str in kinds:
            return text
        raise argparse.ArgumentTypeError(
            f"expected {_metavar(kinds).lower()}, got {text!r}"
        )

    parse.__name__ = name
    return parse


def _metavar(kinds) -> str:
    names = {int: "INT", float: "NUMBER", str: "TEXT"}
    words = [names[kind] for kind in names if kind in kinds]
    return "|".join(words + ["none"] * (type(None) in kinds))
