"""The model card of a checkpoint on the Hugging Face hub: what it is, what was measured, how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from llmsqueeze.artifact import FORMATS
from llmsqueeze.card import front_matter, seal
from llmsqueeze.errors import DataError, RecipeError
from llmsqueeze.report.text import device_of, number, step_line
from llmsqueeze.step_recipes import parse_steps, resolved
from llmsqueeze.units import size

COMPRESSED, DENSE = FORMATS
TASK = {"task_type": "text-generation", "task_name": "Text generation"}

_LOAD = """```python
import llmsqueeze  # teaches transformers this format: without it, transformers invents the weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

This needs llmsqueeze {version} or newer. The model computes with weights as they are stored, on a CPU from
the file, on a GPU with `device_map="cuda"` in 16 bits; to train or save it, load it dense, with
`quantization_config=llmsqueeze.LlmsqueezeConfig(dequantize=True)`. `llmsqueeze run {repo} "…"` decodes from
the command line."""

_LOAD_DENSE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```

This is the dense form: zeros stand in place. It loads in any tool, and has the **same size and the same
speed** as the original; `llmsqueeze convert {repo} -o OUT --to llmsqueeze` makes the small file of it."""


def hub_card(repo: str, report: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """The card of a report's only checkpoint, as it will be named on the hub.

    report: of report.document.build. origin: metadata on where it came from, base_model, license and so on,
    where they are known. Raises DataError for a result that has no place in a card.
    """
    (of,) = report["checkpoints"]
    results = report["results"]
    evaluations = [r for r in results if r["kind"] == "eval"]
    speeds = [r for r in results if r["kind"] == "bench model"]
    for result in results:
        if result not in evaluations and result not in speeds:
            raise DataError(
                f"{result['file']}: a result of {result['kind']} has no place in a card"
            )
        if result["checkpoint"] is None:
            raise DataError(
                f"{result['file']} was measured on another checkpoint; measure this one"
            )
    name = repo.rpartition("/")[2]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": _tags(of),
        **origin,
    }
    if evaluations:
        head["model-index"] = _model_index(name, evaluations)
    load = (_LOAD if of["format"] == COMPRESSED else _LOAD_DENSE).format(
        repo=repo, version=report["tool_version"]
    )
    parts = [f"# {name}", _lead(of, origin), _grid(["", ""], _facts(of)), "## Use it", load]
    parts += ["## Measured", *_measured(evaluations, speeds)]
    if of["sites"] or of["activation"]:
        parts += ["## What was compressed", _projections(of)]
    parts += ["## How it was made", *_making(of, origin)]
    parts += ["## Limits", _limits(of, origin, evaluations)]
    return seal(front_matter(head) + "\n\n".join(part for part in parts if part) + "\n")


def _tags(of: Mapping[str, Any]) -> list[str]:
    tags = ["llmsqueeze"]
    if of["sparsity"]:
        tags += ["sparse", "pruned"]
    if of["activation"]:
        tags.append("activation-sparsity")
    if any(site["encoding"] == "int8" for site in of["sites"]):
        tags.append("int8")
    if of["kv_cache"]:
        tags.append("kv-cache")
    return tags


def _lead(of: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    base = origin.get("base_model")
    who = f"[{base}](https://huggingface.co/{base})" if base else f"A {of['model_type']} model"
    done = {"prune": "pruned", "encode": "rounded to eight bits", "sparsify": "activations sparsified",
            "quantize-kv": "KV cache quantised"}  # fmt: skip
    ways = list(dict.fromkeys(done[step["command"]] for step in of["steps"]))
    how = ", ".join(ways) or "weights stored in what is smallest"
    return f"{who}, compressed without further training by llmsqueeze: {how}."


def _facts(of: Mapping[str, Any]) -> list[list[str]]:
    saved = of["bytes"]
    rows = [
        ["architecture", f"{of['model_type']}, {of['blocks']} blocks, {of['dtype']}"],
        ["format", of["format"]],
        ["weights", f"{size(saved['file'])}; dense {size(saved['dense'])}"],
        ["weights read per token", size(of["bytes_per_token"])],
    ]
    if of["sparsity"]:
        rows.append(["zeros in the compressed linears", f"{of['sparsity']:.2%}"])
    if of["activation"]:
        gates = [gate["sparsity"] for gate in of["activation"]["gates"]]
        mean = sum(gates) / len(gates)
        rows.append(
            [
                "activations",
                f"{of['activation']['method']}: {len(gates)} gates drop {mean:.1%} of their inputs on "
                f"average; prompt {of['activation']['prefill']}",
            ]
        )
    if kv := of["kv_cache"]:
        rows.append(["KV cache", f"{kv['method']}, {kv['bits']} bits"])
    return rows


def _measured(evaluations: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> list[str]:
    if not evaluations and not speeds:
        return ["Nothing was measured for this card: look before you rely on the model, with "
                "`llmsqueeze eval`."]  # fmt: skip
    parts = []
    for result in evaluations:
        d = result["document"]
        rows = [[f"token_ppl@{d['seqlen']}", number(d["token_ppl"]), _number(d, "dense_token_ppl"),
                 _number(d, "token_ppl_ratio")]]  # fmt: skip
        for task, entry in d.get("tasks", {}).items():
            for metric in entry["higher_is_better"]:
                other = entry.get("dense") or {}
                rows.append(
                    [f"{task}: {metric}", _score(entry, metric), _score(other, metric),
                     _number(entry, f"{metric}_recovery")]
                )  # fmt: skip
        if "passkey" in d:
            dense = f"{d['dense_passkey']['accuracy']:.0%}" if "dense_passkey" in d else ""
            rows.append(["keys found", f"{d['passkey']['accuracy']:.0%}", dense, ""])
        where = (
            f"Perplexity by tokens, of {d['windows']} windows of {d['seqlen']} tokens of {plain(d['text'])} "
            f"(sha256 `{d['text_sha256'][:12]}`), {'a' if d['bos'] else 'no'} beginning-of-text token; "
            f"{d['dtype']} on {d['device']}, {d['backend']}. It cannot be compared with perplexity by words, "
            "nor with that of other windows, texts or tokenizers."
        )
        parts += [where, _grid(["", "this model", "dense", "ratio or recovery"], rows)]
    for result in speeds:
        d = result["document"]
        parts.append(
            f"Decoding on {device_of(d)}: {d['speedup']:.2f} times as fast as dense (bound by the bytes "
            f"read: {d['bound']:.2f})."
        )
    return parts


def _projections(of: Mapping[str, Any]) -> str:
    """A line for every kind of linear: blocks together, which may differ."""
    rows = []
    for kind, sites in _by_projection(of["sites"]).items():
        sparsity = [site["sparsity"] for site in sites]
        encodings = sorted({site["encoding"] for site in sites})
        before, after = (sum(site["bytes"][when] for site in sites) for when in ("before", "after"))
        rows.append(
            [f"`{kind}`", str(len(sites)), _span(sparsity), ", ".join(encodings),
             f"{size(before)} → {size(after)}", ""]
        )  # fmt: skip
    if of["activation"]:
        gates = _by_projection(of["activation"]["gates"])
        for row in rows:
            found = [g["sparsity"] for g in gates.pop(row[0].strip("`"), [])]
            row[-1] = _span(found) if found else ""
        for kind, found_gates in gates.items():
            rows.append([f"`{kind}`", "", "", "", "", _span([g["sparsity"] for g in found_gates])])
    head = ["", "linears", "zeros", "stored as", "bytes", "inputs dropped"]
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return _grid([head[i] for i in used], [[row[i] for i in used] for row in rows])


def _by_projection(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["projection"], []).append(entry)
    return found


def _making(of: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
    base = origin.get("base_model") or "ORIGINAL"
    if not of["steps"]:
        return [
            "By llmsqueeze, which stored every linear in what is smallest, and changed no bit of any weight:",
            f"```sh\nllmsqueeze convert {base} -o OUT --to {of['format']}\n```",
        ]
    lines = [f"- `{step['command']}`: {plain(step_line(step))}" for step in of["steps"]]
    texts = [
        f"- calibration: {plain(c['source'])}, {c['samples']} × {c['seqlen']} tokens (sha256 of the text "
        f"`{c['text_sha256'][:12]}`)"
        for c in (step.get("calibration") for step in of["steps"])
        if c
    ]
    used = of["steps"][-1].get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in used.items())
    command = f"llmsqueeze compress {base} -o OUT --recipe llmsqueeze.json"
    if of["format"] == DENSE:
        command += "\nllmsqueeze convert OUT -o DENSE --to dense"
    parts = [
        "\n".join([*lines, *dict.fromkeys(texts), f"- with {versions}" if versions else ""]).strip()
    ]
    parts += ["`llmsqueeze.json` records all of it. The same again, and a comparison by hashes:",
              f"```sh\n{command}\n```"]  # fmt: skip
    try:
        recipe = resolved(parse_steps({"format_version": 1, "steps": of["steps"]}))
    except RecipeError:
        # Of a version whose recipes were others; what was done stands above.
        return parts
    text = yaml.safe_dump(_without_paths(recipe), sort_keys=False, allow_unicode=True)
    return [
        *parts,
        f"<details><summary>The recipe in full</summary>\n\n```yaml\n{text}```\n\n</details>",
    ]


def _limits(
    of: Mapping[str, Any], origin: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    lines = ["It has the limits of the model that it was made from; nothing was taught to it."]
    if of["format"] == COMPRESSED:
        lines.append(
            "Only llmsqueeze reads this format, in transformers after `import llmsqueeze`. Other tools need "
            "the dense form: `llmsqueeze convert … --to dense`."
        )
    if of["activation"]:
        lines.append(
            "Thresholds were calibrated on the text above; on other text other shares of inputs are dropped."
        )
    if of["sparsity"]:
        lines.append("What pruning cost depends on the task: perplexity does not say it all.")
    if not evaluations:
        lines.append("The loss of quality was not measured.")
    elif not any("dense_token_ppl" in r["document"] for r in evaluations):
        lines.append("The dense model was not measured beside it.")
    if "license" not in origin:
        lines.append(
            "The licence is that of the model it was made from, which this card does not know."
        )
    return "\n".join(f"- {line}" for line in lines)


def _model_index(name: str, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity and tasks as the hub keeps them, each under its own name."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    found = []
    for result in evaluations:
        d = result["document"]
        text = plain(d["text"])
        found.append(
            EvalResult(
                **TASK, dataset_type=_slug(text), dataset_name=text,
                dataset_args={"sha256": d["text_sha256"]},
                metric_type="token_ppl", metric_name=f"token_ppl@{d['seqlen']}",
                metric_value=d["token_ppl"],
                metric_args={key: d[key] for key in ("seqlen", "windows", "bos", "dtype")},
            )
        )  # fmt: skip
        for task, entry in d.get("tasks", {}).items():
            shots = entry.get("num_fewshot")
            for metric in entry["higher_is_better"]:
                value = entry.get(metric)
                if not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                found.append(
                    EvalResult(
                        **TASK, dataset_type=_slug(task), dataset_name=task, metric_type=metric,
                        metric_name=metric if shots is None else f"{metric}, {shots}-shot",
                        metric_value=value,
                        metric_args={"num_fewshot": shots, "items": entry.get("items")},
                    )
                )  # fmt: skip
    return eval_results_to_model_index(name, found)


def plain(text: str) -> str:
    """Without folders of this machine: of a path only what it is called. And no pipe, which ends a cell."""
    words = [
        PurePath(word).name if PurePath(word).is_absolute() else word for word in text.split(" ")
    ]
    return " ".join(words).replace("|", "/")


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return plain(value) if isinstance(value, str) else value


def _span(shares: Sequence[float]) -> str:
    """A share, or the least and the largest of several."""
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


def _score(entry: Mapping[str, Any], metric: str) -> str:
    value, error = entry.get(metric), entry.get(f"{metric}_stderr")
    if value is None:
        return ""
    return number(value) + (f" ± {number(error)}" if error is not None else "")


def _number(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return "" if value is None else number(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-").lower()


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
