"""What `--encode` asks for, as plain data: built once, stored in the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe_keys import check_section, field_schemas

ENCODES = ("int8",)


@dataclass(frozen=True)
class EncodeRecipe:
    """to: of ENCODES. int8: every linear of every block, rounded to nearest, one scale for each output."""

    to: str = field(default="int8", metadata={"choices": ENCODES})

    def __post_init__(self) -> None:
        if self.to not in ENCODES:
            raise RecipeError(f"encode to {self.to!r}; choose from {', '.join(ENCODES)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps and from_dict reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> EncodeRecipe:
        """A recipe from plain types; RecipeError on unknown keys."""
        check_section(raw, field_schemas(cls))
        return cls(**raw)
