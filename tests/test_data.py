"""Text to tokens: exactly the tokens that were promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsqueeze.data import (
    BUNDLED_CALIBRATION,
    BUNDLED_EVALUATION,
    bundled_text,
    calibration_windows,
    evaluation_windows,
    load_tokenizer,
)
from llmsqueeze.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny: Callable[..., Path]) -> Any:
    return load_tokenizer(tiny())


def test_plain_text_is_consecutive_windows(tokenizer: Any, text_file: Path) -> None:
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    made = calibration_windows(str(text_file), tokenizer, samples=7, seqlen=32, seed=5)
    assert made.tokens.flatten().tolist() == ids[: 7 * 32]
    again = evaluation_windows(text_file, tokenizer, seqlen=32, windows=7)
    assert torch.equal(again.tokens, made.tokens)
    assert again.text_sha256 == made.text_sha256
    every = evaluation_windows(text_file, tokenizer, seqlen=32, windows=None)
    assert every.tokens.shape == (len(ids) // 32, 32)


def test_line_ends_are_those_of_a_text_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"one line\r\nand another\rand a third\n" * 20)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    made = calibration_windows(str(path), tokenizer, samples=10, seqlen=16, seed=0)
    assert made.tokens.flatten().tolist() == ids[:160]


def test_bos_comes_once_at_the_start(tokenizer: Any, text_file: Path) -> None:
    plain = calibration_windows(str(text_file), tokenizer, samples=3, seqlen=16, seed=0)
    marked = calibration_windows(str(text_file), tokenizer, samples=3, seqlen=16, seed=0, bos=True)
    assert marked.tokens[0, 0] == tokenizer.bos_token_id
    assert torch.equal(marked.tokens.flatten()[1:], plain.tokens.flatten()[:-1])


def test_documents_are_shuffled_by_the_seed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    rows = [json.dumps({"text": f"document number {i} says {i * i}. "}) for i in range(50)]
    path.write_text("\n".join(rows) + "\n\n")

    def draw(seed: int) -> torch.Tensor:
        return calibration_windows(str(path), tokenizer, samples=4, seqlen=64, seed=seed).tokens

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert "document number" in tokenizer.decode(draw(1).flatten())


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "a"}', '{"text": 3}'])
def test_bad_jsonl_names_the_line(tokenizer: Any, tmp_path: Path, line: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        calibration_windows(str(path), tokenizer, samples=1, seqlen=2, seed=0)


def test_hub_dataset_from_a_local_directory(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.dumps({"text": f"row {i} of the corpus. "}) for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    one = calibration_windows(str(folder), tokenizer, samples=3, seqlen=40, seed=1)
    two = calibration_windows(str(folder), tokenizer, samples=3, seqlen=40, seed=1)
    assert torch.equal(one.tokens, two.tokens)
    assert "of the corpus" in tokenizer.decode(one.tokens.flatten())
    with pytest.raises(DataError, match="too short"):
        calibration_windows(str(folder), tokenizer, samples=300, seqlen=40, seed=1)


def test_text_that_cannot_be_used(tokenizer: Any, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        calibration_windows(str(latin), tokenizer, samples=1, seqlen=2, seed=0)
    with pytest.raises(DataError, match="cannot be read"):
        evaluation_windows(tmp_path / "missing.txt", tokenizer, seqlen=8, windows=1)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(DataError, match="too short"):
        evaluation_windows(empty, tokenizer, seqlen=8, windows=None)


def test_bundled_texts_are_what_sources_md_says() -> None:
    import hashlib

    sources = bundled_text_sources()
    for name in (*BUNDLED_CALIBRATION, BUNDLED_EVALUATION):
        digest = hashlib.sha256(bundled_text(name).encode("utf-8")).hexdigest()
        assert digest in sources, name


def bundled_text_sources() -> str:
    import importlib.resources

    return (importlib.resources.files("llmsqueeze._calib_data") / "SOURCES.md").read_text()


def test_evaluation_text_shares_nothing_with_calibration() -> None:
    calibration = {
        line
        for name in BUNDLED_CALIBRATION
        for line in bundled_text(name).splitlines()
        if len(line) > 80
    }
    evaluation = [line for line in bundled_text(BUNDLED_EVALUATION).splitlines() if len(line) > 80]
    assert len(evaluation) > 100
    assert not calibration.intersection(evaluation)


def test_bundled_text_is_enough(tokenizer: Any) -> None:
    # 4.7 characters a token is more than large vocabularies reach on this mixture.
    assert sum(len(bundled_text(name)) for name in BUNDLED_CALIBRATION) > 128 * 2048 * 4.7
    assert len(bundled_text(BUNDLED_EVALUATION)) > 20 * 2048 * 4.7
