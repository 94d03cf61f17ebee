"""Mask training on a tiny model: what it starts from, what it leaves alone, and what it reaches."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmsqueeze.errors import CalibrationError, CheckpointError, RecipeError, Stopped
from llmsqueeze.methods import patch
from llmsqueeze.methods.base import NM, Target, Tile
from llmsqueeze.train import StepDone, TrainedMasks, train_masks
from llmsqueeze.training_state import STATE_NAME
from tests.conftest import tiny_model

CPU = torch.device("cpu")
SIZE = 16  # divides neither 40 nor 72: ragged tiles everywhere
SEQLEN = 12
MIXED, HALF = Target(0.3, Tile(SIZE)), Target(0.5, Tile(SIZE))
MODES = [("tile", MIXED), ("joint", MIXED), ("joint", HALF)]
each_mode = pytest.mark.parametrize(("mode", "target"), MODES, ids=["tile", "joint", "maskllm"])


def config(**changes: Any) -> patch.Config:
    """Quick: six steps of two passes of two windows."""
    quick = {"steps": 6, "warmup": 2, "lr": 0.01, "batch_tokens": 4 * SEQLEN, "micro_batch": 2}
    return patch.Config(**{**quick, **changes})


def tokens_of(samples: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 160, (samples, SEQLEN), generator=generator)


@dataclasses.dataclass
class Setup:
    model: Any
    keep: dict[str, Tensor]
    benefits: dict[str, Tensor]

    def train(self, target: Target, config: patch.Config, **options: Any) -> TrainedMasks:
        options = {"benefits": self.benefits, **options}
        tokens = options.pop("tokens", tokens_of())
        return train_masks(self.model, self.keep, tokens, target, config, CPU, **options)

    def one_shot(self, target: Target) -> dict[str, Tensor]:
        """Magnitude 2:4, and the tiles of highest benefit dense: what training starts from."""
        tiles = []
        for name, weight in self.weights().items():
            for i, j in itertools.product(*(range(extent) for extent in self.benefits[name].shape)):
                rows = slice(i * SIZE, min((i + 1) * SIZE, weight.shape[0]))
                columns = slice(j * SIZE, min((j + 1) * SIZE, weight.shape[1]))
                area = (rows.stop - rows.start) * (columns.stop - columns.start)
                tiles.append((float(self.benefits[name][i, j]), name, rows, columns, area))
        tiles.sort(key=lambda tile: -tile[0])
        wanted = (1 - 2 * target.sparsity) * sum(tile[-1] for tile in tiles)
        keep = {name: mask.clone() for name, mask in self.keep.items()}
        covered = 0
        for _, name, rows, columns, area in tiles:
            if abs(covered + area - wanted) >= abs(covered - wanted):
                break
            keep[name][rows, columns] = True
            covered += area
        return keep

    def weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_submodule(name).weight.detach() for name in self.keep}

    def loss(self, keep: dict[str, Tensor], tokens: Tensor) -> float:
        """Cross-entropy of the model whose removed weights are zero, by transformers' own loss."""
        before = {name: weight.clone() for name, weight in self.weights().items()}
        for name, weight in self.weights().items():
            weight.mul_(keep[name])
        with torch.no_grad():
            loss = float(self.model(input_ids=tokens, labels=tokens).loss)
        for name, weight in self.weights().items():
            weight.copy_(before[name])
        return loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def setup() -> Setup:
    model = tiny_model(num_hidden_layers=2)
    keep, benefits = {}, {}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            size = module.weight.detach().abs()
            rank = size.unflatten(1, (-1, 4)).argsort(dim=-1).argsort(dim=-1).flatten(1)
            keep[name] = rank >= 2
            shape = [-(-extent // SIZE) for extent in size.shape]
            generator = torch.Generator().manual_seed(len(keep))
            benefits[name] = torch.rand(shape, generator=generator)
    assert len(keep) == 14
    return Setup(model, keep, benefits)


@each_mode
@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_hard_masks_before_training_are_the_prior(
    setup: Setup, mode: str, target: Target, strength: float
) -> None:
    still = config(mode=mode, steps=1, warmup=0, lr=1e-30, prior_strength=strength)
    expected = setup.one_shot(target)
    masks = setup.train(target, still)
    for name, keep in masks.keep.items():
        assert torch.equal(keep, expected[name]), name
        assert keep.dtype == torch.bool
    random = setup.train(target, dataclasses.replace(still, prior_strength=0.0)).keep
    assert any(not torch.equal(random[name], expected[name]) for name in expected)


@each_mode
def test_the_first_loss_under_a_firm_prior_is_the_one_shot_models(
    setup: Setup, mode: str, target: Target
) -> None:
    # So strong that no noise turns a choice: soft masks are hard ones.
    firm = config(mode=mode, steps=1, warmup=0, prior_strength=1e5, micro_batch=5,
                  batch_tokens=10 * SEQLEN)  # fmt: skip
    one_shot = setup.one_shot(target)
    masks = setup.train(target, firm)
    assert masks.losses == [pytest.approx(setup.loss(one_shot, tokens_of()), rel=1e-5)]
    kept = sum(int(keep.sum()) for keep in one_shot.values())
    total = sum(keep.numel() for keep in one_shot.values())
    assert masks.densities == [pytest.approx(kept / total, rel=1e-6)]


@each_mode
def test_masks_are_dense_tiles_and_two_of_four(setup: Setup, mode: str, target: Target) -> None:
    masks = setup.train(target, config(mode=mode))
    covered = total = 0
    for name, keep in masks.keep.items():
        dense = 0
        for i, j in itertools.product(*(range(0, extent, SIZE) for extent in keep.shape)):
            tile = keep[i : i + SIZE, j : j + SIZE]
            total += tile.numel()
            if tile.all():
                dense += 1
                covered += tile.numel()
                continue
            assert (tile.unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()
            if mode == "tile":
                assert torch.equal(tile, setup.keep[name][i : i + SIZE, j : j + SIZE])
        assert masks.dense_tiles[name] == dense
    # No further from the wanted area than half a tile.
    assert abs(covered - (1 - 2 * target.sparsity) * total) <= SIZE * SIZE / 2
    if target is HALF:
        assert covered == 0


@each_mode
def test_the_model_is_left_as_it_was(setup: Setup, mode: str, target: Target) -> None:
    model = setup.model.train()
    model.model.norm.eval()
    frozen = model.model.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[bool] = []

    def check(done: StepDone) -> None:
        seen.append(model.training)
        assert all(not parameter.requires_grad for parameter in model.parameters())
        if done.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.train(target, config(mode=mode), on_step=check)
    setup.train(target, config(mode=mode))
    assert seen == [False] * 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert parameter.requires_grad == (parameter is not frozen), name
    assert model.training
    assert not model.model.norm.training
    for module in model.modules():
        assert "forward" not in vars(module)
    # And no forward of ours is left: gradients reach the weights again.
    model(input_ids=tokens_of(), labels=tokens_of()).loss.backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in setup.keep)


def test_a_forward_that_was_replaced_before_is_put_back(setup: Setup) -> None:
    linear = setup.model.get_submodule(next(iter(setup.keep)))
    linear.forward = mine = lambda x: nn.functional.linear(x, linear.weight)
    setup.train(MIXED, config(steps=1, warmup=0))
    assert linear.forward is mine


def stop_at(index: int) -> Any:
    def stop(done: StepDone) -> None:
        if done.index == index:
            raise KeyboardInterrupt

    return stop


@each_mode
def test_a_resumed_run_gives_the_same_bits(
    setup: Setup, tmp_path: Path, mode: str, target: Target
) -> None:
    settings = config(mode=mode, steps=7, save_every=2)
    whole = setup.train(target, settings)
    with pytest.raises(KeyboardInterrupt):
        setup.train(target, settings, state=tmp_path / "state", on_step=stop_at(4))
    torch.manual_seed(99)  # another process would not have the same global generator
    steps: list[int] = []
    resumed = setup.train(
        target, settings, state=tmp_path / "state", on_step=lambda done: steps.append(done.index)
    )
    assert steps == [4, 5, 6]
    again = setup.train(target, settings, state=tmp_path / "state", on_step=stop_at(0))
    for masks in (resumed, again):
        assert masks.losses == whole.losses
        assert masks.densities == whole.densities
        assert masks.dense_tiles == whole.dense_tiles
        assert all(torch.equal(masks.keep[name], whole.keep[name]) for name in whole.keep)
    assert [file.name for file in (tmp_path / "state").iterdir()] == [STATE_NAME]


def test_a_run_that_is_asked_to_stop_goes_on(setup: Setup, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="after step 3 of 6"):
        setup.train(MIXED, config(), state=tmp_path, stop=lambda: next(asked))
    steps: list[int] = []
    resumed = setup.train(
        MIXED, config(), state=tmp_path, on_step=lambda done: steps.append(done.index)
    )
    assert steps == [3, 4, 5]
    assert resumed.losses == setup.train(MIXED, config()).losses


@each_mode
def test_the_saved_logits_are_those_of_an_unbroken_run(
    setup: Setup, tmp_path: Path, mode: str, target: Target
) -> None:
    settings = config(mode=mode, steps=5)
    states = []
    for name, breaks in (("whole", []), ("broken", [1, 3])):
        save_often = dataclasses.replace(settings, save_every=1)
        for index in breaks:
            with pytest.raises(KeyboardInterrupt):
                setup.train(target, save_often, state=tmp_path / name, on_step=stop_at(index))
        setup.train(target, save_often, state=tmp_path / name)
        states.append(torch.load(tmp_path / name / STATE_NAME, weights_only=True))
    assert len(states[0]["logits"]) == (mode == "joint") * 14 + (target is MIXED)
    for one, other in zip(states[0]["logits"], states[1]["logits"], strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, torch.zeros_like(one))


def test_saving_often_or_rarely_is_the_same_run(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        setup.train(MIXED, config(save_every=2), state=tmp_path, on_step=stop_at(3))
    resumed = setup.train(MIXED, config(save_every=50), state=tmp_path)
    assert resumed.losses == setup.train(MIXED, config()).losses


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("config", {"config": config(lr=0.02)}),
        ("config", {"target": Target(0.4, Tile(SIZE))}),
        ("set of tokens", {"tokens": tokens_of(seed=1)}),
        ("starting mask", {"keep": True}),
        ("starting mask", {"benefits": None}),
        ("model", {"weight": True}),
    ],
)
def test_a_state_of_another_run_is_refused(
    setup: Setup, tmp_path: Path, word: str, change: dict[str, Any]
) -> None:
    setup.train(MIXED, config(), state=tmp_path)
    name = next(iter(setup.keep))
    if change.pop("keep", False):
        setup.keep[name] = ~setup.keep[name]
    if change.pop("weight", False):
        setup.weights()[name][0, 0] += 1
    options = {"target": MIXED, "config": config(), **change}
    with pytest.raises(RecipeError, match=f"another {word}; .*delete"):
        setup.train(options.pop("target"), options.pop("config"), state=tmp_path, **options)


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04" + bytes(60)])
def test_a_damaged_state_is_an_error(setup: Setup, tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="delete it"):
        setup.train(MIXED, config(), state=tmp_path)


def test_a_state_that_could_run_code_is_not_loaded(setup: Setup, tmp_path: Path) -> None:
    torch.save({"version": 1, "identity": Path("x")}, tmp_path / STATE_NAME)
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        setup.train(MIXED, config(), state=tmp_path)


def test_a_save_that_fails_leaves_the_last_state(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        setup.train(MIXED, config(save_every=2), state=tmp_path, on_step=stop_at(2))
    before = (tmp_path / STATE_NAME).read_bytes()

    def fail(raw: object, stream: Any) -> None:
        stream.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(torch, "save", fail)
        setup.train(MIXED, config(save_every=2), state=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [STATE_NAME]
    assert (tmp_path / STATE_NAME).read_bytes() == before


def test_a_loss_that_is_not_finite_names_its_step(setup: Setup, tmp_path: Path) -> None:
    with torch.no_grad():
        setup.model.lm_head.weight[5] = float("nan")
    with pytest.raises(CalibrationError, match="loss of step 1 of 6 "):
        setup.train(MIXED, config(save_every=1), state=tmp_path)
    assert not (tmp_path / STATE_NAME).exists()


def test_a_gradient_that_is_not_finite_names_its_step(setup: Setup) -> None:
    linear = setup.model.get_submodule(next(iter(setup.keep)))
    calls = 0

    def spoil(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # two passes a step: in the third
            output.register_hook(lambda grad: grad * float("inf"))

    raises = pytest.raises(CalibrationError, match="gradient of step 3 of 6 ")
    with linear.register_forward_hook(spoil), raises:
        setup.train(MIXED, config())


def logits_after(setup: Setup, state: Path, **changes: Any) -> Tensor:
    """Tile logits after one step; they start at ±0.042."""
    setup.train(MIXED, config(**{"steps": 1, "warmup": 0, **changes}), state=state)
    (logits,) = torch.load(state / STATE_NAME, weights_only=True)["logits"]
    return logits


def test_an_update_is_adamws(setup: Setup, tmp_path: Path) -> None:
    start = logits_after(setup, tmp_path / "start", lr=1e-30)
    assert torch.allclose(start.abs(), torch.tensor(0.042))
    # The first step of Adam is the learning rate, times the sign of the gradient.
    moved = (logits_after(setup, tmp_path / "moved", lr=0.01) - start).abs()
    assert moved.max() == pytest.approx(0.01, rel=1e-3)
    assert moved.median() == pytest.approx(0.01, rel=1e-2)
    # A gradient cut down to below Adam's epsilon moves nothing.
    cut = logits_after(setup, tmp_path / "cut", lr=0.01, clip=1e-14)
    assert torch.allclose(cut, start, atol=1e-6)
    decayed = logits_after(setup, tmp_path / "decayed", lr=0.01, weight_decay=50.0, clip=1e-14)
    assert torch.allclose(decayed, start / 2, atol=1e-6)


def test_gradients_are_means_over_the_whole_batch(setup: Setup, tmp_path: Path) -> None:
    # So hot that gates are near 1/2 whatever the noise, so how a batch is divided must not show.
    hot = {"temperature_start": 1e6, "temperature_end": 1e6, "clip": 1e9, "density_weight": 0.0}
    gradients = []
    for micro_batch in (4, 1):
        state = tmp_path / str(micro_batch)
        logits_after(setup, state, micro_batch=micro_batch, **hot)
        saved = torch.load(state / STATE_NAME, weights_only=True)["optimizer"]
        gradients.append(saved["state"][0]["exp_avg"])
    assert gradients[0].abs().max() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("start", [0.1, 0.9])
def test_the_density_penalty_pushes_towards_the_target(start: float) -> None:
    target, settings = Target(0.3, Tile(SIZE)), config(magnitude_weight=0.0)
    gates = torch.full((6,), start, requires_grad=True)
    areas = torch.tensor([256, 256, 128, 256, 256, 128])
    density = patch.soft_density(gates, areas)
    wanted = 0.5 + 0.5 * start
    assert density.item() == pytest.approx(wanted)
    extra = patch.penalty(density, torch.tensor(1.0), settings, target, 0)
    assert extra.item() == pytest.approx(settings.density_weight * abs(wanted - 0.7), rel=1e-5)
    extra.backward()
    descent = -gates.grad
    assert (descent > 0).all() if start < 0.4 else (descent < 0).all()
    # By real area: half a tile counts half.
    assert torch.allclose(descent[2], descent[0] / 2)


def test_the_magnitude_term_rewards_norm_and_fades() -> None:
    norm = torch.tensor(0.8, requires_grad=True)
    density = torch.tensor(0.7)
    slopes = []
    for step in range(6):
        extra = patch.penalty(density, norm, config(magnitude_weight=3.0), MIXED, step)
        (slope,) = torch.autograd.grad(extra, norm)
        slopes.append(float(slope))
    assert slopes == pytest.approx([-3.0 * (1 - step / 6) for step in range(6)])


def test_the_magnitude_term_keeps_large_weights(setup: Setup) -> None:
    settings = config(mode="joint", steps=30, lr=0.02, prior_strength=0.0, init_std=0.003)
    kept = []
    for weight in (0.0, 3000.0):
        masks = setup.train(HALF, dataclasses.replace(settings, magnitude_weight=weight))
        kept.append(
            sum(float((w * masks.keep[name]).norm()) for name, w in setup.weights().items())
        )
    assert kept[1] > 1.05 * kept[0]


@pytest.mark.parametrize("sparsity", [0.15, 0.42])
def test_soft_density_approaches_the_target(setup: Setup, sparsity: float) -> None:
    settings = config(steps=60, lr=0.02, density_weight=50.0, magnitude_weight=0.0)
    masks = setup.train(Target(sparsity, Tile(SIZE)), settings)
    wanted = 1 - sparsity
    assert abs(masks.densities[0] - wanted) > 0.05
    late = sum(masks.densities[-10:]) / 10
    assert abs(late - wanted) < 0.03


def learnable(setup: Setup) -> Tensor:
    """Windows that the dense model itself finds likely, so that masks matter to the loss."""
    ids = torch.arange(3, 19).unsqueeze(1)
    with torch.no_grad():
        for _ in range(SEQLEN - 1):
            logits = setup.model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids


@each_mode
def test_training_lowers_the_hard_loss(setup: Setup, mode: str, target: Target) -> None:
    with torch.no_grad():
        setup.model.lm_head.weight.mul_(8)  # predictions far from uniform
    tokens = learnable(setup)
    settings = config(mode=mode, steps=60, lr=0.02, micro_batch=8, batch_tokens=16 * SEQLEN)
    masks = setup.train(target, settings, tokens=tokens)
    before = setup.loss(setup.one_shot(target), tokens)
    assert setup.loss(masks.keep, tokens) < 0.9 * before
    assert sum(masks.losses[-5:]) < 0.9 * sum(masks.losses[:5])


def test_windows_are_seen_once_an_epoch_in_a_seeded_order(setup: Setup) -> None:
    tokens = tokens_of(samples=8)
    rows = [tuple(row) for row in tokens.tolist()]

    def seen(settings: patch.Config) -> list[int]:
        order: list[int] = []

        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            assert kwargs["input_ids"].shape == (settings.micro_batch, SEQLEN)
            order.extend(rows.index(tuple(row)) for row in kwargs["input_ids"].tolist())

        with setup.model.register_forward_pre_hook(record, with_kwargs=True):
            setup.train(MIXED, settings, tokens=tokens)
        return order

    order = seen(config(steps=6))  # four windows a step: three epochs
    assert len(order) == 24
    for epoch in range(3):
        assert sorted(order[8 * epoch : 8 * epoch + 8]) == list(range(8))
    assert order[:8] != order[8:16]
    assert seen(config(steps=6)) == order
    assert seen(config(steps=6, seed=1)) != order
    # Three do not divide eight: passes reach across epochs.
    uneven = seen(config(steps=8, micro_batch=3, batch_tokens=3 * SEQLEN))
    assert Counter(uneven) == Counter(dict.fromkeys(range(8), 3))


@pytest.mark.parametrize(
    ("batch_tokens", "micro_batch", "wanted"),
    [(48, 1, 4), (48, 2, 2), (50, 2, 2), (70, 1, 6), (1, 1, 1), (48, 100, 1), (2**20, 1, 87381)],
)
def test_passes_bring_the_batch_nearest_to_its_tokens(
    batch_tokens: int, micro_batch: int, wanted: int
) -> None:
    settings = config(batch_tokens=batch_tokens, micro_batch=micro_batch)
    assert patch.passes(settings, SEQLEN) == wanted


def test_losses_are_means_over_the_whole_batch(setup: Setup) -> None:
    # Firm masks carry no noise, so how a batch is divided must not show.
    firm = config(steps=3, warmup=0, prior_strength=1e5, batch_tokens=4 * SEQLEN)
    once = setup.train(MIXED, dataclasses.replace(firm, micro_batch=4)).losses
    parts = setup.train(MIXED, dataclasses.replace(firm, micro_batch=1)).losses
    assert parts == pytest.approx(once, rel=1e-5)


def test_noise_differs_between_passes_steps_sites_and_seeds() -> None:
    found = {
        patch.noise_seed(config(seed=seed), step, index, number)
        for seed, step, index, number in itertools.product(range(2), range(4), range(4), range(4))
    }
    assert len(found) == 2 * 4 * 4 * 4


def test_schedules_run_from_start_to_end() -> None:
    settings = patch.Config(steps=5, warmup=1, temperature_end=2.0)
    draws = [patch.draw_of(settings, step, 0) for step in range(5)]
    assert [draw.temperature for draw in draws] == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0])
    assert [draw.scale for draw in draws] == pytest.approx([100, 200, 300, 400, 500])
    assert patch.learning_rate(settings, 0) == settings.lr
    assert patch.learning_rate(settings, 3) == pytest.approx(settings.lr / 2)
    logits = torch.tensor([0.0, 0.01], dtype=torch.float64)
    for step, wanted in ((0, 25 * 0.01 / 4), (2, 187.5 * 0.01 / 3), (4, 350 * 0.01 / 2)):
        # The same noise with and without a logit: what is left is the logit's own part.
        without, with_it = (
            patch.gates_of(factor * logits, settings, step, 3).logit()[1] for factor in (0, 1)
        )
        assert float(with_it - without) == pytest.approx(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_other_families_and_dtypes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, num_hidden_layers=2).to(dtype)
    keep = {
        name: torch.tensor([True, False, False, True]).repeat(m.out_features, m.in_features // 4)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    }
    for mode in patch.MODES:
        masks = train_masks(
            model, keep, tokens_of(), MIXED, config(mode=mode, steps=2), CPU, benefits=None
        )
        assert len(masks.losses) == 2
        assert set(masks.keep) == set(keep)
        assert sum(masks.dense_tiles.values()) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "both"},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 7},
        {"warmup": -1},
        {"batch_tokens": 0},
        {"micro_batch": 0},
        {"temperature_end": 0.0},
        {"clip": -1.0},
        {"density_weight": -1.0},
        {"magnitude_weight": float("inf")},
        {"save_every": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_config_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changes)).replace("_", " ").replace("mup", "")):
        config(**changes)


