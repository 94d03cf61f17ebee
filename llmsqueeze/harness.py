"""A model as lm-eval's: its requests run with the gates and the quantised KV cache in place.

lm-eval's own class calls the model without a cache, pads batches, and leaves the first token to the
tokenizer. Here every pass gets a cache where the checkpoint quantises it, a batch holds requests of one
length (a gate that counts tokens must not count padding), and the beginning-of-text token is an option.
Importing this imports lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from llmsqueeze.checkpoint import Checkpoint
from llmsqueeze.data import load_tokenizer, tokenizing
from llmsqueeze.device import choose_device, evaluation_dtype, exact_matmul
from llmsqueeze.errors import CalibrationError, CheckpointError, DataError, RecipeError
from llmsqueeze.evaluate import cache_options
from llmsqueeze.policy import DEFAULT_GATE, Policy
from llmsqueeze.runtime.backend import choose_backend
from llmsqueeze.runtime.kv_cache import parse_format
from llmsqueeze.subject import Subject, prepare

# Requests of one length are batched up to this many tokens. On a CPU that only saves reading the weights.
GPU_BATCH_TOKENS, CPU_BATCH_TOKENS = 4096, 256

# How often progress is told of, at most.
STEPS = 20

# Of loglikelihood requests: what was asked, and the token ids of context and continuation.
Request = tuple[Any, list[int], list[int]]


class HarnessLM(HFLM):  # type: ignore[misc]  # untyped
    """One model for lm-eval's `evaluate` and `simple_evaluate`.

    bos: whether every context begins with the beginning-of-text token; the first token of a text that is
    scored whole (word_ppl) is predicted from it either way. batch_size: requests to a pass; None: by
    tokens. on_request: told how many of how many requests are done. Log-probabilities are
    taken in fp32. truncated: requests so far that were longer than the model's context, and cut.
    """

    def __init__(
        self,
        subject: Subject,
        tokenizer: Any,
        *,
        bos: bool = False,
        batch_size: int | None = None,
        on_request: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """DataError if bos is asked of a tokenizer that has none."""
        if bos and tokenizer.bos_token_id is None:
            raise DataError("--bos: this checkpoint's tokenizer has no beginning-of-text token")
        model = subject.model
        # HFLM ties the weights once more. That was done, and what kernels compute with cannot be tied.
        model.tie_weights = lambda *args, **kwargs: None
        try:
            super().__init__(
                model, tokenizer=tokenizer, add_bos_token=bos, softmax_dtype="float32", batch_size=1
            )
        finally:
            del model.tie_weights
        self.subject = subject
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.bos = bos
        self.rows = batch_size
        self.on_request = on_request
        self.truncated = 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessLM:
        """What lm-eval calls for model="llmsqueeze"; arguments: those of llmsqueeze.lm_eval_model."""
        options = {**arg_dict, **(additional_config or {})}
        options.pop("max_batch_size", None)  # of searching for a batch size, which is not done
        size = options.get("batch_size")
        if size is not None:
            options["batch_size"] = None if str(size).startswith("auto") else int(size)
        return open_model(**{name: value for name, value in options.items() if value is not None})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessLM:
        """The same, of "pretrained=PATH,bos=True"."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        with tokenizing():
            ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        if max(ids, default=0) >= self.vocabulary:
            raise CheckpointError(
                f"the tokenizer gives id {max(ids)}, the embedding has {self.vocabulary} rows; tokenizer and "
                "weights do not belong together"
            )
        # A chat template may have written the token already.
        first = self.bos and add_special_tokens is not False
        if first and ids[:1] != [self.tokenizer.bos_token_id]:
            ids = [self.tokenizer.bos_token_id, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of one prompt, [1, tokens] each: nothing is padded."""
        (string,) = strings
        whole = self.tok_encode(string)
        ids = whole[-left_truncate_len:] if left_truncate_len else whole
        self.truncated += len(ids) < len(whole)
        tokens = torch.tensor([ids])
        return tokens, torch.ones_like(tokens)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        # lm-eval predicts a text's first token from this token already; twice it would be scored.
        bos, self.bos = self.bos, False
        try:
            return self._one_by_one(super().loglikelihood_rolling, requests)
        finally:
            self.bos = bos

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._one_by_one(super().generate_until, requests)

    def _one_by_one(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        on_request, self.on_request = self.on_request, lambda done, total: None
        answers = []
        try:
            for request in requests:
                answers += answer([request], disable_tqdm=True)
                if _is_step(len(answers) - 1, len(answers), len(requests)):
                    on_request(len(answers), len(requests))
        finally:
            self.on_request = on_request
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether it is the greedy one.

        CalibrationError if one is not a number: comparing those would give an accuracy all the same.
        """
        by_length: dict[int, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_length.setdefault(len(context) + len(continuation), []).append(index)
        tokens = CPU_BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        done = 0
        for length in sorted(by_length, reverse=True):
            where = by_length[length]
            if length > self.max_length + 1:
                self.truncated += len(where)
            self.batch_size_per_gpu = self.rows or max(1, tokens // min(length, self.max_length))
            for start in range(0, len(where), self.batch_size_per_gpu * 8):
                part = where[start : start + self.batch_size_per_gpu * 8]
                found = super()._loglikelihood_tokens([requests[i] for i in part], True)
                for index, answer in zip(part, found, strict=True):
                    answers[index] = answer
                done += len(part)
                if _is_step(done - len(part), done, len(requests)):
                    self.on_request(done, len(requests))
        self.batch_size_per_gpu = 1
        if any(math.isnan(value) for value, _ in answers):
            raise CalibrationError(
                "a task's log-probability is not a number: weights are damaged, or the dtype overflows "
                "(try --dtype float32)"
            )
        return answers

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[requests, tokens] ids → logits."""
        cache = self.subject.cache() if self.subject.cache else None
        with exact_matmul():
            logits: Tensor = self.model(inps, **cache_options(self.model, cache)).logits
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[1, tokens] ids → the same with an answer behind them."""
        if self.subject.cache:
            kwargs["past_key_values"] = self.subject.cache()
        with exact_matmul():
            tokens: Tensor = super()._model_generate(context, *args, **kwargs)
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: HFLM would ask the hub for the revision of a model that is not from there."""
        return {}


def _is_step(before: int, done: int, total: int) -> bool:
    return done * STEPS // total > before * STEPS // total


def open_model(
    pretrained: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    bos: bool = False,
    gate: str | None = None,
    kv_cache: str | None = None,
    backend: str | None = None,
    batch_size: int | None = None,
) -> HarnessLM:
    """See llmsqueeze.lm_eval_model, whose arguments these are."""
    checkpoint = Checkpoint(Path(pretrained).expanduser())
    if gate and checkpoint.activation is None:
        raise RecipeError(f"gate: {pretrained} has no activation thresholds; sparsify it first")
    where = choose_device(device)
    precision = evaluation_dtype(dtype, checkpoint.dtype, where)
    chosen = choose_backend(backend, checkpoint, precision, where)
    subject = prepare(
        checkpoint,
        precision,
        where,
        kernels=chosen == "kernels",
        policy=Policy.parse(gate or DEFAULT_GATE),
        kv_cache=parse_format(kv_cache) if kv_cache and kv_cache != "none" else None,
        stored_cache=kv_cache is None,
    )
    tokenizer = load_tokenizer(checkpoint.path)
    return HarnessLM(subject, tokenizer, bos=bos, batch_size=batch_size)
