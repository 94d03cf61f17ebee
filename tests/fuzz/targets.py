"""Every reader of outside bytes, with something valid to start from and what must hold of what it accepts.

A target makes an input from a random generator, and reads it. One that is refused raises one of our errors;
one that is accepted must be whole: it can be written again, means the same when it is read back, and what
shows it to people can do so.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from llmsqueeze import (
    artifact,
    card,
    conditions,
    data,
    eval_command,
    gguf_header,
    recovery,
    source,
    step_recipes,
)
from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.config_file import read_config
from llmsqueeze.encodings import ENCODINGS
from llmsqueeze.errors import CheckpointError, LlmsqueezeError
from llmsqueeze.ops import cuda
from llmsqueeze.policy import Policy
from llmsqueeze.recipe_file import read_recipe
from llmsqueeze.report import document
from llmsqueeze.report.page import page
from llmsqueeze.report.text import junit, markdown, step_line
from llmsqueeze.runtime.generation import read_generation
from llmsqueeze.shards import list_shards, load, read_header
from llmsqueeze.steps import run_steps
from llmsqueeze.task_cache import TaskCache
from llmsqueeze.traffic import bytes_per_token
from tests.conftest import save_tokenizer, tiny_model
from tests.fuzz.mutate import (
    INTEGERS,
    TEXTS,
    YAML_PIECES,
    dumps,
    mutate_bytes,
    mutate_json,
    mutate_value,
    mutate_yaml,
)
from tests.test_report import kernels_result, model_result
from tests.test_source import tiny_gguf

RECIPE = """\
prune:
  method: wanda
  target: {sparsity: 0.5, pattern: unstructured}
  calibration: &tokens {text: TEXT, samples: 4, seqlen: 24, seed: 3}
  ignore: [lm_head, "re:o_proj$"]
sparsify: {method: teal, sparsity: 0.4, calibration: *tokens, prefill: "tail:0.5"}
quantize-kv:
  bits: 4
  outliers: 0.05
  calibration: *tokens
"""


@dataclass(frozen=True)
class Target:
    """make: an input. read: raises an error of ours, or AssertionError on what must not be."""

    make: Callable[[random.Random], Any]
    read: Callable[[Any], None]


# Of the inputs of a run, in proportion to those of others: fewer where one takes long.
SHARES = {
    "safetensors": 3, "index": 2, "gguf": 1.5, "gguf, converted": 0.004, "config.json": 4,
    "config.json, opened": 0.05, "llmsqueeze.json": 0.2, "llmsqueeze.json, opened": 0.04, "encodings": 4,
    "tokenizer": 0.08, "generation_config.json": 0.5, "model card": 0.5, "recipe, YAML": 0.1,
    "recipe, JSON": 0.3, "recipe of a manifest": 0.1, "--set": 1, "options": 12, "calibration text": 6,
    "items of tasks": 3, "result for report": 0.4, "baseline": 1.5, "scores of the dense model": 0.05,
    "compiled kernels": 4,
}  # fmt: skip


def targets(folder: Path) -> dict[str, Target]:
    """All of them. folder: an empty directory, in memory if possible."""
    made = _Made(folder)
    return {
        **_files(made),
        **_checkpoints(made),
        **_recipes(made),
        **_texts(made),
        **_reports(made),
        **_caches(made),
    }


class _Made:
    """The valid files that all begins with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(f"line {i} squares to {i * i};" for i in range(220)))
        self.plain = folder / "plain"
        tiny_model().to(torch.bfloat16).save_pretrained(self.plain)
        save_tokenizer(self.plain)
        (self.plain / "README.md").write_text(
            "---\nlicense: mit\nlicense_link: x\n---\n# A model\n"
        )
        self.squeezed = folder / "squeezed"
        raw = yaml.safe_load(RECIPE.replace("TEXT", str(self.text)))
        steps = step_recipes.parse_steps(raw)
        run_steps(Checkpoint(self.plain), "org/tiny", self.squeezed, steps, torch.device("cpu"))
        self.sharded = folder / "sharded"
        tiny_model().save_pretrained(self.sharded, max_shard_size="20KB")
        self.manifest = json.loads((self.squeezed / "llmsqueeze.json").read_text())
        self.config = json.loads((self.plain / "config.json").read_text())
        self.gguf = folder / "tiny.gguf"
        tiny_gguf(self.gguf)

    def file(self, name: str) -> Path:
        path = self.folder / "work" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def copy(self, of: Path, name: str) -> Path:
        path = self.folder / "copies" / name
        shutil.copytree(of, path)
        return path


