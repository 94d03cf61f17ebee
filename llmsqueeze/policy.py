"""Which tokens are gated where a pass takes several: how recipes, manifests and options say it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmsqueeze.errors import RecipeError

# While perplexity is measured. As text is decoded: every token but the first few, which in many models all
# others lean on.
DEFAULT_GATE = "after:4"


@dataclass(frozen=True)
class Policy:
    """Which tokens of a pass over several are gated.

    kind "dense": none. "all": all. "tail": the last `value` of them, a share. "after": all but the first
    `value`. A pass over one token is decoding, and gated by every policy.
    """

    kind: str
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Policy:
        """dense, all, tail:SHARE or after:TOKENS; RecipeError on anything else."""
        if text in ("dense", "all"):
            return cls(text)
        if match := re.fullmatch(r"tail:(0?\.\d+|0|1|1\.0+)", text):
            return cls("tail", float(match[1]))
        if match := re.fullmatch(r"after:(\d{1,6})", text):
            return cls("after", int(match[1]))
        raise RecipeError(
            f"unknown policy {text!r}; use dense, all, tail:SHARE (tail:0.5) or after:TOKENS (after:4)"
        )

    def __str__(self) -> str:
        return self.kind if self.kind in ("dense", "all") else f"{self.kind}:{self.value:g}"

    def first_gated(self, length: int) -> int:
        """The first gated position of a pass over `length` tokens; `length` if there is none."""
        if length == 1 or self.kind == "all":
            return 0
        if self.kind == "dense":
            return length
        if self.kind == "tail":
            return length - math.floor(self.value * length + 1e-9)
        return min(length, int(self.value))
