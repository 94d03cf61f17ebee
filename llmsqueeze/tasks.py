"""Tasks of lm-eval: by name, or from files on this machine, run on one model, with the exact requests hashed.

Importing this imports lm-eval, which takes seconds. Nothing here reaches for the network but `load`, and
that only for a named data set that is not on this machine.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import huggingface_hub
import numpy as np
import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from llmsqueeze import untrusted
from llmsqueeze.errors import DataError, LlmsqueezeError, RecipeError
from llmsqueeze.harness import HarnessLM
from llmsqueeze.recipe_file import check_yaml
from llmsqueeze.recovery import key_of

# lm-eval's own seed: few-shot examples are those that it would choose.
SEED = 1234
# Resamples for the standard error of metrics that have no formula for it.
BOOTSTRAPS = 1000

# Bytes of a file of items, which takes some ten times as much memory.
MOST_ITEMS = 256 * 2**20

# Perplexity per token is another thing, and called so: these names say what they count.
_NAMES = {"word_perplexity": "word_ppl", "byte_perplexity": "byte_ppl"}
# Of an item in a .json or .jsonl file.
_ITEM_KEYS = ("query", "choices", "gold")


@dataclass(frozen=True)
class Suite:
    """What one name or file stands for: a task, or several. loaded: of lm-eval's TaskManager.

    judged: names in the report that stand for it: a group's average, else every task. sha256: of all
    requests, answers and scoring, by each name that it has there. limit: items of every task, at most.
    """

    spec: str
    loaded: Any
    judged: tuple[str, ...]
    sha256: dict[str, str]
    limit: int | None


def split_specs(texts: tuple[str, ...]) -> list[str]:
    """Names and files of "a,b" and "c"; RecipeError when one is there twice or empty."""
    specs = [spec.strip() for text in texts for spec in text.split(",")]
    if "" in specs:
        raise RecipeError(
            "--tasks: a name is empty; write them with commas between, as in piqa,boolq"
        )
    for spec in specs:
        if specs.count(spec) > 1:
            raise RecipeError(f"--tasks: {spec} is there twice")
    return specs


def load(
    specs: list[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    offline: bool = False,
    note: Callable[[str], None] = lambda message: None,
) -> list[Suite]:
    """The tasks that names and files stand for, with all their requests built once.

    num_fewshot: examples before every item; None: what the task says, else none. Raises RecipeError for an
    unknown name, DataError when a file is no task or a data set is not to be had.
    """
    named = [spec for spec in specs if not _is_file(spec)]
    if named:
        note("looking up the tasks that lm-eval knows")
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise RecipeError(f"--tasks: lm-eval has no task {name!r}; {hint}")
    suites = []
    for spec in specs:
        loaded = _loaded(manager, spec, offline, note)
        with _readable(spec), offline_mode(), _contained():
            suites.append(_suite(spec, loaded, num_fewshot, limit, note))
    keys = [key for suite in suites for key in suite.sha256]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(
                f"--tasks: there are two tasks called {key}; give another name to one"
            )
    return suites


def run(suite: Suite, model: HarnessLM) -> dict[str, dict[str, Any]]:
    """Name in the report → what was found out; plain JSON types, None for what is no number.

    Names have letters, digits and underscores only, so that a path into the report is a condition's.
    """
    _seed(suite.loaded["tasks"].values())
    before = model.truncated
    with _readable(suite.spec), offline_mode(), _contained():
        found = evaluate(
            model, suite.loaded, limit=suite.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    entries = {}
    for name, results in found["results"].items():
        entry = _entry(name, results, found)
        if entry is None:
            continue
        task = suite.loaded["tasks"].get(name)
        entry |= {
            "bos": model.bos,
            "max_length": model.max_length,
            "requests_sha256": suite.sha256[key_of(name)],
            "chance": _chance(task) if task is not None else None,
        }
        entries[key_of(name)] = entry
    # The model counts for all of the suite: which of its tasks it was cannot be told.
    for entry in entries.values():
        entry["truncated"] = model.truncated - before
    return entries


def run_all(
    suites: list[Suite],
    model: HarnessLM,
    tell: Callable[[str, int, int], None],
    kept: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """What run() says of every suite. tell: of which, how many of how many requests are done.

    kept: TaskCache.get, where results are.
    """
    entries: dict[str, dict[str, Any]] = {}
    for suite in suites:
        name = Path(suite.spec).stem
        model.on_request = functools.partial(tell, name)
        measure = functools.partial(run, suite, model)
        entries |= kept(name, suite.sha256, measure) if kept else measure()
    return entries


def _entry(name: str, results: dict[str, Any], found: Any) -> dict[str, Any] | None:
    """One task or group of lm-eval's results; None for a group without an average."""
    metrics: dict[str, Any] = {}
    better: dict[str, bool | None] = {}
    directions = found["higher_is_better"].get(name, {})
    for column, value in results.items():
        metric, comma, filtered = column.partition(",")
        if not comma:
            continue
        base = metric.removesuffix("_stderr")
        label = _NAMES.get(base, base)
        label = key_of(label if filtered == "none" else f"{label}_{filtered}")
        if base == metric:
            metrics[label] = _number(value)
            better[label] = directions.get(metric)
        else:
            metrics[f"{label}_stderr"] = _number(value)
    if not better:
        return None
    return {
        "task": name,
        "version": found["versions"].get(name),
        "items": results.get("sample_len") or results.get("sample_count"),
        "num_fewshot": found["n-shot"].get(name, 0),
        "metric": next(iter(better)),
        "higher_is_better": better,
        **metrics,
    }


