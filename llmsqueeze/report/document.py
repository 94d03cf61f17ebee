"""The report as plain JSON types: what checkpoints say of themselves, and what was measured of them.

Its shape is schema.REPORT_SCHEMA. Nothing of it depends on the time or the machine it is made on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmsqueeze import __version__, units, untrusted
from llmsqueeze.activation import ActivationRecord, drifts
from llmsqueeze.artifact import SiteRecord
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError, DataError
from llmsqueeze.expert_note import few_tokens
from llmsqueeze.numerics.histogram import CURVE_STEP
from llmsqueeze.numerics.packing import dense_tiles
from llmsqueeze.report.schema import REPORT, RESULTS, fault
from llmsqueeze.traffic import bytes_per_token

# Thresholds are stored in fp32; of a picture's points so many digits are more than enough.
CURVE_DIGITS = 6
# What sites call their error, the first that is there.
ERRORS = ("relative_error", "rounding_error")


def read_result(path: Path) -> dict[str, Any]:
    """An entry of the report's results, of what a command printed with --json; DataError if it is none."""
    try:
        document = untrusted.read_json(path, untrusted.LARGE)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        why = untrusted.reason(error)
        raise DataError(f"{path}: not one JSON document, as --json prints it: it {why}") from error
    kind = _kind(document)
    if kind is None:
        raise DataError(
            f"{path}: not what `eval`, `bench model` or `bench kernels` print with --json"
        )
    if found := fault(document, RESULTS[kind]):
        raise DataError(f"{path}: not a whole result of {kind}: {found}; measure again")
    if kind == "bench model" and not document.keys() & {"gpu", "cpu"}:
        raise DataError(f"{path}: it does not say what it was measured on; measure again")
    return {
        "kind": kind,
        "label": kind,
        "file": path.name,
        "checkpoint": None,
        "document": document,
    }


