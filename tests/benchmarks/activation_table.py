"""Perplexity against bytes read per token, for all methods of activation sparsity.

    python -m tests.benchmarks.activation_table --text wikitext2_raw_test.txt

Decode-faithful: every token of a window but the first four is gated. Bytes are measured on the same
text: what the gates really dropped. --pruned CHECKPOINT repeats the table on top of a pruned one.
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

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import evaluation_windows, load_tokenizer
from llmsqueeze.device import choose_device
from llmsqueeze.evaluate import perplexity
from llmsqueeze.policy import Policy
from llmsqueeze.runtime import load
from llmsqueeze.runtime.gates import gating_of
from llmsqueeze.source import locate
from llmsqueeze.sparsify import sparsify
from llmsqueeze.sparsify_recipe import SparsifyRecipe
from llmsqueeze.traffic import bytes_per_token

METHODS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name, "allocation": "uniform"}
        for name in ("teal", "wina", "chess", "rsparse")
    },
    "teal greedy": {"method": "teal", "allocation": "greedy"},
    "wina greedy": {"method": "wina", "allocation": "greedy"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", type=Path, help="evaluation text; default: the bundled one")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.25, 0.4, 0.5])
    parser.add_argument("--row", action="append", default=[], help="a recipe, as JSON")
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
    source = Checkpoint(path)
    dense = perplexity(load(source, torch.float32, device), windows).token_ppl
    print(json.dumps({"ungated": dense, "bytes_per_token": bytes_per_token(source)}), flush=True)
    rows = [
        {**METHODS[name], "sparsity": sparsity}
        for sparsity in args.sparsities
        for name in args.methods
    ]
    for raw in rows + [json.loads(row) for row in args.row]:
        measure(source, raw, windows, device)


def measure(
    source: Checkpoint, raw: dict[str, Any], windows: torch.Tensor, device: torch.device
) -> None:
    """Calibrate by one recipe, run it, print a JSON line."""
    out = Path(tempfile.mkdtemp()) / "out"
    started = time.monotonic()
    sparsify(source, "benchmark", out, SparsifyRecipe.from_dict(raw), device)
    seconds = time.monotonic() - started
    made = Checkpoint(out)
    model = load(made, torch.float32, device)
    gating = gating_of(model)
    assert gating is not None and made.activation is not None
    gating.policy = Policy("after", 4)
    gating.count()
    found = perplexity(model, windows)
    dropped = gating.sparsity()
    gates = made.activation.gates
    gaps = [dropped[name] - gate.sparsity for name, gate in gates.items()]
    row = {
        "recipe": raw,
        "token_ppl": found.token_ppl,
        "bytes_per_token": bytes_per_token(made, dropped=dropped),
        "planned_bytes": bytes_per_token(made),
        "mean_gap": sum(gaps) / len(gaps),
        "worst_gap": max(gaps, key=abs),
        "with_branch": sum(gate.rank > 0 for gate in gates.values()),
        "seconds": seconds,
        "eval_seconds": found.seconds,
    }
    print(json.dumps(row), flush=True)
    shutil.rmtree(out.parent)


if __name__ == "__main__":
    main()
