"""What a run was asked to do, as plain data: built once, stored in the manifest."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmsqueeze.errors import RecipeError
from llmsqueeze.methods import (
    ALLOCATIONS,
    DEFAULT_METHOD,
    DEFAULT_REFIT,
    DEFAULT_TILE_ALLOCATION,
    REFITS,
    TILE_MODES,
    WEIGHT_METHODS,
    Entry,
    allocation_method,
    load_entry,
    refit_method,
    weight_method,
)
from llmsqueeze.methods.base import Target, Tile
from llmsqueeze.recipe_keys import check_section, field_schemas, suggest, type_schema

DTYPES = ("auto", "float32", "bfloat16", "float16")
ORDERS = ("group", "block")
# Keys of a recipe's target, and Target.parse's names for them.
TARGET_KEYS = {
    "sparsity": "sparsity",
    "pattern": "pattern",
    "tile": "tile",
    "channel_budget": "budget",
}


def resolved(choices: Iterable[str] = ()) -> dict[str, Any]:
    """Metadata of a field that from_dict resolves; see recipe_keys."""
    return {"choices": tuple(choices), "resolved": True}


@dataclass(frozen=True)
class Calibration:
    """Which tokens statistics are gathered on.

    text: None means the bundled texts. seqlen: None means 2048, or less if the model has less.
    """

    text: str | None = None
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    bos: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples}: at least one sample is needed")
        if self.seqlen is not None and self.seqlen < 2:
            raise RecipeError(f"--seqlen {self.seqlen}: a window needs at least two tokens")


@dataclass(frozen=True)
class PruneRecipe:
    """mask × refit × allocation × pattern, and on which tokens.

    method, refit, allocation: names of methods/__init__.py's tables, each with its Config.
    tiles: of TILE_MODES; anything but "score" trains masks on the whole model, from Wanda's.
    dense_share: how far weights are fitted to what the dense model computes in their place
    (InputStats.product), where a method or refit fits at all.
    expert_tokens: an expert's linear with fewer tokens than this times its inputs is not fitted to them, but
    pruned by wanda, and with nearly none by magnitude.
    ignore: linears left dense; a full module name, its last components, or `re:` and a regular
    expression searched in the full name. dtype: of the calibration's computation.
    batch: calibration samples per forward pass; 0 lets the device decide. order: see calibrate.walk.
    """

    method: str = field(metadata=resolved(WEIGHT_METHODS))
    target: Target
    config: Any
    refit: str = field(default="none", metadata=resolved(REFITS))
    refit_config: Any = None
    allocation: str = field(default="uniform", metadata=resolved(ALLOCATIONS))
    allocation_config: Any = None
    tiles: str = field(default="score", metadata=resolved(TILE_MODES))
    tiles_config: Any = None
    dense_share: float = 0.25
    expert_tokens: float = 1.0
    ignore: tuple[str, ...] = field(default=(), metadata=resolved())
    calibration: Calibration = field(default_factory=Calibration)
    dtype: str = field(default="auto", metadata={"choices": DTYPES})
    batch: int = 0
    order: str = field(default="group", metadata={"choices": ORDERS})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if self.order not in ORDERS:
            raise RecipeError(f"order {self.order!r}; choose from {', '.join(ORDERS)}")
        if self.batch < 0:
            raise RecipeError(f"--batch-size {self.batch}: give a positive number of samples")
        if self.tiles != "score":
            if not isinstance(self.target.pattern, Tile):
                raise RecipeError(f"--tiles {self.tiles} needs --pattern tile")
            if self.method != "wanda" or self.allocation != "uniform":
                raise RecipeError(
                    f"--tiles {self.tiles} trains masks from Wanda's, over the whole model: leave "
                    "--method and --allocation out"
                )
        if not 0 <= self.dense_share <= 1:
            raise RecipeError(f"--dense-share {self.dense_share} is outside [0, 1]")
        if not 0 <= self.expert_tokens <= 1000:
            raise RecipeError(f"--expert-tokens {self.expert_tokens} is outside [0, 1000]")
        check_ignore(self.ignore)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that pruning and refitting need; empty means no calibration data."""
        needs = weight_method(self.method).needs(self.config)
        refit = refit_method(self.refit)
        return needs | refit.needs(self.refit_config) if refit else needs

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what the manifest keeps and from_dict reads."""
        raw = asdict(self)
        pattern = self.target.pattern
        raw["target"] = {"sparsity": self.target.sparsity, "pattern": self.target.pattern_name}
        if isinstance(pattern, Tile):
            raw["target"]["tile"] = pattern.size
        elif pattern and pattern.axis == "out":
            raw["target"]["channel_budget"] = pattern.budget
        raw["ignore"] = list(self.ignore)
        if not self.needs and not allocation_needs(self):
            raw["calibration"] = None
        for section in ("refit_config", "allocation_config", "tiles_config"):
            if raw[section] is None:
                del raw[section]
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> PruneRecipe:
        """A recipe from plain types, what is left out at its default; RecipeError on unknown keys."""
        raw = dict(raw)
        check_section(raw, field_schemas(cls), [f.name for f in fields(cls)])
        target = take_section(raw, "target", target_schemas())
        calibration = take_section(raw, "calibration", field_schemas(Calibration))
        # A method that was asked for by name runs as published; the default is the best we know.
        named = raw.pop("method", None)
        tiles = raw.pop("tiles", None) or "score"
        if tiles != "score":
            named = named or "wanda"
        method = named or DEFAULT_METHOD
        refit = raw.pop("refit", None) or ("none" if named else DEFAULT_REFIT)
        spread = target.get("pattern") == "tile" and not named
        allocation = raw.pop("allocation", None) or (
            DEFAULT_TILE_ALLOCATION if spread else "uniform"
        )
        training = raw.get("tiles_config")
        if tiles != "score" and isinstance(training or {}, dict):
            follows = {"mode": tiles, "seed": calibration.get("seed", 0)}
            raw["tiles_config"] = {**(training or {}), **follows}
        return cls(
            method=method,
            target=_parse_target(target),
            config=make_config(weight_method(method), method, raw, "config"),
            refit=refit,
            refit_config=make_config(refit_method(refit), refit, raw, "refit_config"),
            allocation=allocation,
            allocation_config=make_config(
                allocation_method(allocation), allocation, raw, "allocation_config"
            ),
            tiles=tiles,
            tiles_config=make_config(load_entry(TILE_MODES, tiles), tiles, raw, "tiles_config"),
            calibration=Calibration(**calibration),
            ignore=tuple(raw.pop("ignore", None) or ()),
            **raw,
        )


def _parse_target(given: dict[str, Any]) -> Target:
    try:
        return Target.parse(**{TARGET_KEYS[key]: value for key, value in given.items()})
    except RecipeError as error:
        raise error.within("target") from error


def allocation_needs(recipe: PruneRecipe) -> frozenset[str]:
    """Statistics of the dense model that the allocation needs."""
    allocation = allocation_method(recipe.allocation)
    return allocation.needs(recipe.allocation_config) if allocation else frozenset()


def place_options(raw: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`raw` with options of the methods' Configs put where they belong.

    RecipeError on an option that none of the recipe's methods has.
    """
    raw = dict(raw)
    chosen = {
        "config": (WEIGHT_METHODS, raw.get("method") or DEFAULT_METHOD),
        "refit_config": (
            REFITS,
            raw.get("refit") or ("none" if raw.get("method") else DEFAULT_REFIT),
        ),
        "allocation_config": (ALLOCATIONS, raw.get("allocation") or "uniform"),
        "tiles_config": (TILE_MODES, raw.get("tiles") or "score"),
    }
    for name, value in options.items():
        for section, (table, choice) in chosen.items():
            if name in config_fields(table, choice):
                raw[section] = {**(raw.get(section) or {}), name: value}
                break
        else:
            owners = [c for t, _ in chosen.values() for c in t if name in config_fields(t, c)]
            flag = "--" + name.replace("_", "-")
            raise RecipeError(
                f"{flag} belongs to {', '.join(owners)}, which this recipe does not use"
            )
    return raw


