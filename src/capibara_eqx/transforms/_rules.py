import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..internal import nearest


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which weights a transform takes, and what it makes of them.

    **Arguments:**

    - `pattern`: a regular expression that matches whole paths, such as
        `r".*/attention/.*weight"`. A path is written
        `"stack/blocks/0/mixer/in_proj/weight"`.
    - `spec`: what becomes of those weights; `None` leaves them alone.

    **Raises:**

    `ValueError` for a pattern that is no regular expression.

    !!! example

        ```python
        rules = [Rule(r".*embedding.*", None), Rule(r".*weight", Affine(4))]
        ```
    """

    pattern: str
    spec: Any

    def __post_init__(self):
        if not isinstance(self.pattern, str):
            raise ValueError(
                f"`pattern` must be a string, got {self.pattern!r}. The order is "
                "Rule(pattern, spec)."
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"`pattern` must be a regular expression, got {self.pattern!r}: "
                f"{error}."
            ) from error

    def matches(self, path: str) -> bool:
        """Whether the pattern matches the whole path."""
        return re.fullmatch(self.pattern, path) is not None


def choose(
    function: str,
    rules: Sequence[Rule],
    weights: Iterable[str],
    others: Iterable[str] = (),
) -> dict[str, Rule]:
    """The first rule that matches each of the weights that one matches.

    **Arguments:**

    - `function`: the public name, for messages.
    - `rules`: at least one.
    - `weights`: paths of what the transform can take.
    - `others`: paths of other parameters, which a rule without a spec may name.

    **Raises:**

    `ValueError` for no rules, for what is no rule, a rule that matches nothing, or one
    that only matches what earlier rules have taken.
    """
    if isinstance(rules, Rule) or not rules:
        raise ValueError(
            f"{function}: `rules` must be a list of at least one Rule, got {rules!r}. "
            'For every weight pass [Rule(".*", spec)].'
        )
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(
                f"{function}: `rules` must hold Rules, got {rule!r}. Write "
                "Rule(pattern, spec)."
            )
    weights, others = list(weights), list(others)
    chosen: dict[str, Rule] = {}
    for path in weights:
        for rule in rules:
            if rule.matches(path):
                chosen[path] = rule
                break
    for rule in rules:
        if any(taken is rule for taken in chosen.values()):
            continue
        matched = [path for path in weights if rule.matches(path)]
        if matched:
            first = chosen[matched[0]]
            raise ValueError(
                f"{function}: the rule {rule.pattern!r} has no effect, for all that it "
                f"matches, such as {matched[0]!r}, is taken by the earlier rule "
                f"{first.pattern!r}. Put the special rule before the general one."
            )
        beside = [path for path in others if rule.matches(path)]
        if beside and rule.spec is None:
            continue
        raise ValueError(
            f"{function}: the rule {rule.pattern!r} matches no weight."
            f"{_hint(rule, weights, beside)}"
        )
    return chosen


def _hint(rule: Rule, weights: Sequence[str], beside: Sequence[str]) -> str:
    if beside:
        return (
            f" It matches {beside[0]!r}, which is not the matrix of a layer that this "
            "transform knows."
        )
    inside = [path for path in weights if re.search(rule.pattern, path)]
    if inside:
        return (
            f" A pattern must match a whole path: {'.*' + rule.pattern + '.*'!r} would "
            f"match {inside[0]!r}."
        )
    if not weights:
        return " The model has no weight that it could match."
    return (
        f" Weights are named like {weights[0]!r}; `transforms.report(model)` lists "
        f"them.{nearest(rule.pattern, weights)}"
    )
