"""The README.md of a checkpoint we write: the first thing a stranger sees of it.

hub_card.py has the longer one of a push.
"""

from __future__ import annotations

import hashlib
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
from llmsqueeze.source import DEMO_CARD, DEMO_NAME

# What a card says of the weights whatever was done to them, under the hub's own names.
INHERITED = ("license", "license_name", "license_link", "language")
_SEAL = re.compile(r"\n<!-- made by llmsqueeze, ([0-9a-f]{16}) -->\n?\Z")

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
    return _whole(checkpoint, source_name, ["llmsqueeze", "sparse"], "\n".join(body))


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
    return _whole(checkpoint, source_name, ["llmsqueeze", "sparse"], "\n".join(body))


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
    return _whole(checkpoint, source_name, tags, "\n".join(body))


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
    return _whole(checkpoint, source_name, tags, "\n".join(body))


def _rounding(checkpoint: Checkpoint) -> str:
    last = checkpoint.steps[-1:]
    return (
        f", rounded to {last[0]['recipe']['to']}" if last and last[0]["command"] == "encode" else ""
    )


def converted_card(checkpoint: Checkpoint, source_name: str, format: str) -> str:
    """Card of a checkpoint that `convert` wrote."""
    text = _DENSE if format == "dense" else "Load it with\n\n" + _LOAD
    tags = ["sparse"] if format == "dense" else ["llmsqueeze", "sparse"]
    body = f"# {_short(source_name)}, converted to {format}\n\n{text}"
    return _whole(checkpoint, source_name, tags, body)


def seal(text: str) -> str:
    """The card with a last line by which is_sealed() knows that nobody changed it."""
    return f"{text}\n<!-- made by llmsqueeze, {_digest(text)} -->\n"


def is_sealed(card: str) -> bool:
    """Whether the card is as seal() made it; what people wrote into one must not be lost."""
    found = _SEAL.search(card)
    return found is not None and _digest(card[: found.start()]) == found[1]


def front_matter(head: dict[str, Any]) -> str:
    """The metadata of a card as the hub reads it."""
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def read_front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; none of one that has none, or that cannot be read."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.S)
    try:
        head = parse_yaml(match[1]) if match else None
    except (ValueError, yaml.YAMLError):
        return {}  # a card we cannot read says nothing that we could repeat
    return head if isinstance(head, dict) else {}


def _whole(checkpoint: Checkpoint, source_name: str, tags: list[str], body: str) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **_origin(checkpoint, source_name),
    }
    return seal(front_matter(head) + body + "\n")


def _origin(checkpoint: Checkpoint, source_name: str) -> dict[str, Any]:
    """Base model, licence and language, as far as they are known."""
    try:
        before = read_front_matter(untrusted.read_text(checkpoint.path / "README.md"))
    except (OSError, ValueError):
        before = {}  # a card we cannot read says nothing that we could repeat
    known = {key: before[key] for key in INHERITED if _is_text(before.get(key))}
    if source_name == DEMO_NAME:
        return known | DEMO_CARD
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source_name) and not Path(source_name).exists():
        return known | base_model(source_name)
    if checkpoint.manifest and before.get("base_model"):
        return known | base_model(str(before["base_model"]))
    return known


def _is_text(value: Any) -> bool:
    """A string, or a list of them: several languages."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) for one in values)


def base_model(name: str) -> dict[str, str]:
    """The hub's words for a model that was made of another, without training it further."""
    return {"base_model": name, "base_model_relation": "quantized"}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _short(source_name: str) -> str:
    return source_name.rstrip("/").rpartition("/")[2]
