"""Our pruning against the published code, on the same tokens in the same run: time and perplexity.

    git clone https://github.com/locuslab/wanda PUBLISHED
    python -m tests.benchmarks.against_published PUBLISHED --method wanda --samples 16 --seqlen 512

The published statistics and pruning classes run as they are. Their driver predates transformers 5
(blocks took other arguments and returned tuples), so its loop is restated here: one sample at a
time, fp32, statistics for each linear apart, a dense pass and a pruned pass for every block. Its
time covers calibration and pruning; ours runs from opening the checkpoint to its publication.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmsqueeze import compress
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import calibration_windows, evaluation_windows, load_tokenizer
from llmsqueeze.device import choose_device
from llmsqueeze.evaluate import perplexity
from llmsqueeze.recipe import ORDERS, PruneRecipe
from llmsqueeze.runtime import load
from llmsqueeze.source import locate


def published_class(folder: Path, method: str) -> Any:
    """The class of the published code that gathers statistics for one linear."""
    file, name = {"wanda": ("layerwrapper", "WrappedGPT"), "sparsegpt": ("sparsegpt", "SparseGPT")}[
        method
    ]
    spec = importlib.util.spec_from_file_location(file, folder / "lib" / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@torch.no_grad()
def prune_published(model: Any, tokens: Tensor, method: str, sparsity: float, wrapper: Any) -> None:
    device = next(model.parameters()).device
    blocks = model.model.layers
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    class Captured(Exception):
        pass

    def capture(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.update(kwargs)
        raise Captured

    handle = blocks[0].register_forward_pre_hook(capture, with_kwargs=True)
    for sample in tokens:
        try:
            model(sample[None].to(device), use_cache=False)
        except Captured:
            continue
    handle.remove()
    current = torch.cat(inputs)
    outputs = torch.zeros_like(current)
    for block in blocks:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        wrapped = {name: wrapper(linear) for name, linear in linears.items()}

        def add(module: nn.Module, args: Any, out: Tensor, *, to: Any) -> None:
            to.add_batch(args[0].data, out.data)

        handles = [
            linear.register_forward_hook(functools.partial(add, to=wrapped[name]))
            for name, linear in linears.items()
        ]
        for j in range(len(tokens)):
            outputs[j] = block(current[j : j + 1], **arguments)[0]
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            if method == "sparsegpt":
                wrapped[name].fasterprune(sparsity, percdamp=0.01, blocksize=128)
                wrapped[name].free()
                continue
            score = linear.weight.data.abs() * wrapped[name].scaler_row.reshape(1, -1).sqrt()
            order = torch.sort(score, dim=-1, stable=True)[1]
            gone = torch.zeros_like(score, dtype=torch.bool)
            gone.scatter_(1, order[:, : int(score.shape[1] * sparsity)], True)
            linear.weight.data[gone] = 0
        for j in range(len(tokens)):
            outputs[j] = block(current[j : j + 1], **arguments)[0]
        current, outputs = outputs, current


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("published", type=Path, help="a checkout of locuslab/wanda")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--method", choices=("wanda", "sparsegpt"), default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib", help="a .txt file; default: the bundled texts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["group"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--text", type=Path, help="evaluation text; default: the bundled one")
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--no-eval", action="store_true")
    args = parser.parse_args()
    device = choose_device(args.device)
    if device.type == "cpu":
        torch.cuda.synchronize = lambda *_: None  # the published SparseGPT calls it unconditionally
    cache = Path("~/.cache/llmsqueeze").expanduser()
    path = locate(args.checkpoint, offline=True, cache=cache, note=print).path
    tokenizer = load_tokenizer(path)
    tokens = calibration_windows(
        args.calib, tokenizer, samples=args.samples, seqlen=args.seqlen, seed=0
    ).tokens
    held_out = evaluation_windows(
        args.text, tokenizer, seqlen=args.eval_seqlen, windows=args.windows
    ).tokens

    def quality(model: Any) -> float | None:
        return None if args.no_eval else perplexity(model, held_out).token_ppl

    def synchronised() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    Checkpoint(path).build(
        torch.float32
    )  # imports the model's code, which belongs to nobody's time
    for _ in range(args.repeat):
        row: dict[str, Any] = {
            "method": args.method,
            "samples": args.samples,
            "seqlen": args.seqlen,
        }
        for order in args.orders:
            out = Path(tempfile.mkdtemp()) / "out"
            started = synchronised()
            recipe = PruneRecipe.from_dict({
                "method": args.method,
                "target": {"sparsity": args.sparsity},
                "calibration": {
                    "text": args.calib, "samples": args.samples, "seqlen": args.seqlen
                },
                "dtype": args.dtype,
                "order": order,
            })  # fmt: skip
            compress.prune(Checkpoint(path), "benchmark", out, recipe, device)
            row[f"seconds_{order}"] = synchronised() - started
            row[f"ppl_{order}"] = quality(load(Checkpoint(out), torch.float32, device))
            shutil.rmtree(out.parent)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        if "ppl_dense" not in row:
            row["ppl_dense"] = quality(model)
        started = synchronised()
        wrapper = published_class(args.published, args.method)
        prune_published(model, tokens, args.method, args.sparsity, wrapper)
        row["seconds_published"] = synchronised() - started
        row["ppl_published"] = quality(model)
        row["time_ratio"] = row[f"seconds_{args.orders[0]}"] / row["seconds_published"]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
