"""What a run was asked to do, as plain data: built once, stored in the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
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

DTYPES = ("auto", "float32", "bfloat16", "float16")
ORDERS = ("group", "block")


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
    ignore: linears left dense; a full module name, its last components, or `re:` and a regular
    expression searched in the full name. dtype: of the calibration's computation.
    batch: calibration samples per forward pass; 0 lets the device decide. order: see calibrate.walk.
    """

    method: str
    target: Target
    config: Any
    refit: str = "none"
    refit_config: Any = None
    allocation: str = "uniform"
    allocation_config: Any = None
    tiles: str = "score"
    tiles_config: Any = None
    dense_share: float = 0.25
    ignore: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    dtype: str = "auto"
    batch: int = 0
    order: str = "group"

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
        target = take_section(raw, "target", ("sparsity", "pattern", "tile", "channel_budget"))
        if "channel_budget" in target:
            target["budget"] = target.pop("channel_budget")
        calibration = take_section(raw, "calibration", [f.name for f in fields(Calibration)])
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
        training = raw.pop("tiles_config", None)
        if tiles != "score" and isinstance(training or {}, dict):
            training = {**(training or {}), "mode": tiles, "seed": calibration.get("seed", 0)}
        for key in raw:
            if key not in {f.name for f in fields(cls)}:
                raise RecipeError(f"recipe: unknown key {key!r}")
        try:
            return cls(
                method=method,
                target=Target.parse(**target),
                config=make_config(weight_method(method), method, raw.pop("config", None)),
                refit=refit,
                refit_config=make_config(refit_method(refit), refit, raw.pop("refit_config", None)),
                allocation=allocation,
                allocation_config=make_config(
                    allocation_method(allocation), allocation, raw.pop("allocation_config", None)
                ),
                tiles=tiles,
                tiles_config=make_config(load_entry(TILE_MODES, tiles), tiles, training),
                calibration=Calibration(**calibration),
                ignore=tuple(raw.pop("ignore", None) or ()),
                **raw,
            )
        except TypeError as error:  # a value of the wrong kind
            raise RecipeError(f"recipe: {error}") from error


def allocation_needs(recipe: PruneRecipe) -> frozenset[str]:
    """Statistics of the dense model that the allocation needs."""
    allocation = allocation_method(recipe.allocation)
    return allocation.needs(recipe.allocation_config) if allocation else frozenset()


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe file: YAML in the shape of PruneRecipe.to_dict, any part left out."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: not a mapping of recipe keys to values")
    return raw


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


def take_section(raw: dict[str, Any], name: str, known: Iterable[str]) -> dict[str, Any]:
    """A mapping within a recipe, removed from `raw`; RecipeError on unknown keys."""
    section = raw.pop(name, None) or {}
    if not isinstance(section, dict):
        raise RecipeError(f"recipe: {name} is not a mapping")
    for key in section:
        if key not in known:
            raise RecipeError(f"recipe: unknown key {key!r} in {name}")
    return dict(section)


def make_config(module: Any, name: str, given: dict[str, Any] | None) -> Any:
    """The Config of a method from a mapping; RecipeError on settings that it does not have."""
    given = given or {}
    if not isinstance(given, dict):
        raise RecipeError(f"recipe: the settings of {name} are not a mapping")
    known = {f.name for f in fields(module.Config)} if module else set()
    for key in given:
        if key not in known:
            raise RecipeError(f"recipe: {name} has no setting {key!r}")
    return module.Config(**given) if module else None


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