def config_fields(table: dict[str, Entry], name: str) -> dict[str, Any]:
    """The dataclass fields of a method's Config by name; none when the choice is to do nothing."""
    module = load_entry(table, name)
    return {f.name: f for f in fields(module.Config)} if module else {}


def target_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of the keys of a recipe's target, from Target.parse."""
    hints = typing.get_type_hints(Target.parse)
    defaults = inspect.signature(Target.parse).parameters
    found = {}
    for key, name in TARGET_KEYS.items():
        found[key] = type_schema(hints[name]) or {}
        if defaults[name].default is not None:
            found[key]["default"] = defaults[name].default
    return found


def take_section(
    raw: dict[str, Any], name: str, schemas: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """A mapping within a recipe, removed from `raw`; RecipeError on unknown keys and wrong values."""
    section = raw.pop(name, None) or {}
    if not isinstance(section, dict):
        raise RecipeError("not a mapping of keys to values", (name,))
    try:
        check_section(section, schemas)
    except RecipeError as error:
        raise error.within(name) from error
    return dict(section)


def make_config(module: Any, name: str, raw: dict[str, Any], section: str) -> Any:
    """The Config of a method from a section of `raw`, removed; RecipeError on what it does not have."""
    known = field_schemas(module.Config) if module else {}
    given = raw.get(section) or {}
    for key in given if isinstance(given, dict) else ():
        if key not in known:
            hint = suggest(key, known)
            raise RecipeError(f"{name} has no setting {key!r}{hint}", (section, str(key)))
    given = take_section(raw, section, known)
    try:
        return module.Config(**given) if module else None
    except RecipeError as error:
        raise error.within(section) from error


def check_ignore(patterns: tuple[str, ...]) -> None:
    """RecipeError on a pattern that is no regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise RecipeError(f"--ignore {pattern}: not a regular expression") from error


def is_ignored(name: str, patterns: tuple[str, ...]) -> list[str]:
    """The patterns that exclude the module `name`."""
    return [
        pattern
        for pattern in patterns
        if (
            re.search(pattern[3:], name) if pattern.startswith("re:") else _ends_with(name, pattern)
        )
    ]


def _ends_with(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern)
