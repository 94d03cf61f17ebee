"""A report on disk: all of its files, or none."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsqueeze.artifact import check_output, publish_directory
from llmsqueeze.errors import ResourceError
from llmsqueeze.report.page import page
from llmsqueeze.report.text import junit, markdown

REPORT_NAME = "report.json"


def check_report(out: Path, overwrite: bool) -> None:
    """RecipeError unless `out` is free, or a report that may be replaced."""
    check_output(out, overwrite, mark=REPORT_NAME, kind="report")


def write(report: Mapping[str, Any], out: Path, *, overwrite: bool = False) -> list[str]:
    """Write a report (schema.REPORT_SCHEMA) to the directory `out`; the names of its files.

    It is complete or absent: the files are written beside it and renamed last.
    """
    check_report(out, overwrite)
    files = {
        REPORT_NAME: json.dumps(report, indent=1, allow_nan=False) + "\n",
        "report.md": markdown(report),
        "junit.xml": junit(report),
        "report.html": page(report),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    except OSError as error:
        raise ResourceError(f"cannot write to {out.parent} ({error.strerror})") from error
    try:
        for name, text in files.items():
            (Path(made) / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        publish_directory(Path(made), out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return list(files)
