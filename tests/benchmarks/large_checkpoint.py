"""Prune a checkpoint of a large model's shape, and say what that takes of memory and time.

    python -m tests.benchmarks.large_checkpoint DIR --shape 7b --device cpu --samples 4 --seqlen 128
    python -m tests.benchmarks.large_checkpoint DIR --shape 70b --plan

Random weights in bf16, one block to a shard, are made in DIR, and removed from it afterwards unless --keep.
What `plan` says of the same recipe is printed beside it. With --plan files are hollow: a plan reads headers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.benchmarks.plan_memory import compress, plan, save_tokenizer


@dataclass(frozen=True)
class Large:
    """A Llama: hidden and inner size, heads, key-value heads, blocks, tokens of the vocabulary."""

    hidden: int
    inner: int
    heads: int
    groups: int
    blocks: int
    vocab: int


SHAPES = {
    "1b": Large(2048, 5632, 32, 4, 22, 32000),
    "7b": Large(4096, 11008, 32, 32, 32, 32000),
    "8b": Large(4096, 14336, 32, 8, 32, 128256),
    "70b": Large(8192, 28672, 64, 8, 80, 32000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", default="wanda", help="of prune; default: its default")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--plan", action="store_true", help="do not prune")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    source, out = args.directory / args.shape, args.directory / "out"
    began = time.monotonic()
    total = make(SHAPES[args.shape], source, args.device, hollow=args.plan)
    print(
        f"{args.shape}: {total / 1e9:.2f} GB made in {time.monotonic() - began:.0f} s", flush=True
    )
    settings = [
        f"prune.calibration.samples={args.samples}",
        f"prune.calibration.seqlen={args.seqlen}",
    ]
    if args.method != "default":
        settings.append(f"prune.method={args.method}")
    given = ["--device", args.device, "--json", *(p for s in settings for p in ("--set", s))]
    if args.plan:
        print(f"planned: {plan(str(source), [*given, '-q']) / 1e9:.2f} GB of host memory")
        return
    planned = plan(str(source), [*given, "-q"])
    taken, seconds = compress(str(source), [*given, "--resume", "never"], out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(
        f"planned {planned / 1e9:.2f} GB of host memory, taken {taken / 1e9:.2f}: {planned / taken:.2f}"
    )
    print(f"{seconds:.0f} s in all, {size / 1e9:.2f} GB written")
    shutil.rmtree(out)
    if not args.keep:
        shutil.rmtree(source)


def make(shape: Large, path: Path, device: str, *, hollow: bool) -> int:
    """Bytes of a checkpoint, which is made unless it is there. hollow: weights are holes in the files."""
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator(device).manual_seed(0)
        heads = shape.hidden // shape.heads * shape.groups
        linears = {
            "self_attn.q_proj": (shape.hidden, shape.hidden),
            "self_attn.k_proj": (heads, shape.hidden),
            "self_attn.v_proj": (heads, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.hidden),
            "mlp.gate_proj": (shape.inner, shape.hidden),
            "mlp.up_proj": (shape.inner, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.inner),
        }
        norms = ("input_layernorm", "post_attention_layernorm")

        def drawn(rows: int, columns: int) -> torch.Tensor:
            if hollow:
                return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
            x = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
            return x.mul_(columns**-0.5).bfloat16().cpu()

        def ones() -> torch.Tensor:
            return torch.ones(shape.hidden, dtype=torch.bfloat16)

        weight_map: dict[str, str] = {}
        count = shape.blocks + 1

        def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
            name = f"model-{number:05}-of-{count:05}.safetensors"
            (save_hollow if hollow else save_file)(tensors, path / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, name))

        outer = {
            f"{n}.weight": drawn(shape.vocab, shape.hidden)
            for n in ("model.embed_tokens", "lm_head")
        }
        write(1, outer | {"model.norm.weight": ones()})
        for index in range(shape.blocks):
            block = {f"{n}.weight": drawn(*s) for n, s in linears.items()}
            block |= {f"{n}.weight": ones() for n in norms}
            write(index + 2, {f"model.layers.{index}.{n}": t for n, t in block.items()})
        index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index_file))
        save_tokenizer(shape.vocab, path)
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
            "intermediate_size": shape.inner, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups, "num_hidden_layers": shape.blocks,
            "vocab_size": shape.vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def save_hollow(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A file of safetensors, all of whose data is a hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    sys.exit(main())
