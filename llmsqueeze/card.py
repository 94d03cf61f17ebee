"""The README.md of a checkpoint we write: the first thing a stranger sees of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmsqueeze import untrusted
from llmsqueeze.activation import ActivationRecord
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.kv_record import KvRecord
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.recipe_file import parse_yaml

_LOAD = """```python
import llmsqueeze  # teaches transformers this format: do not leave it out
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```"""

_DENSE = """This is the dense form: zeros stand in place, so it loads in any tool, and has the **same size and
the same speed** as the original. `llmsqueeze convert --to llmsqueeze` makes the small file of it."""


def model_card(
    checkpoint: Checkpoint, source_name: str, recipe: PruneRecipe, sparsity: float
) -> str:
    """Card of a pruned llmsqueeze checkpoint."""
    body = [
        f"# {_short(source_name)}, pruned by {recipe.method}",
        "",
        "| | |",
        "| --- | --- |",
        f"| pruned from | `{source_name}` |",
        f"| method | {recipe.method} |",
        f"| pattern | {recipe.target.pattern_name} |",
        f"| sparsity of the pruned linears | {sparsity:.2%} |",
        "",
        "The weights are stored as a bitmask and packed non-zeros. Load them with",
        "",
        _LOAD,
        "",
        "`llmsqueeze.json` records how this was made, `llmsqueeze inspect --verify` checks the files, and",
        "`llmsqueeze eval THIS --against ORIGINAL` measures what pruning cost on text of your choice.",
    ]
    return _front_matter(checkpoint, source_name, ["llmsqueeze", "sparse"]) + "\n".join(body) + "\n"


def sparsified_card(checkpoint: Checkpoint, source_name: str, record: ActivationRecord) -> str:
    """Card of a checkpoint with gated activations."""
    mean = sum(gate.sparsity for gate in record.gates.values()) / len(record.gates)
    body = [
        f"# {_short(source_name)}, activations sparsified by {record.method}",
        "",
        "| | |",
        "| --- | --- |",
        f"| made from | `{source_name}` |",
        f"| method | {record.method} |",
        f"| gates | {len(record.gates)}, dropping {mean:.1%} of their inputs on average |",
        f"| prompt tokens gated | {record.prefill} |",
        "",
        f"Weights are those of the source{_rounding(checkpoint)}; thresholds lie in "
        "`llmsqueeze.safetensors`. Load it with",
        "",
        _LOAD,
        "",
        "`llmsqueeze eval THIS --against ORIGINAL` measures what the gates cost on text of your choice, and",
        "how much they drop there.",
    ]
    return _front_matter(checkpoint, source_name, ["llmsqueeze", "sparse"]) + "\n".join(body) + "\n"


def quantized_kv_card(checkpoint: Checkpoint, source_name: str, record: KvRecord) -> str:
    """Card of a checkpoint that says how its KV cache is quantised."""
    body = [
        f"# {_short(source_name)}, KV cache quantised by {record.method}",
        "",
        "| | |",
        "| --- | --- |",
        f"| made from | `{source_name}` |",
        f"| method | {record}, {record.bits} bits |",
        f"| layers | {len(record.layers)} |",
        "",
        "Weights are those of the source. Load it with",
        "",
        _LOAD,
        "",
        "and give `generate` the cache `llmsqueeze.kv_cache(model)`.",
        "",
        "`llmsqueeze eval THIS --against ORIGINAL --passkey` measures what the cache costs on text of your",
        "choice, and whether it still finds what was said long ago.",
    ]
    tags = ["llmsqueeze", "kv-cache"]
    return _front_matter(checkpoint, source_name, tags) + "\n".join(body) + "\n"


def encoded_card(checkpoint: Checkpoint, source_name: str, to: str, error: float) -> str:
    """Card of a checkpoint whose linears were rounded."""
    body = [
        f"# {_short(source_name)}, linears in {to}",
        "",
        f"Made from `{source_name}`: every linear of every block rounded to nearest, with one scale for each",
        f"output; {error:.2%} of a weight matrix on average (relative Frobenius norm). Load it with",
        "",
        _LOAD,
        "",
        "`llmsqueeze eval THIS --against ORIGINAL` measures what that cost on text of your choice.",
    ]
    tags = ["llmsqueeze", to]
    return _front_matter(checkpoint, source_name, tags) + "\n".join(body) + "\n"


def _rounding(checkpoint: Checkpoint) -> str:
    last = checkpoint.steps[-1:]
    return (
        f", rounded to {last[0]['recipe']['to']}" if last and last[0]["command"] == "encode" else ""
    )


def converted_card(checkpoint: Checkpoint, source_name: str, format: str) -> str:
    """Card of a checkpoint that `convert` wrote."""
    text = _DENSE if format == "dense" else "Load it with\n\n" + _LOAD
    tags = ["sparse"] if format == "dense" else ["llmsqueeze", "sparse"]
    head = _front_matter(checkpoint, source_name, tags)
    return f"{head}# {_short(source_name)}, converted to {format}\n\n{text}\n"


def _front_matter(checkpoint: Checkpoint, source_name: str, tags: list[str]) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source_name) and not Path(source_name).exists():
        head["base_model"] = source_name
        head["base_model_relation"] = "quantized"
    head.update(_licence(checkpoint.path / "README.md"))
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"


def _licence(readme: Path) -> dict[str, Any]:
    """The licence keys of the source's own card, if it has one."""
    try:
        match = re.match(r"---\n(.*?)\n---\n", untrusted.read_text(readme), re.S)
        head = parse_yaml(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # a card we cannot read says nothing that we could repeat
    keys = ("license", "license_name", "license_link")
    found = {key: head.get(key) for key in keys} if isinstance(head, dict) else {}
    return {key: text for key, text in found.items() if isinstance(text, str)}


def _short(source_name: str) -> str:
    return source_name.rstrip("/").rpartition("/")[2]
