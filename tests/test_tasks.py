"""Tasks of lm-eval on tiny checkpoints, against plain loops over transformers' own forward pass."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmsqueeze
from llmsqueeze.activation import Policy
from llmsqueeze.errors import DataError
from llmsqueeze.evaluate import cache_options
from llmsqueeze.ops import cpu
from llmsqueeze.recovery import compare, gates, parse_gates, recovery, warnings
from llmsqueeze.runtime.gates import gating_of
from llmsqueeze.runtime.kv_cache import packed_cache, parse_format
from llmsqueeze.task_cache import TaskCache, checkpoint_sha256

# lm-eval and what it imports warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

ITEMS = [
    {"query": f"{i} and {i * i} make", "choices": [f"{i * 7}", "a lot", "x" * (i % 5 + 1)], "gold": i % 3}
    for i in range(24)
]  # fmt: skip
SHORT = ["--windows", 1, "--seqlen", 16, "--device", "cpu", "-q", "--json"]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, ITEMS)))
    return path


@pytest.fixture
def run(cli: Any, text_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """`eval` with a folder of its own for what is kept."""

    def evaluate(checkpoint: Any, *options: Any) -> Any:
        where = ["--cache-dir", tmp_path / "kept", "--text", text_file]
        return cli("eval", checkpoint, *options, *where, *SHORT)

    return evaluate


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where anything tried to connect to."""
    tried: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise OSError("no network in tests")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def logits_of(model: Any, ids: list[int], cache: Any = None) -> torch.Tensor:
    """[tokens, vocabulary] log-probabilities in fp64."""
    with torch.no_grad():
        found = model(torch.tensor([ids]), **cache_options(model, cache)).logits[0]
    return found.double().log_softmax(-1)


def score(model: Any, first: list[int], context: list[int], choice: list[int], cache: Any) -> float:
    ids = [*first, *context, *choice]
    found = logits_of(model, ids, cache)
    return sum(float(found[len(ids) - len(choice) - 1 + i, t]) for i, t in enumerate(choice))