def same(one: Any, other: Any) -> None:
    assert one == other, f"{str(one)[:300]} is not {str(other)[:300]}"


def _files(made: _Made) -> dict[str, Target]:
    """Containers: safetensors, their index, GGUF."""
    file = made.file("a.safetensors")
    whole = load_file(made.squeezed / "model.safetensors")
    save_file({name: whole[name] for name in sorted(whole)[:6]}, file, {"format": "pt"})
    shard = file.read_bytes()
    size = int.from_bytes(shard[:8], "little")
    header, rest = json.loads(shard[8 : 8 + size]), shard[8 + size :]

    def make_header(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(rng, shard, 8 + size)
        text = mutate_json(rng, header)
        length = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS) % 2**64
        return length.to_bytes(8, "little") + text + rest

    def read_shard(content: bytes) -> None:
        file.write_bytes(content)
        found = list(read_header(file))
        same(len({tensor.name for tensor in found}), len(found))
        # What the library accepts lies in the file; types that are not ours are not loaded.
        loaded = load(t for t in found if t.dtype in ("F32", "F16", "BF16", "U8", "I32"))
        assert sum(t.nbytes for t in loaded.values()) <= len(content)

    folder = made.copy(made.sharded, "index")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())

    def read_index(content: bytes) -> None:
        index.write_bytes(content)
        for path in list_shards(folder):
            assert path.parent == folder and path.suffix == ".safetensors"

    whole_gguf = made.gguf.read_bytes()
    gguf = made.file("a.gguf")

    def read_gguf(content: bytes) -> None:
        gguf.write_bytes(content)
        try:
            _, found = gguf_header.read(gguf)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        assert sum(tensor.end - tensor.start for tensor in found.values()) <= len(content)

    end = len(whole_gguf) - max(tensor.end for tensor in gguf_header.read(made.gguf)[1].values())

    def make_convertible(rng: random.Random) -> bytes:
        while True:  # that the walk lets through
            changed = mutate_bytes(rng, whole_gguf, end if rng.random() < 0.8 else 400)
            gguf.write_bytes(changed)
            try:
                gguf_header.check_model(*gguf_header.read(gguf))
            except ValueError:
                continue
            return changed

    def convert(content: bytes) -> None:
        gguf.write_bytes(content)
        out = made.folder / "converted" / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        source._convert_gguf(gguf, "tiny", out)
        Checkpoint(out)

    return {
        "safetensors": Target(make_header, read_shard),
        "index": Target(lambda rng: mutate_json(rng, listed), read_index),
        "gguf": Target(lambda rng: mutate_bytes(rng, whole_gguf, end), read_gguf),
        "gguf, converted": Target(make_convertible, convert),
    }