def build(
    checkpoints: Sequence[tuple[Checkpoint, str]],
    results: Sequence[dict[str, Any]],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The report. checkpoints: opened, and what to call them; results: of read_result.

    CheckpointError for a checkpoint that says nothing of itself, DataError for a result of one that has
    changed since.
    """
    described = []
    for done, (checkpoint, name) in enumerate(checkpoints, 1):
        described.append(_describe(checkpoint, name))
        on_step(done, len(checkpoints))
    named = [d["name"] for d in described] + [r["document"].get("checkpoint", "") for r in results]
    labels = dict(zip(named, short_names(named), strict=True))
    for entry in described:
        entry["label"] = labels[entry["name"]]
    found = [_place(result, described, labels) for result in results]
    shared = Counter(entry["label"] for entry in found)
    for number, entry in enumerate(found, 1):
        if shared[entry["label"]] > 1:
            entry["label"] += f" ({number}: {entry['file']})"
    for index, entry in enumerate(described):
        _add_measured(entry, [r for r in found if r["checkpoint"] == index])
    conditions = [
        {"of": result["label"], **{k: c[k] for k in ("fail_if", "value", "failed")}}
        for result in found
        for c in result["document"].get("conditions", [])
    ]
    return {
        "schema": REPORT,
        "tool_version": __version__,
        "failed": any(c["failed"] for c in conditions) or any(r["kind"] == "error" for r in found),
        "conditions": conditions,
        "checks": [*_checkpoint_checks(described, found), *_speed_checks(found)],
        "warnings": [
            *(
                f"{entry['label']}: {message}"
                for entry, (checkpoint, _) in zip(described, checkpoints, strict=True)
                if checkpoint.manifest and (message := few_tokens(checkpoint.manifest.sites))
            ),
            *(
                f"{result['label']}: {message}"
                for result in found
                if "activation" in result["document"]
                for message in drifts(result["document"]["activation"])
            ),
        ],
        "checkpoints": described,
        "results": found,
    }


def short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as many of them as it takes to tell different ones apart."""
    parts = {name: [p for p in name.split("/") if p] or [name] for name in names}

    def last(name: str, count: int) -> str:
        return "/".join(parts[name][-count:])

    def shortest(name: str) -> str:
        for count in range(1, len(parts[name])):
            if not any(last(n, count) == last(name, count) for n in parts if n != name):
                return last(name, count)
        return name

    return [shortest(name) for name in names]


def _kind(document: Any) -> str | None:
    if not isinstance(document, dict):
        return None
    for kind, schema in RESULTS.items():
        const = schema["properties"].get("schema", {}).get("const")
        if const is not None and document.get("schema") == const:
            return kind
    return "error" if "error" in document and "exit_code" in document else None


def _place(
    result: dict[str, Any], checkpoints: list[dict[str, Any]], labels: dict[str, str]
) -> dict[str, Any]:
    """A result with its label and the checkpoint it is of. By the manifest's hash: directories move."""
    document = result["document"]
    sha256, name = document.get("manifest_sha256"), document.get("checkpoint", "")
    at = [i for i, c in enumerate(checkpoints) if c["manifest_sha256"] == sha256]
    stale = [c for c in checkpoints if c["name"] == name and c["manifest_sha256"] != sha256]
    if stale:
        raise DataError(
            f"{result['file']}: {name} was another checkpoint when it was measured; measure again"
        )
    label = f"{result['kind']} {labels[name]}" if name else result["kind"]
    return {**result, "label": label, "checkpoint": at[0] if at else None}


def _describe(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    manifest = checkpoint.manifest
    if manifest is None:
        raise CheckpointError(
            f"{name} was not written by llmsqueeze, so there is nothing to report of it; give the result "
            "of its `eval --json`"
        )
    sites = [_site(checkpoint, site, record) for site, record in manifest.sites.items()]
    saved = sum(site["bytes"]["before"] - site["bytes"]["after"] for site in sites)
    weights = sum(rows * columns for rows, columns in (site["shape"] for site in sites))
    zeros = sum(site["sparsity"] * site["shape"][0] * site["shape"][1] for site in sites)
    return {
        "name": name,
        "label": name,
        "manifest_sha256": checkpoint.manifest_sha256,
        "model_type": checkpoint.config["model_type"],
        "blocks": checkpoint.block_count,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "format": manifest.format,
        "bytes": {
            "file": checkpoint.file_bytes,
            "tensors": checkpoint.stored_bytes,
            "dense": checkpoint.stored_bytes + saved,
        },
        "bytes_per_token": bytes_per_token(checkpoint),
        "sparsity": zeros / weights if weights else None,
        "steps": manifest.steps,
        "sites": sites,
        "tiles": _tiles(checkpoint),
        "activation": _activation(checkpoint, manifest.activation) if manifest.activation else None,
        "kv_cache": _kv_cache(checkpoint),
    }


def _site(checkpoint: Checkpoint, name: str, record: SiteRecord) -> dict[str, Any]:
    block, projection = _locate(checkpoint, name)
    return {
        "name": name,
        "block": block,
        "projection": projection,
        "shape": list(record.shape),
        "sparsity": record.sparsity,
        "encoding": record.encoding,
        "bytes": {"before": record.bytes_before, "after": record.bytes_after},
        "error": next((record.report[e] for e in ERRORS if e in record.report), None),
        "figures": record.report,
    }


def _locate(checkpoint: Checkpoint, name: str) -> tuple[int | None, str]:
    """The block of a module and its name there, the last part of it."""
    match = re.fullmatch(rf"{re.escape(checkpoint.blocks_path)}\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2].rpartition(".")[2]) if match else (None, name)


def _tiles(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Which tiles of every pruned linear are dense, read from its mask; None unless pruned in tiles."""
    targets = [step["recipe"]["target"] for step in checkpoint.steps if step["command"] == "prune"]
    if not targets or targets[-1]["pattern"] != "tile":
        return None
    size = targets[-1]["tile"]
    assert checkpoint.manifest is not None
    sites = {
        name: ["".join("01"[dense] for dense in row) for row in dense_tiles(mask, size).tolist()]
        for name, mask in (
            (site, _mask(checkpoint, site, record))
            for site, record in checkpoint.manifest.sites.items()
        )
    }
    return {"size": size, "sites": sites}


def _mask(checkpoint: Checkpoint, site: str, record: SiteRecord) -> np.ndarray:
    """[rows, ceil(columns/8)] uint8: which weights are not zero, as numerics.packing has it."""
    name = f"{site}.weight"
    if record.encoding == "bitmask":
        return np.asarray(checkpoint.read_parts([name])[name]["mask"].numpy())
    return np.packbits((checkpoint.read([name])[name] != 0).numpy(), axis=1, bitorder="little")


def _activation(checkpoint: Checkpoint, record: ActivationRecord) -> dict[str, Any]:
    tensors = checkpoint.read_activation()
    gates = []
    for name, gate in record.gates.items():
        block, projection = _locate(checkpoint, name)
        curve = tensors[f"{name}.curve"].tolist()
        gates.append(
            {
                "name": name, "block": block, "projection": projection, "kind": gate.kind,
                "members": list(gate.members), "sparsity": gate.sparsity,
                "threshold": gate.threshold, "zeros": gate.zeros, "ratio": gate.ratio,
                "rank": gate.rank, "measured": None,
                "curve": [float(f"{value:.{CURVE_DIGITS}g}") for value in curve],
            }
        )  # fmt: skip
    return {
        "method": record.method, "prefill": record.prefill, "curve_step": CURVE_STEP, "gates": gates,
    }  # fmt: skip


def _kv_cache(checkpoint: Checkpoint) -> dict[str, Any] | None:
    record = checkpoint.kv_cache
    if record is None:
        return None
    return {
        "format": str(record), "method": record.method, "bits": record.bits,
        "layers": len(record.layers), "heads": record.heads, "width": record.width,
        "key_outliers": record.key_slots, "value_outliers": record.value_slots,
        "sinks": record.sinks,
    }  # fmt: skip


def _add_measured(checkpoint: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """To every gate what it dropped when the checkpoint was evaluated, the last time."""
    for result in results:
        measured = result["document"].get("activation", {}).get("gates", {})
        for gate in (checkpoint["activation"] or {"gates": []})["gates"]:
            if gate["name"] in measured:
                gate["measured"] = measured[gate["name"]]["measured"]


def _check(of: str, name: str, held: bool | None, detail: str) -> dict[str, Any]:
    status = "not measured" if held is None else "passed" if held else "failed"
    return {"of": of, "name": name, "status": status, "detail": detail}


def _checkpoint_checks(
    checkpoints: list[dict[str, Any]], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    checks = []
    for index, entry in enumerate(checkpoints):
        size, dense = entry["bytes"]["tensors"], entry["bytes"]["dense"]
        # Thresholds and codebooks take bytes and the dense form saves none: neither promises to be smaller.
        if entry["format"] == "llmsqueeze" and entry["sites"]:
            share = f"{size / dense:.1%} of {units.size(dense)}, which the same weights take dense"
            checks.append(_check(entry["label"], "the file is smaller", size < dense, share))
        mine = [r["document"] for r in results if r["checkpoint"] == index and r["kind"] == "eval"]
        ratios = [d["token_ppl_ratio"] for d in mine if "token_ppl_ratio" in d]
        detail = (
            f"perplexity is {max(ratios):.4g} times the dense model's"
            if ratios
            else "no result of `eval --against` or `--baseline` was given"
        )
        held = True if ratios else None
        checks.append(_check(entry["label"], "the loss is measured", held, detail))
    return checks


def _speed_checks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        _check(
            result["label"],
            "decoding is faster",
            result["document"]["speedup"] > 1,
            f"{result['document']['speedup']:.3g} times as fast as dense, where bytes allow "
            f"{result['document']['bound']:.3g}",
        )
        for result in results
        if result["kind"] == "bench model"
    ]
