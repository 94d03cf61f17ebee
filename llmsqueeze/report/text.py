"""The report in words: a short one in Markdown, and JUnit for tools that count tests."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

from llmsqueeze.units import size

# Settings under which perplexities can be compared.
SETTINGS = ("tokens_sha256", "seqlen", "windows", "bos", "dtype")
# Lines of a table in the Markdown; the rest is in the other files.
MOST_ROWS = 40


def number(value: float) -> str:
    """Four digits, but no number that should be whole is cut."""
    whole = isinstance(value, int) or value == round(value)
    return f"{value:.0f}" if whole and abs(value) < 1e15 else f"{value:.4g}"


def printable(text: str) -> str:
    """Without the characters that XML and HTML cannot hold, however they are written."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def share(value: float) -> str:
    return f"{value:.1%}"


def step_line(step: Mapping[str, Any]) -> str:
    """One line on a step of a manifest: how a checkpoint was made."""
    recipe, source = step["recipe"], step["source"]["name"]
    if step["command"] == "prune":
        pattern = recipe["target"]["pattern"]
        return f"{recipe['method']} {pattern}, {step['sparsity']:.2%} of {source}"
    if step["command"] == "sparsify":
        method = recipe["method"] or "other thresholds,"
        inputs = f"{recipe['sparsity']:.0%} of the inputs"
        return f"{method} {inputs}, prompt {recipe['prefill']}, {source}"
    if step["command"] == "quantize-kv":
        return f"{recipe['method']}, {recipe['bits']} bits, {source}"
    return f"linears to {recipe['to']}, {source}" if step["command"] == "encode" else str(source)


def comparable(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Results of eval in groups of the same settings."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result["document"][s] for s in SETTINGS), []).append(result)
    return list(groups.values())


def headline(report: Mapping[str, Any]) -> str:
    """The outcome in one line."""
    results, conditions = report["results"], report["conditions"]
    errors = sum(result["kind"] == "error" for result in results)
    failed = sum(condition["failed"] for condition in conditions)
    broken = sum(check["status"] == "failed" for check in report["checks"])
    parts = []
    if errors:
        parts.append(f"{errors} of {len(results)} measurements did not come to an end")
    if failed:
        parts.append(f"{failed} of {len(conditions)} conditions failed")
    elif conditions:
        parts.append(f"all {len(conditions)} conditions passed")
    if broken:
        parts.append(f"{broken} of {len(report['checks'])} promises not kept")
    return "; ".join(parts) or "no condition was given"


def clean(report: Mapping[str, Any]) -> bool:
    """Whether conditions were given, and all of them and all promises hold."""
    kept = all(check["status"] != "failed" for check in report["checks"])
    return bool(report["conditions"]) and kept and not report["failed"]


def failures(report: Mapping[str, Any]) -> list[str]:
    """What failed, a line each."""
    errors = [
        f"{result['file']}: {result['document']['error']} (exit code {result['document']['exit_code']})"
        for result in report["results"]
        if result["kind"] == "error"
    ]
    return errors + [
        f"{c['of']}: fails if {c['fail_if']}, and it is {_value(c['value'])}"
        for c in report["conditions"]
        if c["failed"]
    ]


def result_facts(result: Mapping[str, Any]) -> list[str]:
    """Of one result of eval: perplexity, times dense, file, read, dropped, KV bits, keys found."""
    d = result["document"]
    keys = f"{d['passkey']['accuracy']:.0%}" if "passkey" in d else ""
    if keys and "dense_passkey" in d:
        keys += f" (dense {d['dense_passkey']['accuracy']:.0%})"
    dropped = d.get("activation", {}).get("sparsity")
    return [
        f"{d['token_ppl']:.3f}",
        f"{d['token_ppl_ratio']:.4f}" if "token_ppl_ratio" in d else "",
        size(d["size_bytes"]),
        size(d["bytes_per_token"]),
        "" if dropped is None else share(dropped),
        f"{d['kv_cache']['bits_per_element']:.2f}" if "kv_cache" in d else "",
        keys,
    ]


def task_rows(document: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The sections of a result that name figures by task, as `tasks` does: section → task → figure."""
    found = {}
    for section, tasks in document.items():
        if "tasks" in section and isinstance(tasks, dict):
            figures = {
                task: {n: v for n, v in values.items() if _is_number(v)}
                for task, values in tasks.items()
                if isinstance(values, dict)
            }
            if any(figures.values()):
                found[section] = figures
    return found


def extra_figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Every number, text and flag of a result by its path; what lies in lists is left to report.json."""
    found: dict[str, str] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(inner, f"{path}.{name}".lstrip("."))
        elif isinstance(value, bool | str):
            found[path] = str(value)
        elif _is_number(value):
            found[path] = number(value)

    shown = {k: v for k, v in result["document"].items() if k != "activation"}
    collect(shown, "")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def device_of(document: Mapping[str, Any]) -> str:
    """What a model was measured on, and in what where the dense one was not in the same."""
    threads = f", {document['threads']} threads" if "threads" in document else ""
    dense = document.get("dense_dtype", document["dtype"])
    other = f", dense {dense}" if dense != document["dtype"] else ""
    return f"{document.get('gpu') or document.get('cpu')}{threads}, {document['dtype']}{other}"


def _value(value: float | None) -> str:
    return "not measured" if value is None else number(value)


def markdown(report: Mapping[str, Any]) -> str:
    """Short enough for the summary of a pipeline's step."""
    sign = "❌ " if report["failed"] else "✅ " if clean(report) else ""
    parts = [f"## {sign}llmsqueeze: {headline(report)}", ""]
    parts += [f"- {_plain(message)}" for message in failures(report)]
    parts += [f"- warning: {_plain(message)}" for message in report["warnings"]] + [""]
    results = report["results"]
    for group in comparable([r for r in results if r["kind"] == "eval"]):
        first = group[0]["document"]
        name = f"token_ppl@{first['seqlen']}"
        head = ["checkpoint", name, "× dense", "file", "read per token", "inputs dropped", "KV bits",
                "keys found"]  # fmt: skip
        rows = [[r["label"].removeprefix("eval").strip(), *result_facts(r)] for r in group]
        used = [i for i in range(len(head)) if any(row[i] for row in rows)]
        parts += _grid([head[i] for i in used], [[row[i] for i in used] for row in rows])
    for result in results:
        for section, tasks in task_rows(result["document"]).items():
            names = list(dict.fromkeys(n for figures in tasks.values() for n in figures))
            rows = [[t, *(number(f[n]) if n in f else "" for n in names)] for t, f in tasks.items()]
            parts += _grid([f"{result['label']}, {section}", *names], rows)
    rows = [
        [
            r["label"].removeprefix("bench model").strip(), f"{r['document']['speedup']:.2f}×",
            f"{r['document']['bound']:.2f}×", device_of(r["document"]),
        ]
        for r in results
        if r["kind"] == "bench model"
    ]  # fmt: skip
    parts += _grid(["decoding", "speed-up", "bound by bytes", "on"], rows)
    rows = [
        [
            c["of"],
            f"fails if {c['fail_if']}",
            _value(c["value"]),
            "failed" if c["failed"] else "passed",
        ]
        for c in report["conditions"]
    ] + [[c["of"], c["name"], c["detail"], c["status"]] for c in report["checks"]]
    parts += _grid(["of", "condition or promise", "measured", "outcome"], rows)
    return printable("\n".join(parts).strip() + "\n")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows[:MOST_ROWS]]
    written = ["| " + " | ".join(map(_plain, cells)) + " |" for cells in lines]
    if len(rows) > MOST_ROWS:
        written += ["", f"and {len(rows) - MOST_ROWS} more in report.html"]
    return [*written, ""]


def _plain(cell: str) -> str:
    """As a cell of a table, with nothing that Markdown or HTML would take for its own."""
    for sign in "\\`*_|<>[]":
        cell = cell.replace(
            sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign]
        )
    return " ".join(cell.split())