def oracle(
    path: Path, *, bos: bool = False, cache: Callable[[Any], Any] = lambda model: None,
    policy: str | None = None,
) -> dict[str, float]:  # fmt: skip
    """Accuracies by one forward pass for every choice."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if policy:
        gating = gating_of(model)
        assert gating
        gating.policy = Policy.parse(policy)
    first = [tokenizer.bos_token_id] if bos else []
    right, right_norm = 0, 0
    for item in ITEMS:
        context = tokenizer.encode(item["query"], add_special_tokens=False)
        scores = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            answer = tokenizer.encode(" " + choice, add_special_tokens=False)
            scores.append(score(model, first, context, answer, cache(model)))
        norm = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]  # type: ignore[call-overload]
        right += scores.index(max(scores)) == item["gold"]
        right_norm += norm.index(max(norm)) == item["gold"]
    return {"acc": right / len(ITEMS), "acc_norm": right_norm / len(ITEMS)}


def measured(result: Any, task: str = "sums") -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    entry: dict[str, Any] = json.loads(result.stdout)["tasks"][task]
    return entry


@pytest.mark.parametrize("bos", [False, True])
def test_accuracy_is_that_of_a_plain_loop(
    run: Any, tiny: Any, items: Path, no_network: list[Any], bos: bool
) -> None:
    entry = measured(run(tiny(), "--tasks", items, "--bos" if bos else "--no-bos"))
    expected = oracle(tiny(), bos=bos)
    assert {name: entry[name] for name in expected} == pytest.approx(expected)
    share = entry["acc"]
    assert entry["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (24 - 1)))
    assert (entry["items"], entry["num_fewshot"], entry["bos"]) == (24, 0, bos)
    assert entry["chance"] == pytest.approx(1 / 3)
    assert not no_network


def requests(pairs: list[tuple[str, str]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("kv_cache", [None, "fp8", "rotate:2"])
def test_log_probabilities_with_a_quantised_cache(tiny: Any, kv_cache: str | None) -> None:
    path = tiny("llama", head_dim=16)
    mine = llmsqueeze.lm_eval_model(path, device="cpu", kv_cache=kv_cache)
    pairs = [(str(item["query"]), f" {c}") for item in ITEMS[:6] for c in item["choices"]]  # type: ignore[attr-defined]
    pairs.append(("", "nothing before"))
    found = mine.loglikelihood(requests(pairs))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    format = parse_format(kv_cache) if kv_cache else None
    plain = []
    for (context, answer), (value, greedy) in zip(pairs, found, strict=True):
        before = mine.tok_encode(context) if context else [1]  # the beginning-of-text token
        after = mine.tok_encode(answer)
        cache = packed_cache(model, format) if format else None
        assert value == pytest.approx(score(model, [], before, after, cache), abs=2e-4)
        likeliest = logits_of(
            model, before + after, packed_cache(model, format) if format else None
        )
        assert greedy == (likeliest.argmax(-1)[len(before) - 1 : -1].tolist() == after)
        plain.append(score(model, [], before, after, None))
    gap = max(abs(value - exact) for (value, _), exact in zip(found, plain, strict=True))
    assert (gap > 1e-3) == bool(kv_cache)


def test_requests_of_many_lengths_in_batches(tiny: Any) -> None:
    """Nothing is padded, whatever the batch size, and answers come in the order of the questions."""
    pairs = [("ab" * (i % 7 + 1), "cd" * (i % 3 + 1)) for i in range(40)]
    one, many = (
        llmsqueeze.lm_eval_model(tiny(), device="cpu", batch_size=size).loglikelihood(
            requests(pairs)
        )
        for size in (1, 16)
    )
    assert [v for v, _ in one] == pytest.approx([v for v, _ in many], abs=1e-4)
    assert len({round(v, 6) for v, _ in one}) == 21


@pytest.fixture
def gated(cli: Any, tiny: Any, tmp_path: Path, prune_args: list[Any]) -> Path:
    out = tmp_path / "gated"
    done = cli(
        "sparsify", tiny(), "-o", out, "--sparsity", 0.6, "--allocation", "uniform", *prune_args
    )
    assert done.exit_code == 0, done.stderr
    return out


@pytest.mark.parametrize("policy", ["tail:0.5", "after:4", "dense"])
def test_gates_see_the_tokens_that_the_report_says(
    run: Any, items: Path, gated: Path, policy: str
) -> None:
    result = run(gated, "--tasks", items, "--gate", policy)
    expected = oracle(gated, policy=policy)
    assert {name: measured(result)[name] for name in expected} == pytest.approx(expected)
    activation = json.loads(result.stdout)["activation"]
    assert activation["gated"] == policy
    # Their own share: other tokens than the text's.
    if policy == "dense":
        assert "tasks" not in activation
    else:
        assert 0.3 < activation["tasks"]["sparsity"] < 0.9


def test_padding_would_have_changed_what_a_gate_sees(gated: Path) -> None:
    """One request alone and beside a longer one: the last half is another half of a padded row."""
    mine = llmsqueeze.lm_eval_model(gated, device="cpu", gate="tail:0.5", batch_size=8)
    short, long = ("abcdefgh", "ijkl"), ("abcdefgh" * 3, "ijklmnop")
    alone = mine.loglikelihood(requests([short]))[0][0]
    beside = mine.loglikelihood(requests([long, short]))[1][0]
    assert beside == pytest.approx(alone, abs=1e-5)


@pytest.mark.skipif(cpu.library() is None, reason="no kernels built")
def test_kernels_compute_with_what_is_stored(
    run: Any, cli: Any, tiny: Any, items: Path, tmp_path: Path, prune_args: list[Any]
) -> None:
    """The head of such a model is tied to the embedding, and no parameter: lm-eval must not tie it again."""
    source = tiny("llama", tie_word_embeddings=True)
    pruned = tmp_path / "pruned"
    assert cli("prune", source, "-o", pruned, "--method", "wanda", *prune_args).exit_code == 0
    result = run(pruned, "--tasks", items, "--backend", "kernels", "--dtype", "float32")
    assert json.loads(result.stdout)["backend"] == "kernels", result.stderr
    expected = oracle(pruned)
    assert {name: measured(result)[name] for name in expected} == pytest.approx(expected)


def yaml_task(path: Path, rows: list[dict[str, Any]], body: str) -> Path:
    data = path.with_suffix(".data.jsonl")
    data.write_text("\n".join(map(json.dumps, rows)))
    path.write_text(
        f"task: {path.stem}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f"test_split: test\n{body}"
    )
    return path


GENERATE = """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_generation_goes_through_the_quantised_cache(run: Any, tiny: Any, tmp_path: Path) -> None:
    path = tiny("llama", head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, plain = [], []
    for index in range(12):
        text = f"{index} times {index + 3}"
        answers = []
        for format in (parse_format("rotate:2"), None):
            ids = tokenizer.encode(text, add_special_tokens=False)
            # Decoded as it is: the cache holds what was read, one token comes at a time.
            cache = packed_cache(model, format) if format else None
            new, got = ids, []
            for _ in range(6):
                given = new if cache else [*ids, *got]
                got.append(int(logits_of(model, given, cache)[-1].argmax()))
                new = got[-1:]
                if got[-1] == tokenizer.eos_token_id:
                    break
            answers.append(tokenizer.decode(got, skip_special_tokens=True))
        rows.append({"text": text, "answer": answers[0]})
        plain.append(answers[0] == answers[1])
    assert not all(plain)
    task = yaml_task(tmp_path / "go_on.yaml", rows, GENERATE)
    quantised = measured(run(path, "--tasks", task, "--kv-cache", "rotate:2"), "go_on")
    assert quantised["exact_match"] == 1
    unquantised = measured(run(path, "--tasks", task), "go_on")
    assert unquantised["exact_match"] == pytest.approx(sum(plain) / len(plain))


def test_word_perplexity_has_its_own_name(run: Any, tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": "three short words"}, {"text": "and two more of them"}]
    body = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
    task = yaml_task(tmp_path / "texts.yaml", rows, body)
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    total = 0.0
    for row in rows:
        total += score(
            model, [1], [], tokenizer.encode(row["text"], add_special_tokens=False), None
        )
    for bos in ("--bos", "--no-bos"):  # a text's first token is predicted from it either way
        entry = measured(run(tiny(), "--tasks", task, bos), "texts")
        assert entry["word_ppl"] == pytest.approx(math.exp(-total / 8), rel=1e-4)
        assert entry["byte_ppl"] == pytest.approx(math.exp(-total / 37), rel=1e-4)
        assert not any("perplexity" in name or "token_ppl" in name for name in entry)
        assert entry["higher_is_better"] == {"word_ppl": False, "byte_ppl": False}


def test_few_shot_examples_are_asked_for(run: Any, tiny: Any, items: Path) -> None:
    # Eight bytes an item: three of them and a question fit the model's 64 positions.
    items.write_text(
        "\n".join(
            json.dumps({"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2}) for i in range(8)
        )
    )
    none = measured(run(tiny(), "--tasks", items))
    three = measured(run(tiny(), "--tasks", items, "--num-fewshot", 3))
    assert (none["num_fewshot"], three["num_fewshot"]) == (0, 3)
    assert none["requests_sha256"] != three["requests_sha256"]
    again = measured(run(tiny(), "--tasks", items, "--num-fewshot", 3))
    assert again["requests_sha256"] == three["requests_sha256"]
    assert measured(run(tiny(), "--tasks", items, "--limit", 5))["items"] == 5


def test_a_group_is_judged_by_its_average(
    run: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsqueeze import tasks

    body = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    folder = tmp_path / "known"
    folder.mkdir()
    yaml_task(folder / "first-ones.yaml", ITEMS[:9], body)
    yaml_task(folder / "others.yaml", ITEMS[9:], body)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [first-ones, others]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    small = functools.partial(tasks.TaskManager, include_path=folder)
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: small(include_defaults=False)
    )
    gate = ("--against", tiny(), "--min-recovery", 1, "--min-recovery", "others=0.5")
    result = run(tiny(), "--tasks", "both", *gate)
    found = json.loads(result.stdout)
    assert result.exit_code == 0, result.stderr
    assert set(found["tasks"]) == {"both", "first_ones", "others"}
    assert found["tasks"]["both"]["acc"] == pytest.approx(oracle(tiny())["acc"])
    assert found["tasks"]["both"]["items"] == 24 and found["tasks"]["first_ones"]["items"] == 9
    judged = [condition["fail_if"] for condition in found["conditions"]]
    assert judged == ["tasks.both.recovery < 1", "tasks.others.recovery < 0.5"]
    # A group without an average of its own is its tasks, whatever groups within it have.
    (folder / "all.yaml").write_text("group: all\ntask: [both]\n")
    result = run(tiny(), "--tasks", "all", "--against", tiny(), "--min-recovery", 1)
    judged = [condition["fail_if"] for condition in json.loads(result.stdout)["conditions"]]
    assert judged == ["tasks.first_ones.recovery < 1", "tasks.others.recovery < 1"]
    # Another average of the same requests is another score.
    before = found["tasks"]["both"]["requests_sha256"]
    text = (folder / "both.yaml").read_text()
    (folder / "both.yaml").write_text(text.replace("true", "false"))
    other = json.loads(run(tiny(), "--tasks", "both", *gate).stdout)["tasks"]["both"]
    assert other["requests_sha256"] != before
    dense = other["dense"]["acc"]
    assert dense == other["acc"] != found["tasks"]["both"]["acc"]


def test_cut_requests_are_counted(run: Any, tiny: Any, items: Path) -> None:
    long = {"query": "w" * 90, "choices": ["a", "b"], "gold": 0}
    items.write_text(json.dumps(long) + "\n" + json.dumps(ITEMS[0]))
    assert measured(run(tiny(), "--tasks", items))["truncated"] == 2


def test_lm_eval_finds_the_model_by_name(tiny: Any, tmp_path: Path, no_network: list[Any]) -> None:
    """In a program of a user's own: `import llmsqueeze` is enough, and the other models stay."""
    import lm_eval
    from lm_eval.api.registry import get_model

    assert get_model("hf").__name__ == "HFLM"
    rows = [{"text": str(item["query"]), **item} for item in ITEMS]
    body = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    task = yaml_task(tmp_path / "named.yaml", rows, body)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    from llmsqueeze.tasks import offline_mode

    with offline_mode():
        found = lm_eval.simple_evaluate(
            model="llmsqueeze",
            model_args={"pretrained": str(tiny()), "device": "cpu"},
            batch_size="auto",
            tasks=[str(task)],
            task_manager=manager,
            bootstrap_iters=0,
        )
    assert found is not None
    assert found["results"]["named"]["acc,none"] == pytest.approx(oracle(tiny())["acc"])
    assert not no_network


def test_a_damaged_model_is_no_accuracy(tiny: Any, tmp_path: Path, run: Any, items: Path) -> None:
    mine = llmsqueeze.lm_eval_model(tiny(), device="cpu")
    mine.model.get_output_embeddings().weight.data[5, 5] = math.nan
    with pytest.raises(llmsqueeze.LlmsqueezeError, match="not a number"):
        mine.loglikelihood(requests([("ab", "cd")]))


# What is compared, and gates.


def report(run: Any, checkpoint: Path, path: Path, *options: Any) -> Path:
    result = run(checkpoint, *options)
    assert result.exit_code == 0, result.stderr
    path.write_text(result.stdout)
    return path


def test_gates_on_recovery(run: Any, tiny: Any, items: Path, tmp_path: Path, cli: Any) -> None:
    baseline = report(run, tiny(), tmp_path / "dense.json", "--tasks", items)
    dense = json.loads(baseline.read_text())["tasks"]["sums"]
    other = tiny("llama", dtype="float32")
    given = ("--tasks", items, "--baseline", baseline)
    entry = measured(
        run(other, *given, "--min-recovery", 0.01, "--min-recovery", "sums.acc_norm=0")
    )
    assert entry["dense"]["acc"] == dense["acc"] > 0
    assert entry["acc_recovery"] == pytest.approx(entry["acc"] / dense["acc"])
    assert entry["recovery"] == entry["acc_recovery"]
    for gate in ("99", "sums=99", "sums.acc=99"):
        result = run(other, *given, "--min-recovery", gate)
        assert result.exit_code == 1 and "failed: tasks.sums." in result.stderr
    # A task's own gate comes before that of all.
    passed = run(other, *given, "--min-recovery", 99, "--min-recovery", "sums=0.01")
    assert passed.exit_code == 0, passed.stderr
    assert run(other, *given, "--fail-if", "tasks.sums.acc < 0").exit_code == 0
    assert run(other, *given, "--fail-if", "tasks.sums.acc >= 0").exit_code == 1


def test_what_was_not_measured_fails(run: Any, tiny: Any, items: Path, tmp_path: Path) -> None:
    gate = ("--min-recovery", "0.01")
    without = report(run, tiny(), tmp_path / "without.json")
    result = run(tiny(), "--tasks", items, "--baseline", without, *gate)
    assert result.exit_code == 1 and "not in the report" in result.stderr
    broken = report(run, tiny(), tmp_path / "nan.json", "--tasks", items)
    document = json.loads(broken.read_text())
    # NaN is no JSON: whoever wrote that, it is none of our reports.
    for value, code in ((math.nan, 3), (None, 1)):
        document["tasks"]["sums"]["acc"] = value
        broken.write_text(json.dumps(document))
        assert run(tiny(), "--tasks", items, "--baseline", broken, *gate).exit_code == code
    # Other requests are no failed gate: nothing was compared.
    result = run(tiny(), "--tasks", items, "--baseline", broken, "--limit", 3, *gate)
    one_line(result, 3, "requests of task sums were others, of 24 items")


def test_the_dense_model_is_measured_once(
    run: Any, tiny: Any, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsqueeze import tasks

    ran: list[str] = []
    whole = tasks.run

    def count(suite: Any, model: Any) -> Any:
        ran.append(suite.spec)
        return whole(suite, model)

    monkeypatch.setattr(tasks, "run", count)
    dense = tmp_path / "dense"
    shutil.copytree(tiny(), dense)
    given = (tiny("llama", dtype="float32"), "--against", dense, "--tasks", items)
    first = measured(run(*given))
    assert len(ran) == 2
    assert measured(run(*given)) == first
    assert len(ran) == 3
    assert first["dense"]["acc"] == pytest.approx(oracle(dense)["acc"])
    # Every one of these is another measurement of both.
    measured(run(*given, "--bos"))
    assert len(ran) == 5
    items.write_text(items.read_text().replace("a lot", "a few"))
    measured(run(*given))
    assert len(ran) == 7
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    changed = measured(run(*given))
    assert len(ran) == 9 and changed["requests_sha256"] != first["requests_sha256"]


def test_a_damaged_file_of_the_cache_is_measured_again(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"t": {"acc": len(calls)}}

    said: list[str] = []
    cache = TaskCache(tmp_path, {"a": 1}, said.append)
    assert cache.get("t", {"t": "x"}, measure) == {"t": {"acc": 1}}
    assert not said
    assert cache.get("t", {"t": "x"}, measure) == {"t": {"acc": 1}}
    assert len(said) == 1
    assert cache.get("t", {"t": "y"}, measure) == {"t": {"acc": 2}}
    assert TaskCache(tmp_path, {"a": 2}).get("t", {"t": "x"}, measure) == {"t": {"acc": 3}}
    for content in ("{", "[]", "{}"):
        for file in tmp_path.glob("*.json"):
            file.write_text(content)
        before = len(calls)
        cache.get("t", {"t": "x"}, measure)
        assert len(calls) == before + 1
    assert not list(tmp_path.glob("partial-*"))


def test_every_file_of_a_checkpoint_counts(tiny: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny(), copy)
    before = checkpoint_sha256(copy)
    assert before == checkpoint_sha256(tiny())
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        kept_bytes = (copy / name).read_bytes()
        (copy / name).write_bytes(kept_bytes + b" ")
        assert checkpoint_sha256(copy) != before
        (copy / name).write_bytes(kept_bytes)
    (copy / "README.md").write_text("says nothing")
    assert checkpoint_sha256(copy) == before


def test_recovery_follows_what_is_better() -> None:
    assert recovery(0.6, 0.8, True) == pytest.approx(0.75)
    assert recovery(20.0, 16.0, False) == pytest.approx(0.8)
    for value, dense, better in (
        (None, 1.0, True), (1.0, None, True), (0.5, 0.0, True), (0.0, 1.0, False), (0.5, 0.5, None),
        (0.5, -1.0, True),
    ):  # fmt: skip
        assert recovery(value, dense, better) is None


def test_what_is_doubtful_is_told() -> None:
    plain = {"metric": "acc", "chance": 0.5, "truncated": 0, "max_length": 64}

    def entry(acc: float) -> dict[str, Any]:
        return {"t": {**plain, "dense": {"acc": acc, "acc_stderr": 0.02}}}

    assert "hardly above chance" in warnings(entry(0.53))[0]
    assert not warnings(entry(0.55))
    assert not warnings({"t": {**plain, "chance": None, "dense": {"acc": 0.5}}})
    assert not warnings({"t": plain})
    cut = {**plain, "truncated": 3}
    assert ["3 requests" in message for message in warnings({"t": cut, "u": cut})] == [True]


def test_gates_are_read_strictly() -> None:
    assert parse_gates(("0.95", "piqa=.97", "piqa.acc_norm=1")) == (
        0.95,
        {"piqa": 0.97, "piqa.acc_norm": 1.0},
    )
    for wrong in ("", "x", "a=b", "-1", "nan", "a=", "=1", "1e3", "a b=1"):
        with pytest.raises(llmsqueeze.LlmsqueezeError, match="TASK=SHARE"):
            parse_gates((wrong,))
    for twice in (("0.9", "0.8"), ("piqa=0.9", "piqa=0.8")):
        with pytest.raises(llmsqueeze.LlmsqueezeError, match="twice"):
            parse_gates(twice)
    with pytest.raises(llmsqueeze.LlmsqueezeError, match="no such task here"):
        gates(None, {"piqq": 0.9}, [], {"piqa"})
    found = gates(0.9, {"b": 0.5, "c.acc_norm": 0.7}, ["a", "b", "c"], {"a", "b", "c"})
    assert sorted(map(str, found)) == [
        "tasks.a.recovery < 0.9",
        "tasks.b.recovery < 0.5",
        "tasks.c.acc_norm_recovery < 0.7",
    ]
    for named in ({"c": 0.5, "c.acc_norm": 0.7}, {"c.acc_norm": 0.7, "c": 0.5}):
        assert sorted(map(str, gates(0.9, named, ["c"], {"c"}))) == [
            "tasks.c.acc_norm_recovery < 0.7",
            "tasks.c.recovery < 0.5",
        ]


def test_other_settings_are_not_compared() -> None:
    entry = {
        "requests_sha256": "x", "num_fewshot": 0, "items": 3, "bos": False, "max_length": 64, "metric": "acc",
        "higher_is_better": {"acc": True}, "acc": 0.5,
    }  # fmt: skip
    with pytest.raises(DataError, match="num_fewshot of the dense model was 5"):
        compare({"t": dict(entry)}, {"t": {**entry, "num_fewshot": 5}})
    mine = {"t": dict(entry), "u": dict(entry)}
    compare(mine, {"t": entry})
    assert mine["t"]["recovery"] == 1 and "recovery" not in mine["u"]


# What is refused.


def lines(result: Any) -> list[str]:
    """What stderr says; bars are off in a process that has not imported tqdm yet, as this one has."""
    return [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]


def one_line(result: Any, code: int, *words: str) -> None:
    assert result.exit_code == code, result.stderr
    assert len(lines(result)) == 1
    for word in words:
        assert word in result.stderr
    assert json.loads(result.stdout)["exit_code"] == code


def test_options_that_need_others(run: Any, tiny: Any, items: Path) -> None:
    one_line(run(tiny(), "--tasks", items, "--min-recovery", 0.9), 2, "--against or --baseline")
    one_line(run(tiny(), "--limit", 3), 2, "--tasks")
    one_line(run(tiny(), "--num-fewshot", 0), 2, "--tasks")
    one_line(run(tiny(), "--tasks", f"{items},{items}"), 2, "twice")
    one_line(run(tiny(), "--tasks", ","), 2, "empty")
    against = ("--against", tiny(), "--min-recovery", "piqa=0.9")
    one_line(run(tiny(), "--tasks", items, *against), 2, "no such task here", "sums")


def test_an_unknown_task_has_neighbours(
    run: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsqueeze import tasks

    folder = tmp_path / "known"
    folder.mkdir()
    yaml_task(folder / "boolq.yaml", ITEMS, GENERATE)
    small = functools.partial(tasks.TaskManager, include_path=folder)
    # lm-eval's own 14,000 take many seconds to look through.
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: small(include_defaults=False)
    )
    one_line(run(tiny(), "--tasks", "boolqq"), 2, "boolqq", "did you mean boolq?")
    one_line(run(tiny(), "--tasks", "zzz"), 2, "lm-eval ls tasks")


def test_offline_means_offline(
    run: Any, tiny: Any, tmp_path: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tmp_path / "far.yaml"
    task.write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n" + GENERATE)
    one_line(run(tiny(), "--tasks", task, "--offline"), 3, "not on this machine")
    assert not no_network
    import huggingface_hub

    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert "DISABLE_MULTIPROC" not in os.environ


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", "[]", "no list of items"),
        ("a.json", "{", "not JSON"), ("a.json", "[" * 100_000, "too deep"),
        ("a.jsonl", '{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "item 1"),
        ("a.jsonl", '{"query": "x", "choices": ["a"], "gold": 0}', "item 1"),
        ("a.jsonl", '{"query": "x", "choices": ["a", "b"], "gold": 2}', "item 1"),
        ("a.jsonl", '{"query": "x", "choices": ["a", "b"], "gold": true}', "item 1"),
        ("a.yaml", "{{{{", "a.yaml"), ("a.yaml", "[" * 5000, "too deep"), ("a.yaml", "a: &a [*a]", "aliases"),
        ("a.yaml", "this: nothing", "a.yaml"),
        ("a.yaml", f"task: a\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {__file__}}}}}\n"
         f"test_split: test\n{GENERATE}", "a.yaml"),
        ("a.yaml", "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: no.jsonl}}\n"
         f"test_split: test\n{GENERATE}", "no.jsonl"),
    ],
)  # fmt: skip
def test_files_that_are_no_task(
    run: Any, tiny: Any, tmp_path: Path, no_network: list[Any], name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    one_line(run(tiny(), "--tasks", tmp_path / name), 3, said)
    assert not no_network


def test_no_such_file(run: Any, tiny: Any, tmp_path: Path) -> None:
    one_line(run(tiny(), "--tasks", tmp_path / "none.yaml"), 3, "no such file")


def test_without_lm_eval(run: Any, tiny: Any, items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else there(name, *a)
    )
    one_line(run(tiny(), "--tasks", items), 4, "pip install 'llmsqueeze[eval]'")
    with pytest.raises(llmsqueeze.LlmsqueezeError, match="needs lm-eval"):
        llmsqueeze.lm_eval_model(tiny())


def test_a_folder_that_cannot_be_written_is_noticed_at_once(
    cli: Any,
    tiny: Any,
    items: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    measured: list[Any] = []
    monkeypatch.setattr("llmsqueeze.tasks.evaluate", lambda *args, **options: measured.append(args))
    result = cli("eval", tiny(), "--against", tiny(), "--tasks", items, "--text", text_file,
                 "--cache-dir", tmp_path / "file", *SHORT)  # fmt: skip
    assert result.exit_code == 4 and "--cache-dir" in result.stderr
    assert measured == []
