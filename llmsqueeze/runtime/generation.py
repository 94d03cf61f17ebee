"""generation_config.json: which tokens end an answer."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.errors import CheckpointError
from llmsqueeze.untrusted import first_line, is_refusal, read_text


def read_generation(checkpoint: Checkpoint) -> Any | None:
    """The checkpoint's GenerationConfig, None if it has none; CheckpointError on one that cannot be used."""
    file = checkpoint.path / "generation_config.json"
    if not file.exists():
        return None
    try:
        read_text(file)
        found = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except BaseException as error:  # transformers raises many kinds; all mean the file is unusable
        if not is_refusal(error):
            raise
        raise CheckpointError(f"{file}: not usable ({first_line(error)})") from error
    ends = found.eos_token_id
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise CheckpointError(f"{file}: eos_token_id is {ends!r}, which is no token")
    return found
