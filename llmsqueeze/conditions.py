"""Conditions on a report under which a command ends with exit code 1: what a pipeline lets pass."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmsqueeze.errors import RecipeError

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Condition:
    """metric: a path into the report, as token_ppl or passkey.accuracy; compare: of _COMPARE."""

    metric: str
    compare: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} {self.compare} {_text(self.limit)}"

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From "METRIC < NUMBER"; RecipeError on anything else."""
        match = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*", text)
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if not match or not math.isfinite(limit):
            raise RecipeError(
                f"--fail-if {text!r}: write METRIC, <, <=, >, >=, == or !=, and a number, as in "
                '"token_ppl_ratio > 1.05"'
            )
        return cls(match[1], match[2], limit)


@dataclass(frozen=True)
class Outcome:
    """value: None if the report has no such number."""

    condition: Condition
    value: float | None

    @property
    def failed(self) -> bool:
        """Whether the condition holds, or cannot be told: what was not measured passes nothing."""
        if self.value is None or math.isnan(self.value):
            return True
        return _COMPARE[self.condition.compare](self.value, self.condition.limit)

    def __str__(self) -> str:
        found = "not in the report" if self.value is None else _text(self.value)
        return f"{self.condition}: {found}"

    def describe(self) -> dict[str, Any]:
        """For reports."""
        known = self.value is not None and math.isfinite(self.value)
        value = self.value if known else None
        return {"fail_if": str(self.condition), "value": value, "failed": self.failed}


def judge(document: dict[str, Any], conditions: Iterable[Condition]) -> list[Outcome]:
    """Every condition on a report."""
    return [Outcome(condition, _find(document, condition.metric)) for condition in conditions]


def _text(number: float) -> str:
    whole = math.isfinite(number) and number == round(number) and abs(number) < 1e15
    return str(round(number)) if whole else f"{number:g}"


def _find(document: Any, path: str) -> float | None:
    for name in path.split("."):
        document = document.get(name) if isinstance(document, dict) else None
    number = isinstance(document, (int, float)) and not isinstance(document, bool)
    return float(document) if number else None


def parse_size(text: str) -> int:
    """Bytes of "180MB", "1.5 GB" or "1000"; units are decimal."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text, re.IGNORECASE)
    if not match:
        raise RecipeError(f"size {text!r}: write a number and kB, MB, GB or TB, as in 180MB")
    return round(float(match[1]) * _UNITS[match[2].lower()])
