"""The quality tables of README: prune by every row of a table, measure, print Markdown and JSON lines.

    python -m tests.benchmarks.quality_table --text wikitext2_raw_test.txt --tables 50 60 2:4

Each row is a recipe; a recipe of your own: --row '{"method": "wanda", "target": {"sparsity": 0.6}}'.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmsqueeze import compress
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import evaluation_windows, load_tokenizer
from llmsqueeze.device import choose_device
from llmsqueeze.evaluate import perplexity
from llmsqueeze.recipe import PruneRecipe
from llmsqueeze.runtime import load
from llmsqueeze.source import locate

Recipe = dict[str, Any]


def rows(target: Recipe, *methods: Recipe) -> list[Recipe]:
    return [{**method, "target": target} for method in methods]


MAGNITUDE, WANDA, SPARSEGPT, DSNOT = (
    {"method": m} for m in ("magnitude", "wanda", "sparsegpt", "dsnot")
)
SWAP = {"method": "dsnot", "config": {"swap": "quadratic"}}
TRAINING = {"steps": 80, "lr": 0.002, "batch_tokens": 65536, "micro_batch": 8}
# Patterns have far more logits than tiles: they must not be moved further than the prior put them.
JOINT = {
    "steps": 200,
    "lr": 0.0005,
    "batch_tokens": 16384,
    "micro_batch": 8,
    "temperature_start": 1.0,
}
WANDA_REFIT = {"method": "wanda", "refit": "pcg"}
ADMM, DEFAULT = {"method": "admm", "dense_share": 0.0}, {}
TABLES: dict[str, list[Recipe]] = {
    "50": rows(
        {"sparsity": 0.5}, MAGNITUDE, WANDA, DSNOT, SWAP, SPARSEGPT, WANDA_REFIT, ADMM, DEFAULT
    ),
    "60": rows({"sparsity": 0.6}, WANDA, DSNOT, SWAP, SPARSEGPT, WANDA_REFIT, ADMM, DEFAULT),
    "70": rows({"sparsity": 0.7}, WANDA, DSNOT, SWAP, DEFAULT),
    "2:4": rows(
        {"pattern": "2:4"}, MAGNITUDE, WANDA, DSNOT, SWAP, SPARSEGPT, WANDA_REFIT, ADMM, DEFAULT
    ),
    "out": [
        row
        for pattern, budgets in (("2:4-out", (0.0, 0.01, 0.02, 0.05)), ("4:8-out", (0.0, 0.02)))
        for budget in budgets
        for row in rows({"pattern": pattern, "channel_budget": budget}, DEFAULT)
    ]
    + rows({"pattern": "4:8"}, WANDA_REFIT),
    "allocation": [
        {**method, "target": {"sparsity": sparsity}, "allocation": allocation}
        for allocation in ("owl", "alpha")
        for sparsity, method in ((0.6, WANDA), (0.7, WANDA), (0.6, DEFAULT))
    ],
    "tile": [
        row
        for sparsity in (0.25, 0.35, 0.45)
        for row in rows({"pattern": "tile", "sparsity": sparsity}, DEFAULT)
    ],
    "trained": rows(
        {"pattern": "tile", "sparsity": 0.35},
        {"method": "wanda", "allocation": "benefit"},
        {"method": "wanda", "allocation": "benefit", "refit": "pcg"},
        {"tiles": "tile", "tiles_config": TRAINING},
        {"tiles": "tile", "tiles_config": TRAINING, "refit": "pcg"},
    )
    + rows({"pattern": "tile", "sparsity": 0.5}, {"tiles": "joint", "tiles_config": JOINT}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the bundled one")
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=[])
    parser.add_argument("--row", action="append", default=[], help="a recipe, as JSON")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = choose_device(args.device)
    cache = Path("~/.cache/llmsqueeze").expanduser()
    path = locate(args.checkpoint, offline=True, cache=cache, note=print).path
    windows = evaluation_windows(
        args.text, load_tokenizer(path), seqlen=args.seqlen, windows=args.windows
    ).tokens
    dense = perplexity(load(Checkpoint(path), torch.float32, device), windows).token_ppl
    print(json.dumps({"dense": dense}), flush=True)
    lines = []
    for raw in [row for name in args.tables for row in TABLES[name]] + list(
        map(json.loads, args.row)
    ):
        calibration = {"samples": args.samples, "seqlen": args.seqlen}
        recipe = PruneRecipe.from_dict({**raw, "calibration": calibration})
        out = Path(tempfile.mkdtemp()) / "out"
        started = time.monotonic()
        report = compress.prune(Checkpoint(path), "benchmark", out, recipe, device)
        seconds = time.monotonic() - started
        pruned = Checkpoint(out)
        measured = perplexity(load(pruned, torch.float32, device), windows).token_ppl
        row = {
            "recipe": raw,
            "token_ppl": measured,
            "excess": measured - dense,
            "sparsity": report.sparsity,
            "bytes": pruned.stored_bytes,
            "seconds": seconds,
            "peak_device_bytes": report.peak_device_bytes,
        }
        print(json.dumps(row), flush=True)
        parts = [recipe.method, "refit" * (recipe.refit != "none")]
        parts.append(f"tiles {recipe.tiles}" * (recipe.tiles != "score"))
        name = " + ".join(part for part in parts if part)
        lines.append(
            f"| {name} | {recipe.target.pattern_name} | {report.sparsity:.1%} | "
            f"{pruned.stored_bytes / 1e6:.1f} MB | {measured:.2f} | {seconds:.1f} s |"
        )
        shutil.rmtree(out.parent)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
