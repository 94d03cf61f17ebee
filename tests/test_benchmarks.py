"""The scripts behind README's tables still start: their figures cannot be checked here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(p.stem for p in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as done:
        script.main()
    assert done.value.code == 0


def test_every_row_of_the_quality_tables_is_a_recipe() -> None:
    from llmsqueeze.recipe import PruneRecipe
    from tests.benchmarks.quality_table import TABLES

    for rows in TABLES.values():
        for row in rows:
            assert PruneRecipe.from_dict(row).method