def _checkpoints(made: _Made) -> dict[str, Target]:
    """Directories: config, manifest, tensors of encodings, tokenizer, the files beside."""
    config = made.copy(made.plain, "config")

    def read_config_alone(content: bytes) -> None:
        (config / "config.json").write_bytes(content)
        json.dumps(read_config(config)).encode()

    opened = made.copy(made.plain, "opened")

    def open_config(content: bytes) -> None:
        (opened / "config.json").write_bytes(content)
        checkpoint = Checkpoint(opened)
        checkpoint.read(checkpoint.sources)

    def read_manifest(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        manifest = artifact.Manifest.from_json(text)
        same(artifact.Manifest.from_json(manifest.to_json()), manifest)
        for step in manifest.steps:
            step_line(step)
        for site in manifest.sites.values():
            assert 0 <= site.sparsity <= 1

    sealed = made.copy(made.squeezed, "sealed")
    seal = json.loads((sealed / "config.json").read_text())

    def open_sealed(content: bytes) -> None:
        """The chain of hashes made whole again, as whoever meant it would."""
        (sealed / "llmsqueeze.json").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        seal["quantization_config"]["manifest_sha256"] = digest
        (sealed / "config.json").write_text(json.dumps(seal))
        checkpoint = Checkpoint(sealed)
        checkpoint.read(checkpoint.sources)
        bytes_per_token(checkpoint)
        made_of_it = document.build([(checkpoint, "sealed")], [])
        show(made_of_it)

    def make_sealed(rng: random.Random) -> bytes:
        changed = made.manifest
        for _ in range(rng.randrange(1, 3)):
            changed = mutate_value(rng, changed) if isinstance(changed, dict) else changed
        return dumps(changed).encode("utf-8", "surrogatepass")

    stored = load_file(made.squeezed / "model.safetensors")
    sites = [
        (
            record,
            {part: stored[f"{name}.weight_{part}"] for part in ENCODINGS[record.encoding].parts},
        )
        for name, record in artifact.Manifest.from_json(json.dumps(made.manifest)).sites.items()
        if record.encoding != "dense"
    ]
    weight = torch.randn(6, 9).bfloat16()
    int8 = ENCODINGS["int8"].encode(weight)
    sites.append((artifact.SiteRecord((6, 9), "bfloat16", "int8", 54, 108, 66), int8))

    def make_parts(rng: random.Random) -> Any:
        record, parts = rng.choice(sites)
        parts = dict(parts)
        name = rng.choice(list(parts))
        parts[name] = _mutate_tensor(rng, parts[name])
        if rng.random() < 0.3:
            shape = (rng.choice(INTEGERS), record.shape[1])
            record = replace(record, shape=shape if rng.random() < 0.5 else shape[::-1])
        return record, parts

    def read_parts(made_parts: Any) -> None:
        record, parts = made_parts
        decoded = artifact.decode("site", record, parts)
        artifact.check_parts("site", record, parts)
        assert tuple(decoded.shape) == record.shape

    folder = made.copy(made.plain, "tokenizer")
    tokenizers = {
        name: json.loads((folder / name).read_text())
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    originals = {name: (folder / name).read_bytes() for name in tokenizers}

    def make_tokenizer(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(list(tokenizers))
        value = tokenizers[name]
        if name == "tokenizer.json" and rng.random() < 0.7:  # most of it is the vocabulary
            part = rng.choice([key for key in value if key != "model"] + ["model"])
            value = {**value, part: mutate_value(rng, value[part])}
        return name, mutate_json(rng, value)

    def read_tokenizer(content: tuple[str, bytes]) -> None:
        for name, whole in originals.items():
            (folder / name).write_bytes(whole)
        (folder / content[0]).write_bytes(content[1])
        tokenizer = data.load_tokenizer(folder)
        windows = data.evaluation_windows(made.text, tokenizer, seqlen=8, windows=2)
        same(windows.tokens.shape, (2, 8))

    beside = made.copy(made.plain, "generation")
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "max_length": 20, "temperature": 0.6,
                  "do_sample": True, "transformers_version": "5.0.0"}  # fmt: skip

    def read_beside(content: bytes) -> None:
        (beside / "generation_config.json").write_bytes(content)
        read_generation(SimpleNamespace(path=beside))  # type: ignore[arg-type]

    readme = (made.plain / "README.md").read_bytes()

    def make_card(rng: random.Random) -> bytes:
        inner = mutate_yaml(rng, readme[4:37], {"license": "mit", "license_name": ["x"]})
        return b"---\n" + inner + b"\n---\n" if rng.random() < 0.9 else mutate_bytes(rng, readme)

    def read_card(content: bytes) -> None:
        yaml.safe_dump(card.read_front_matter(content.decode("utf-8", "replace"))).encode()

    return {
        "config.json": Target(lambda rng: mutate_json(rng, made.config), read_config_alone),
        "config.json, opened": Target(lambda rng: mutate_json(rng, made.config), open_config),
        "llmsqueeze.json": Target(lambda rng: mutate_json(rng, made.manifest), read_manifest),
        "llmsqueeze.json, opened": Target(make_sealed, open_sealed),
        "encodings": Target(make_parts, read_parts),
        "tokenizer": Target(make_tokenizer, read_tokenizer),
        "generation_config.json": Target(lambda rng: mutate_json(rng, generation), read_beside),
        "model card": Target(make_card, read_card),
    }


def _mutate_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    kind = rng.randrange(6)
    if kind == 0:
        return tensor[rng.randrange(len(tensor) + 1) :] if tensor.dim() else tensor
    if kind == 1:
        return torch.cat([tensor, tensor[:1]])
    if kind == 2:
        return tensor.to(
            rng.choice((torch.uint8, torch.int32, torch.float32, torch.float16, torch.int8))
        )
    if kind == 3:
        return tensor.reshape(rng.choice(((-1,), (1, -1), (-1, 1))))
    raw = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if not raw:
        return tensor
    for _ in range(rng.randrange(1, 5)):
        raw[rng.randrange(len(raw))] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    return torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def _recipes(made: _Made) -> dict[str, Target]:
    raw = yaml.safe_load(RECIPE)
    names = {"yaml": made.file("recipe.yaml"), "json": made.file("recipe.json")}

    def reader(kind: str) -> Callable[[bytes], None]:
        def read(content: bytes) -> None:
            names[kind].write_bytes(content)
            steps = step_recipes.parse_steps(read_recipe(names[kind]))
            said = step_recipes.resolved(steps)
            written = json.dumps(said, allow_nan=False)
            written.encode()
            yaml.safe_dump(said).encode()
            same(json.dumps(step_recipes.resolved(step_recipes.parse_steps(said))), written)

        return read

    def read_setting(texts: tuple[str, ...]) -> None:
        step_recipes.parse_steps(step_recipes.parse_settings(texts))

    def make_setting(rng: random.Random) -> tuple[str, ...]:
        path = rng.choice(
            ("prune.target.sparsity", "sparsify.sparsity", "quantize-kv.bits", "prune.ignore")
        )
        value = rng.choice((*YAML_PIECES, *TEXTS, "0.5", "[a]"))
        text = f"{path}={value}"
        return (
            mutate_bytes(rng, text.encode()).decode("utf-8", "surrogateescape"),
            "encode.to=int8",
        )

    manifest = {"format_version": 1, "steps": made.manifest["steps"]}
    readers = (
        conditions.Condition.parse,
        conditions.parse_size,
        Policy.parse,
        lambda text: recovery.parse_gates((text,)),
    )

    def make_option(rng: random.Random) -> tuple[int, str]:
        good = rng.choice(("token_ppl < 1.5", "180MB", "tail:0.5", "after:4", "piqa=0.97"))
        text = mutate_bytes(rng, good.encode()).decode("utf-8", "surrogateescape")
        return rng.randrange(len(readers)), rng.choice(TEXTS) if rng.random() < 0.05 else text

    return {
        "recipe, YAML": Target(lambda rng: mutate_yaml(rng, RECIPE.encode(), raw), reader("yaml")),
        "recipe, JSON": Target(lambda rng: mutate_json(rng, raw), reader("json")),
        "recipe of a manifest": Target(lambda rng: mutate_json(rng, manifest), reader("json")),
        "--set": Target(make_setting, read_setting),
        "options": Target(make_option, lambda case: str(readers[case[0]](case[1])) and None),
    }


def _texts(made: _Made) -> dict[str, Target]:
    from llmsqueeze import tasks

    lines = [{"text": f"document {i}", "meta": {"n": i, "x": None}} for i in range(3)]
    file = made.file("a.jsonl")

    def make_lines(rng: random.Random) -> bytes:
        content = b"\n".join(json.dumps(line).encode() for line in lines[:2])
        changed = mutate_json(rng, lines[2]) if rng.random() < 0.7 else mutate_bytes(rng, content)
        return content + rng.choice((b"\n", b"\r\n", b"\n\n", b"\x0b", b"")) + changed

    def read_lines(content: bytes) -> None:
        file.write_bytes(content)
        found = data._jsonl(file, data._decode(file, data._read_bytes(file)))
        "".join(found).encode()

    item = {"query": "one and one is", "choices": ["two", "three"], "gold": 0}

    def make_items(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.5:
            return "a.json", mutate_json(rng, [item, item])
        return "a.jsonl", json.dumps(item).encode() + b"\n" + mutate_json(rng, item)

    def read_items(case: tuple[str, bytes]) -> None:
        path = made.file(case[0])
        path.write_bytes(case[1])
        for found in tasks._read_items(path):
            assert 0 <= found["gold"] < len(found["choices"])
            json.dumps(found, ensure_ascii=False).encode()

    return {
        "calibration text": Target(make_lines, read_lines),
        "items of tasks": Target(make_items, read_items),
    }


def show(report: dict[str, Any]) -> None:
    """All of a report's files, as strangers' parsers read them."""
    json.loads(json.dumps(report, allow_nan=False))
    ElementTree.fromstring(junit(report))
    markdown(report).encode("utf-8", "backslashreplace")
    text = page(report)
    assert "<script" not in text.lower() and text.count("</body>") == 1


def _reports(made: _Made) -> dict[str, Target]:
    hash_ = "0" * 64
    evaluation = {
        "schema": "llmsqueeze.eval/1", "checkpoint": "out", "manifest_sha256": None, "token_ppl": 20.5,
        "seqlen": 512, "windows": 16, "tokens": 8176, "bos": False, "dtype": "float32", "device": "cpu",
        "backend": "reference", "text": "a.txt", "text_sha256": hash_, "tokens_sha256": hash_,
        "size_bytes": 10**8, "bytes_per_token": 10**7, "against": "dense", "dense_token_ppl": 18.0,
        "token_ppl_ratio": 1.14, "dense_size_bytes": 2 * 10**8, "dense_bytes_per_token": 2 * 10**7,
        "passkey": {"accuracy": 0.5, "prompts": 20, "length": 512}, "dense_passkey": {"accuracy": 1.0},
        "kv_cache": {"format": "kvquant:4", "bits_per_element": 4.2},
        "activation": {
            "gated": "after:4", "sparsity": 0.4,
            "gates": {"model.layers.0.mlp.down_proj": {"target": 0.4, "measured": 0.41}},
        },
        "tasks": {"piqa": {"acc": 0.6, "acc_stderr": 0.01, "metric": "acc", "items": 100}},
        "conditions": [{"fail_if": "token_ppl > 30", "value": 20.5, "failed": False}],
    }  # fmt: skip
    settings = {
        "num_fewshot": 0,
        "items": 100,
        "bos": False,
        "max_length": 64,
        "requests_sha256": hash_,
    }
    results = [
        evaluation,
        model_result(),
        kernels_result(),
        {"error": "no such thing", "exit_code": 3},
    ]
    file = made.file("result.json")

    def read_result(content: bytes) -> None:
        file.write_bytes(content)
        show(document.build([], [document.read_result(file)]))

    def read_baseline(content: bytes) -> None:
        file.write_bytes(content)
        found = eval_command._read_baseline(file)
        assert 0 < 20.0 / found["token_ppl"] <= 20
        mine = {
            "piqa": {**settings, "metric": "acc", "acc": 0.5, "higher_is_better": {"acc": True}}
        }
        recovery.check_requests({"piqa": hash_}, found.get("tasks") or {}, "baseline")
        recovery.compare(mine, found.get("tasks") or {})
        json.dumps(mine, allow_nan=False)

    baseline = copy.deepcopy(evaluation)
    baseline["tasks"]["piqa"] |= settings  # type: ignore[index]
    return {
        "result for report": Target(lambda rng: mutate_json(rng, rng.choice(results)), read_result),
        "baseline": Target(lambda rng: mutate_json(rng, baseline), read_baseline),
    }


def _caches(made: _Made) -> dict[str, Target]:
    """What we kept ourselves: whatever became of it, the answer is the right one."""
    kept = made.folder / "tasks"
    kept.mkdir()
    right = {"piqa": {"acc": 0.6, "items": 100}}
    cache = TaskCache(kept, {"checkpoint": "0" * 64})
    same(cache.get("piqa", {"piqa": "1"}, lambda: right), right)
    (entry,) = kept.iterdir()
    whole = entry.read_bytes()

    def read_scores(content: bytes) -> None:
        entry.write_bytes(content)
        same(cache.get("piqa", {"piqa": "1"}, lambda: right), right)

    code = bytes(range(256)) * 4
    digest = hashlib.sha256(code).digest()

    def read_cubin(content: bytes) -> None:
        file = made.file("a.cubin")
        file.write_bytes(content)
        found = cuda.read_cubin(file)
        assert found is None or found == code

    return {
        "scores of the dense model": Target(
            lambda rng: mutate_json(rng, json.loads(whole)), read_scores
        ),
        "compiled kernels": Target(lambda rng: mutate_bytes(rng, code + digest), read_cubin),
    }


def is_ours(error: BaseException) -> bool:
    """Whether an input was refused as it should be: one line, and an exit code that blames the input."""
    return (
        isinstance(error, LlmsqueezeError)
        and error.exit_code in (2, 3)
        and bool(str(error).strip())
    )