@pytest.mark.parametrize(
    ("mode", "target", "message"),
    [
        ("tile", HALF, "mode joint"),
        ("tile", Target(0.0, Tile(SIZE)), "every tile dense"),
        ("joint", Target(0.5, NM(2, 4)), "--pattern tile"),
        ("joint", Target(0.5), "--pattern tile"),
        ("tile", Target(0.3, Tile(SIZE), dense_tiles=3), "sparsity only"),
    ],
)
def test_targets_that_leave_nothing_to_learn(
    setup: Setup, mode: str, target: Target, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        setup.train(target, config(mode=mode))


def test_masks_that_do_not_fit_are_refused(setup: Setup) -> None:
    name = next(iter(setup.keep))
    good = setup.keep[name]
    for bad, message in ((good[:-1], "for 40×40"), (torch.ones_like(good), "not 2:4")):
        setup.keep[name] = bad
        with pytest.raises(ValueError, match=message):
            setup.train(MIXED, config())


def test_every_field_has_a_default_and_help() -> None:
    for field in dataclasses.fields(patch.Config):
        assert type(field.default) in (int, float, str)
        assert field.metadata["help"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_device(setup: Setup, mode: str, target: Target, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    # Firm masks: the devices draw different noise, which must not show.
    firm = config(mode=mode, steps=4, prior_strength=1e5)
    cpu = setup.train(target, firm)
    model = setup.model.to(device, dtype)
    masks = train_masks(
        model, setup.keep, tokens_of(), target, firm, device, benefits=setup.benefits
    )
    assert masks.losses == pytest.approx(cpu.losses, rel=1e-4 if dtype == torch.float32 else 2e-2)
    assert all(torch.equal(masks.keep[name], cpu.keep[name]) for name in cpu.keep)
