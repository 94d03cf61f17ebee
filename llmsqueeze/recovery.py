"""How much of the dense model's score on a task is left, and the gates on that."""

from __future__ import annotations

import math
import re
from typing import Any

from llmsqueeze.conditions import Condition
from llmsqueeze.errors import DataError, RecipeError

# What two measurements of a task must share to be compared.
SETTINGS = ("num_fewshot", "items", "bos", "max_length", "requests_sha256")
# Standard errors above chance below which a dense model's score says nothing.
ABOVE_CHANCE = 2.0


def recovery(value: float | None, dense: float | None, better: bool | None) -> float | None:
    """The share of the dense model's score that is left: value / dense, of errors dense / value.

    better: whether a higher score is; None if nobody knows. None where there is no such share.
    """
    if value is None or dense is None or better is None:
        return None
    above, below = (value, dense) if better else (dense, value)
    return above / below if below > 0 and math.isfinite(above / below) else None


def compare(mine: dict[str, Any], dense: dict[str, Any]) -> None:
    """Put beside every task of a report what the dense model has, and what is left of it.

    mine, dense: "tasks" of two reports; a task that the dense one lacks has no recovery. DataError when
    one was measured with other settings.
    """
    for name, entry in mine.items():
        other = dense.get(name)
        if not isinstance(other, dict):
            continue
        for setting in SETTINGS:
            if other.get(setting) != entry[setting]:
                raise DataError(
                    f"task {name}: {setting} of the dense model was {other.get(setting)!r}, now it is "
                    f"{entry[setting]!r}; measure the dense model again"
                )
        scores: dict[str, Any] = {}
        for metric, better in entry["higher_is_better"].items():
            for column in (metric, f"{metric}_stderr"):
                scores[column] = _number(other.get(column))
            entry[f"{metric}_recovery"] = recovery(entry[metric], scores[metric], better)
        entry["dense"] = scores
        entry["recovery"] = entry[f"{entry['metric']}_recovery"]


def check_requests(sha256: dict[str, str], dense: dict[str, Any], where: str) -> None:
    """DataError if a task of the dense model's report asked other things; before anything is measured.

    sha256: of a task's requests, by its name in a report.
    """
    for name, mine in sha256.items():
        other = dense.get(name)
        if isinstance(other, dict) and other.get("requests_sha256") != mine:
            raise DataError(
                f"{where}: the requests of task {name} were others, of {other.get('items')} items with "
                f"{other.get('num_fewshot')} examples each; measure the dense model again"
            )


def warnings(entries: dict[str, Any]) -> list[str]:
    """Where requests were cut, and where the dense model itself hardly beats guessing."""
    # Counted for all tasks of a group at once.
    cut = {(entry["truncated"], entry["max_length"]) for entry in entries.values()}
    messages = [
        f"warning: {count} requests of tasks were longer than the model's {length} tokens, and cut"
        for count, length in sorted(cut)
        if count
    ]
    for name, entry in entries.items():
        dense, chance, metric = entry.get("dense"), entry["chance"], entry["metric"]
        if not dense or chance is None or not metric.startswith("acc"):
            continue
        score, error = dense[metric], dense[f"{metric}_stderr"]
        if score is not None and error is not None and score - chance < ABOVE_CHANCE * error:
            messages.append(
                f"warning: {name}: the dense model's {metric} of {score:.3f} ± {error:.3f} is hardly above "
                f"chance ({chance:.3f}): its recovery says nothing"
            )
    return messages


def parse_gates(texts: tuple[str, ...]) -> tuple[float | None, dict[str, float]]:
    """The least recovery of every task, and of those named; from "0.95" and "piqa=0.97"."""
    everywhere: float | None = None
    named: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(?:([\w.-]+)\s*=\s*)?(\d+(?:\.\d*)?|\.\d+)\s*", text)
        if not match:
            raise RecipeError(
                f"--min-recovery {text!r}: write a share, or TASK=SHARE, as in 0.95 or piqa=0.97"
            )
        if match[1] in named:
            raise RecipeError(f"--min-recovery {text}: the share of {match[1]} is given twice")
        if match[1]:
            named[match[1]] = float(match[2])
        elif everywhere is None:
            everywhere = float(match[2])
        else:
            raise RecipeError(f"--min-recovery {text}: the share of all tasks is given twice")
    return everywhere, named


def gates(
    everywhere: float | None, named: dict[str, float], judged: list[str], known: set[str]
) -> list[Condition]:
    """The conditions under which a report fails; judged: tasks that `everywhere` is for; known: all names.

    A named one is a task, or TASK.METRIC; RecipeError if there is no such task.
    """
    limits = {} if everywhere is None else dict.fromkeys(judged, everywhere)
    own: dict[str, float] = {}
    conditions = []
    for name, limit in named.items():
        task, dot, metric = name.partition(".")
        task = key_of(task)
        if task not in known:
            raise RecipeError(
                f"--min-recovery {name}={limit:g}: no such task here; there are {', '.join(sorted(known))}"
            )
        if dot:
            conditions.append(Condition(f"tasks.{task}.{metric}_recovery", "<", limit))
            # The metric that was asked for is judged instead of what the share of all tasks is for.
            limits.pop(task, None)
        else:
            own[task] = limit
    limits |= own
    return [Condition(f"tasks.{task}.recovery", "<", least) for task, least in limits.items()] + (
        conditions
    )


def key_of(name: str) -> str:
    """The name of a task or metric as the report has it: a path into that is a condition's."""
    return re.sub(r"\W", "_", name)


def rows(entries: dict[str, Any]) -> dict[str, str]:
    """A line for every metric."""
    found = {}
    for name, entry in entries.items():
        for metric in entry["higher_is_better"]:
            parts = [_score(entry, metric)]
            if dense := entry.get("dense"):
                parts.append(f"dense {_score(dense, metric)}")
                share = entry[f"{metric}_recovery"]
                parts.append("no recovery" if share is None else f"recovery {share:.3f}")
            found[f"{name} {metric}"] = ", ".join(parts)
    return found


def _score(scores: dict[str, Any], metric: str) -> str:
    value, error = scores[metric], scores.get(f"{metric}_stderr")
    if value is None:
        return "not measured"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _number(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