def _number(value: Any) -> float | None:
    """None for what lm-eval calls N/A, and for NaN, which JSON does not have."""
    number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
    return float(value) if number else None


def _suite(
    spec: str,
    loaded: Any,
    num_fewshot: int | None,
    limit: int | None,
    note: Callable[[str], None],
) -> Suite:
    """Settings applied, requests built and hashed."""
    tasks = loaded["tasks"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(f"--tasks: {name} runs code that a model writes; llmsqueeze does not")
        fixed = task.get_config("num_fewshot")
        if num_fewshot is not None and fixed == 0 and num_fewshot > 0:
            note(
                f"warning: {name} itself says that it takes no examples; --num-fewshot is not for it"
            )
        elif num_fewshot is not None or fixed is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    _seed(tasks.values())
    hashes = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=limit)
        hashes[key_of(name)] = _hash(spec, task)
    groups = list(loaded.get("groups", {}).values())
    # The first is the one that was asked for, the others are within it.
    top = [key_of(group.name) for group in groups[:1] if group.has_aggregation]
    averages = {
        key_of(group.name): _hash_average(group, hashes)
        for group in groups
        if group.has_aggregation
    }
    return Suite(spec, loaded, tuple(top or hashes), hashes | averages, limit)


def _seed(tasks: Any) -> None:
    """As lm-eval's simple_evaluate: the same examples and samples every time."""
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in tasks:
        task.set_fewshot_seed(seed=SEED)


