"""The only module that prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from llmsqueeze.units import size as size

# Characters of a message.
LONGEST = 2000


class Console:
    """json: the result is one JSON document. quiet: no notes or progress. progress: bars allowed.

    mute: nothing at all, for the ranks of a run that are not the first.
    """

    def __init__(
        self, *, json: bool, quiet: bool, verbose: bool, progress: bool, mute: bool = False
    ) -> None:
        self.json = json
        self.quiet = quiet or mute
        self.verbose = verbose and not mute
        self._progress = progress
        self._mute = mute
        self._err = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """One line about what is happening."""
        if not self.quiet:
            self._err.print(shown(message), markup=False)

    def urgent(self, message: str) -> None:
        """A note from a signal handler, which may have interrupted another in the middle."""
        if not self.quiet:
            os.write(sys.stderr.fileno(), f"{message}\n".encode())

    def error(self, message: str, exit_code: int) -> None:
        """One line about what went wrong; with --json also the document that stdout owes."""
        if self._mute:
            return
        line = shown(" ".join(message.split()))
        self._err.print(Text.assemble(("error:", "bold red"), " ", line))
        self._annotate(line)
        if self.json:
            print(json.dumps({"error": line, "exit_code": exit_code}))

    def failed(self, message: str) -> None:
        """One line about a condition that a result does not meet; the result itself is out already."""
        if self._mute:
            return
        self._err.print(Text.assemble(("failed:", "bold red"), " ", shown(message)))
        self._annotate(message)

    def _annotate(self, message: str) -> None:
        """The same for GitHub Actions, which shows such a line beside the job."""
        if os.environ.get("GITHUB_ACTIONS") == "true":
            data = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            print(f"::error title=llmsqueeze::{data}", file=sys.stderr)

    def result(self, document: dict[str, Any], *tables: Table) -> None:
        """The outcome: one JSON document, or tables for people."""
        if self._mute:
            return
        if self.json:
            print(json.dumps(document, ensure_ascii=False, allow_nan=False))
            return
        out = RichConsole(file=sys.stdout, highlight=False)
        for table in tables:
            out.print(table)

    def stream(self, text: str) -> None:
        """A piece of the outcome as it comes, with nothing added; not with --json."""
        if not self.json and not self._mute:
            print(text, end="", flush=True)

    @contextlib.contextmanager
    def steps(self) -> Iterator[Callable[[str, int, int, str], None]]:
        """Progress as (what, done, total, detail): a bar with ETA on a terminal, else a line per step."""
        if self.quiet:
            yield lambda what, done, total, detail: None
        elif self._progress and self._err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            tasks: dict[str, TaskID] = {}
            with Progress(*columns, console=self._err, transient=True) as bar:

                def advance(what: str, done: int, total: int, detail: str) -> None:
                    if what not in tasks:
                        tasks[what] = bar.add_task(what, total=total, detail="")
                    bar.update(tasks[what], completed=done, total=total, detail=detail)

                yield advance
        else:
            started: dict[str, float] = {}
            first: dict[str, int] = {}  # a run that goes on has not done those before
            opened = time.monotonic()

            def line(what: str, done: int, total: int, detail: str) -> None:
                # The first step of each kind began when the one before ended, or the whole did.
                begun = started.setdefault(what, max([opened, *started.values()]))
                own = done - first.setdefault(what, done) + 1
                left = (time.monotonic() - begun) / own * (total - done)
                parts = (f"{what} {done}/{total}", detail, f"{left:.0f} s left")
                self.note("  ".join(part for part in parts if part))

            yield line


def facts(title: str, rows: dict[str, str]) -> Table:
    """A two-column table of named facts."""
    table = Table(title=Text(shown(title)), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(Text(shown(name)), Text(shown(value)))
    return table


def shown(text: str) -> str:
    """As a terminal may have it: names in damaged files are long, and hold what moves cursors."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