def junit(report: Mapping[str, Any]) -> str:
    """JUnit XML: a case for every condition, every promise and every measurement that failed."""
    suites = ElementTree.Element("testsuites", name="llmsqueeze")
    by_suite: dict[str, list[ElementTree.Element]] = {}
    for condition in report["conditions"]:
        case = _case(by_suite, condition["of"], f"fail if {condition['fail_if']}")
        if condition["failed"]:
            message = printable(f"{condition['fail_if']}: {_value(condition['value'])}")
            ElementTree.SubElement(
                case, "failure", message=message, type="condition"
            ).text = message
    for check in report["checks"]:
        case = _case(by_suite, check["of"], check["name"])
        if check["status"] == "failed":
            detail = printable(check["detail"])
            ElementTree.SubElement(case, "failure", message=detail, type="promise").text = detail
        elif check["status"] == "not measured":
            ElementTree.SubElement(case, "skipped", message=printable(check["detail"]))
    for result in report["results"]:
        if result["kind"] == "error":
            case = _case(by_suite, result["label"], "measured to the end")
            message = printable(result["document"]["error"])
            code = str(result["document"]["exit_code"])
            ElementTree.SubElement(case, "error", message=message, type=f"exit code {code}")
    for name, cases in by_suite.items():
        suite = ElementTree.SubElement(
            suites, "testsuite", {"name": printable(name), **_counts(cases)}
        )
        suite.extend(cases)
    every = [case for cases in by_suite.values() for case in cases]
    for name, count in _counts(every).items():
        suites.set(name, count)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suites: dict[str, list[ElementTree.Element]], of: str, name: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=printable(of), name=printable(name))
    suites.setdefault(of, []).append(case)
    return case


def _counts(cases: Sequence[ElementTree.Element]) -> dict[str, str]:
    def having(kind: str) -> str:
        return str(sum(case.find(kind) is not None for case in cases))

    return {
        "tests": str(len(cases)), "failures": having("failure"), "errors": having("error"),
        "skipped": having("skipped"),
    }  # fmt: skip