def _hash(spec: str, task: Any) -> str:
    """Of every request of a task, of the items behind them, and of how they are scored."""
    digest = hashlib.sha256()
    config = {
        k: v for k, v in task.dump_config().items() if k not in ("metadata", "dataset_kwargs")
    }
    digest.update(json.dumps([config, str(task.VERSION)], default=str, sort_keys=True).encode())
    if _is_file(spec):
        # Functions that a task's file refers to lie beside it.
        for file in sorted(Path(spec).expanduser().parent.glob("*.py")):
            digest.update(file.read_bytes())
    for instance in task.instances:
        line = [instance.request_type, instance.args, instance.doc]
        digest.update(json.dumps(line, default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _hash_average(group: Any, hashes: dict[str, str]) -> str:
    """Of how a group averages, and of all tasks that were loaded with it."""
    line = json.dumps([group.to_dict(), hashes], default=str, sort_keys=True)
    return hashlib.sha256(line.encode()).hexdigest()


def _chance(task: Any) -> float | None:
    """The accuracy of guessing, of a task of multiple choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or not getattr(task.config, "doc_to_choice", None):
        return None
    items = {instance.doc_id: instance.doc for instance in task.instances}
    shares = [1 / len(task.doc_to_choice(item)) for item in items.values()]
    return math.fsum(shares) / len(shares)


def _is_file(spec: str) -> bool:
    return Path(spec).suffix in (".yaml", ".yml", ".json", ".jsonl")


def _loaded(manager: TaskManager, spec: str, offline: bool, note: Callable[[str], None]) -> Any:
    """What lm-eval makes of a name or file: from this machine alone if that will do."""
    what: Any = spec
    if _is_file(spec):
        path = Path(spec).expanduser()
        if not path.is_file():
            raise DataError(f"--tasks {spec}: no such file")
        if path.suffix in (".yaml", ".yml"):
            _check_yaml(path)
            what = str(path)
        else:
            what = _items_task(path)
    with _readable(spec, reachable=not offline), offline_mode(), _contained():
        return manager.load([what])
    note(f"fetching the data of {spec} from the Hugging Face hub")
    with _readable(spec), _contained():
        return manager.load([what])


@contextlib.contextmanager
def _readable(spec: str, *, reachable: bool = False) -> Iterator[None]:
    """Turn what lm-eval and datasets raise into one line.

    reachable: pass over what is not on this machine, since it can be fetched.
    """
    try:
        yield
    except ConnectionError as error:
        if not reachable:
            raise DataError(
                f"--tasks {spec}: its data are not on this machine ({_first_line(error)}); fetch them once "
                "without --offline, or give a file"
            ) from error
    except FileNotFoundError as error:
        raise DataError(f"--tasks {spec}: {_first_line(error)}") from error
    except (LlmsqueezeError, MemoryError, OSError, RuntimeError):
        raise
    # lm-eval raises many kinds; all mean that a task is not what it says.
    except Exception as error:
        raise DataError(f"--tasks {spec}: {type(error).__name__}: {_first_line(error)}") from error


def _check_yaml(path: Path) -> None:
    """DataError on one that lm-eval would not come to an end with."""
    try:
        check_yaml(untrusted.read_text(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"--tasks {path}: not YAML ({untrusted.reason(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _items_task(path: Path) -> dict[str, Any]:
    """A task of a .json list or .jsonl of {"query", "choices", "gold"}: which choice follows the query."""
    items = _read_items(path)

    def splits(**unused: Any) -> dict[str, Any]:
        return {"test": datasets.Dataset.from_list(items)}

    return {
        "task": path.stem,
        "custom_dataset": splits,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }


def _read_items(path: Path) -> list[dict[str, Any]]:
    try:
        text = untrusted.read_text(path, MOST_ITEMS)
        lines = [line for line in text.split("\n") if line.strip()]
        items = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"--tasks {path} {untrusted.reason(error)}") from error
    except RecursionError as error:
        raise DataError(f"--tasks {path} is nested too deeply") from error
    if not isinstance(items, list) or not items:
        raise DataError(f"--tasks {path}: no list of items")
    for number, item in enumerate(items, start=1):
        if not _is_item(item):
            raise DataError(
                f'--tasks {path}: item {number} is not {{"query": text, "choices": [two texts or more], '
                '"gold": index of the right one}'
            )
    return [{key: item[key] for key in _ITEM_KEYS} for item in items]


def _is_item(item: Any) -> bool:
    if not isinstance(item, dict) or not all(key in item for key in _ITEM_KEYS):
        return False
    query, choices, gold = (item[key] for key in _ITEM_KEYS)
    return (
        isinstance(query, str)
        and isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice for choice in choices)
        and all(map(untrusted.is_text, [query, *choices]))
        and isinstance(gold, int)
        and not isinstance(gold, bool)
        and 0 <= gold < len(choices)
    )


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Let no library reach for the network: what it would fetch raises ConnectionError.

    They read the environment when they are imported, which they are.
    """
    places = (
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (hf_evaluate.config, "HF_EVALUATE_OFFLINE"),
    )
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep lm-eval's prints off stdout, which belongs to the result, and its bootstrap in this process."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # or it forks a process that holds a GPU
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def quiet() -> None:
    """No bars and no remarks of the libraries."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised as well
    datasets.disable_progress_bars()
