"""`llmsqueeze report`: what was done and measured, as files for people and for pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmsqueeze.command import (
    checkpoint_options,
    common,
    condition_options,
    open_checkpoint,
    settle,
)
from llmsqueeze.conditions import Condition, Outcome, judge
from llmsqueeze.errors import RecipeError
from llmsqueeze.report.schema import REPORT_SCHEMA

if TYPE_CHECKING:
    from llmsqueeze.console import Console


# What conditions that were given to this command are called, to tell them from those of results.
OWN = "report"


def _print_schema(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(REPORT_SCHEMA, indent=1))
        context.exit()


@click.command(
    help="""Write what is known of checkpoints, and what was measured of them, to the new directory DIR.

WHAT are llmsqueeze checkpoints, and results: files (NAME.json) of what `eval`, `bench model` and
`bench kernels` printed with --json. Several results of eval become a picture of perplexity against bytes. A
result is matched with its checkpoint by the manifest's hash; one of a checkpoint that has changed since is
refused.

DIR gets report.json (with a versioned schema, and all that the others show), report.md (short, for the
summary of a pipeline's step), junit.xml (a case for every condition and every promise) and report.html (one
page that needs nothing else).

Conditions that results were given (`eval --fail-if`, `--max-size`, …) are reported with their outcome, and
end only the command they were given to. --fail-if here is judged on every result that has the number, and
ends with exit code 1 once DIR is there. What no result has fails, and so does every condition when a result
is an error, as commands print it with --json.
"""
)
@click.argument("what", nargs=-1, required=True)
@click.option("-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path),
              help="New directory.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a report that stands at DIR.")
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON Schema of report.json, and do nothing else.")  # fmt: skip
@condition_options
@checkpoint_options
@common
def report(
    console: Console,
    what: tuple[str, ...],
    out: Path,
    overwrite: bool,
    fail_if: tuple[str, ...],
    offline: bool,
    cache_dir: Path,
) -> None:
    conditions = [Condition.parse(condition) for condition in fail_if]
    if len(set(what)) < len(what):
        raise RecipeError(f"{max(what, key=what.count)} is given twice")

    from llmsqueeze.report import document as library
    from llmsqueeze.report.files import check_report, write

    check_report(out, overwrite)
    results = [library.read_result(Path(w)) for w in what if w.endswith(".json")]
    opened = [
        open_checkpoint(console, w, offline, cache_dir) for w in what if not w.endswith(".json")
    ]
    with console.steps() as progress:
        made = library.build(
            opened, results, lambda done, total: progress("checkpoint", done, total, "")
        )
    judged = _judge(made["results"], conditions)
    outcomes = [outcome for _, outcome in judged]
    made["conditions"] += [{"of": of, **outcome.describe()} for of, outcome in judged]
    made["failed"] |= any(outcome.failed for outcome in outcomes)
    files = write(made, out, overwrite=overwrite)
    document = {
        "out": str(out),
        "files": files,
        **{key: made[key] for key in ("schema", "failed", "conditions", "checks", "warnings")},
    }
    for message in made["warnings"]:
        console.note(f"warning: {message}")
    settle(console, document, str(out), _rows(made, files), outcomes)


def _judge(results: list[dict[str, Any]], conditions: list[Condition]) -> list[tuple[str, Outcome]]:
    """Every condition on every result that has its number, and on which; what none has, or an error kept
    back, fails."""
    outcomes = []
    broken = any(result["kind"] == "error" for result in results)
    for condition in conditions:
        found = [(f"{OWN} on {r['label']}", judge(r["document"], [condition])[0]) for r in results]
        known = [(of, outcome) for of, outcome in found if outcome.value is not None]
        outcomes += known
        if broken or not known:
            outcomes.append((OWN, Outcome(condition, None)))
    return outcomes


def _rows(made: dict[str, Any], files: list[str]) -> dict[str, str]:
    from llmsqueeze.report.text import headline

    rows = {"outcome": headline(made)}
    for entry in made["conditions"]:
        if not entry["of"].startswith(OWN):  # settle adds those
            name = f"{entry['of']}: fail if {entry['fail_if']}"
            rows[name] = "FAILED" if entry["failed"] else "passed"
    for entry in made["checks"]:
        rows[f"{entry['of']}: {entry['name']}"] = f"{entry['status']}: {entry['detail']}"
    return rows | {"files": ", ".join(files)}
