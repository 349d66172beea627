"""Apple's MPS has no float64. What runs on a device runs on one without it (`multicrafter_device`): drawing, page, stages, measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import gspo
import numpy as np
import pytest
import torch
from gspo.diagnostics import objective_batches, policy_batches
from gspo.signal_estimators import clip_activity
from moe_lora.export import approximate
from moe_lora.stats import collect
from multicrafter.demo.serve.drawing import DrawRequest, draw
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.binding import BindingConfig
from multicrafter.models.loaded import LoadedModel
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, evaluate
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.attention import watch_attention
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain import IDARConfig, Pretrain, PretrainConfig, SeparationConfig
from multicrafter.training.trainee import global_aux_loss
from multicrafter_device import NAME, NoFloat64, There, without_float64
from PIL import Image
from torch import Tensor

EXPERTS = AdapterConfig(rank=2, alpha=2.0, num_experts=2)


@pytest.fixture
def device(pipe: Any, scenes: Any) -> Iterator[torch.device]:
    """With the pipeline on it."""
    with without_float64():
        pipe.to(NAME)
        yield NAME


def generate(pipe: Any, scenes: Any, mode: str) -> None:
    adapters = Adapters(pipe.transformer, EXPERTS)
    pipeline = MultiCrafterPipeline(pipe, adapters, separation=BindingConfig(mode=mode, draft_steps=1))
    pipeline(
        "two people", [Image.new("RGB", (32, 32), c) for c in ("red", "blue")], num_steps=2, size=64, reference_size=32
    )


def page(pipe: Any, scenes: Any, mode: str) -> None:
    """What `multicrafter serve` does for a visitor: both pictures, the maps, and who was found where."""
    request = DrawRequest(
        references=tuple(Image.new("RGB", (32, 32), c) for c in ("red", "blue")), prompt="two people", seed=0, num_steps=2,
        guidance=3.5, size=64, separation=mode,
    )  # fmt: skip
    drawing = draw(MultiCrafterPipeline(pipe, Adapters(pipe.transformer, EXPERTS)), request)
    assert (
        drawing.plain is not None and drawing.plain.maps is not None and drawing.plain.maps.values.device.type == "cpu"
    )


def stage1(pipe: Any, scenes: Any, kind: str) -> None:
    config = PretrainConfig(num_steps=2, batch=4, num_scenes=12, adapters=EXPERTS)
    if kind == "separated":
        config = replace(config, separation=SeparationConfig())
    else:
        config = replace(config, idar=IDARConfig())
    assert math.isfinite(Pretrain(pipe, config, scenes).step(0)["loss"])


def brightness(images: Any, prompts: Any, references: Any) -> Any:
    values = np.array([float(i.mean()) for i in images])
    return type("Score", (), {"totals": values, "parts": {"brightness": values}})()


def stage2(pipe: Any, scenes: Any, ratio: str) -> None:
    policy = gspo.PolicyConfig(ratio=ratio, num_inner_epochs=2, kl_coef=0.1)
    online = gspo.OnlineConfig(window=gspo.SlidingWindow(4), group_size=2, policy=policy, tail_steps=1)
    config = AlignConfig(
        prompts=1,
        num_steps=1,
        online=online,
        routing_replay=True,
        routing_jitter=True,
        execution=ExecutionConfig(micro_batch=1),
    )
    stage = Align(pipe, Adapters(pipe.transformer, EXPERTS), config, scenes, brightness)
    found = stage.step(0)
    assert found["skipped"] == 0 and found["initial_log_ratio"] < 1e-6 and found["ratio_spread"] > 0


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (generate, "none"),
        (generate, "draft"),
        (generate, "in-flight"),
        (page, "draft"),
        (stage1, "supervised"),
        (stage1, "separated"),
        (stage2, "sequence"),
        (stage2, "guarded"),
    ],
)
def test_the_device_needs_no_float64(pipe, scenes, device, run: Callable[..., None], kind: str):
    run(pipe, scenes, kind)


@pytest.fixture
def judges() -> WorldJudges:
    return WorldJudges.load()  # before the device is there: transformers builds models on "meta", which stands for it


def test_evaluating_needs_none(pipe, scenes, judges, device):
    known = {f.name: getattr(scenes, f.name) for f in fields(scenes)}
    rows = {name: value for name, value in known.items() if isinstance(value, (list, torch.Tensor))}
    two = replace(scenes, **{name: value[:2] for name, value in rows.items() if value is not None})
    config = EvaluateConfig(num_sampling_steps=2, separation=BindingConfig(mode="draft", draft_steps=1))
    metrics, _ = evaluate(LoadedModel.of(pipe), two, judges, config)
    assert np.isfinite(metrics["identity"]).all()


class Line(torch.nn.Module):
    """A policy of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        return self.slope * x + sigma[:, None]


def darkness(x: Tensor, index: Tensor) -> dict[str, Any]:
    return {"dark": -x.square().mean(1), "dim": (-x.abs().mean(1)).tolist()}


SIGMAS = torch.linspace(1, 0, 5)


@pytest.fixture
def line() -> Iterator[tuple[Line, torch.optim.Optimizer]]:
    with without_float64():
        policy = Line().to(NAME)
        yield policy, torch.optim.SGD(policy.parameters(), lr=0.1)


def noise(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).to(NAME)


@pytest.mark.parametrize("ratio", ["sequence", "step", "guarded"])
def test_a_ratio_method_needs_none(line, ratio):
    policy, optimizer = line
    settings = gspo.PolicyConfig(ratio=ratio, num_inner_epochs=3, micro_batch_size=2)
    config = gspo.OnlineConfig(window=gspo.SlidingWindow(4), group_size=4, policy=settings, kernel=gspo.FlowCPS())
    trainer = gspo.OnlineTrainer(list(policy.parameters()), optimizer, config)
    before = float(policy.slope.detach())
    report = trainer.step(policy, noise(), SIGMAS, darkness)
    assert (
        not report.update.skipped and report.update.surrogate.ratio_std > 0 and float(policy.slope.detach()) != before
    )
    assert isinstance(report.rollout.latents, There), "it ran on the device"
    trainer.load_state_dict(trainer.state_dict())


def objectives() -> list[Any]:
    return [
        gspo.DiffusionNFT(schedule=gspo.DecaySchedule(rate=0.5)), gspo.AdvantageWeightedMatching(old_coef=0.1, clip_range=0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("objective", objectives(), ids=lambda o: type(o).__name__)
def test_an_objective_needs_none(line, objective):
    policy, optimizer = line
    config = gspo.ObjectiveConfig(num_inner_epochs=2, walk_window=2)
    trainer = gspo.ObjectiveTrainer(list(policy.parameters()), optimizer, objective, config)
    for _ in range(2):
        report = gspo.objective_step(trainer, policy, noise(8), SIGMAS, darkness, group_size=4, whiten_batch=True)
    assert not report.update.skipped and isinstance(report.rollout.latents, There)


def test_a_divergence_mask_needs_none(line):
    policy, optimizer = line
    drawn = gspo.rollout(policy, noise(), SIGMAS, kernel=gspo.FlowSDE(), window=(0, 1), group_size=2)
    trainer = gspo.ObjectiveTrainer(list(policy.parameters()), optimizer, gspo.FlowDPPO(threshold=1e-3))
    gains = gspo.group_advantages(-drawn.latents.square().mean(1), drawn.index)
    assert not trainer.update(policy, drawn, gains).skipped


def test_a_reward_gradient_needs_none(line):
    policy, optimizer = line
    trainer = gspo.RewardGradientTrainer(list(policy.parameters()), optimizer)
    assert not trainer.step(policy, noise(), SIGMAS, lambda x, index: -x.square().mean(1)).skipped


@pytest.mark.parametrize("kind", ["ratio", "objective"])
def test_diagnosing_needs_none(line, kind):
    policy, _ = line
    own = list(policy.parameters())
    if kind == "ratio":
        config = gspo.OnlineConfig(window=gspo.SlidingWindow(4), group_size=4)
        batch = policy_batches(policy, own, lambda i: noise(), SIGMAS, darkness, config)
    else:
        batch = objective_batches(policy, own, lambda i: noise(8), SIGMAS, darkness, objectives()[0], group_size=4)
    assert math.isfinite(gspo.diagnose(batch, own, num_batches=3).gradient.cosine)


def test_estimators_take_what_lies_on_the_device(device):
    gradients = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.5]], device=device)
    assert gspo.gradient_signal(gradients, 4).cosine > 0.5
    assert gspo.walk_ratio(gradients) > 1
    assert clip_activity(gradients[:, 0], 1.5).fraction == pytest.approx(1 / 3)
    assert gspo.auto_clip_range(gradients[:, :1] / 2, 0.5, torch.tensor([1, -1, 1], device=device)) > 0
    step = gspo.FlowSDE().step(gradients, gradients, gradients[:, 0] * 0 + 0.5, torch.full((3,), 0.4, device=device))
    assert isinstance(step.mean, There)


@pytest.mark.parametrize("direction", ["image_to_reference", "reference_to_image"])
def test_watching_attention_and_experts_needs_none(pipe, scenes, device, direction):
    adapters = Adapters(pipe.transformer, EXPERTS)
    model = LoadedModel.of(pipe)
    text = scenes.encode_text(model, slice(0, 2)).to(device)
    generator = torch.Generator().manual_seed(0)

    def look() -> Any:
        return watch_attention(pipe.transformer, model.backbone, scenes, slice(0, 2), text, sigma=0.5,
                               generator=generator, direction=direction)  # fmt: skip

    assert adapters.experts is not None
    with collect(adapters.experts) as log:
        captured = look()
    assert isinstance(captured.maps, There) and captured.maps.dtype == torch.float32
    assert all(0 <= nats <= math.log(2) + 1e-6 for nats in log.entropy().values())
    lost = approximate(adapters.experts, 2, look, report=lambda text: None)
    assert all(isinstance(found.lora.lora_a, There) for found in lost.values())


def test_loads_of_experts_over_ranks_need_none(pipe, scenes, device):
    stage = Pretrain(pipe, PretrainConfig(num_steps=1, batch=2, num_scenes=12, adapters=EXPERTS), scenes)
    experts = stage.adapters.experts
    assert experts is not None
    watch_attention(pipe.transformer, stage.model.backbone, scenes, slice(0, 2), scenes.encode_text(stage.model, slice(0, 2)),
                    sigma=0.5, generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert float(global_aux_loss(experts)) > 0


class TestTheDevice:
    """It refuses what MPS refuses."""

    def test_double_precision(self):
        with without_float64():
            x = torch.tensor([1.0, 2.0], device="mps")
            for wide in (
                lambda: x.double(),
                lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
                lambda: torch.tensor(np.ones(2), device=x.device),
                lambda: torch.linspace(0, 1, 3, dtype=torch.float64).to(x.device),
                lambda: x.to("cpu", torch.float64),
                lambda: x.to(torch.complex128),
            ):
                with pytest.raises(NoFloat64):
                    wide()
            assert x.cpu().double().sum() == 3.0 and torch.ones(2).double().to(x).device == NAME

    def test_two_devices_in_one_operation_and_numpy(self):
        with without_float64():
            x = torch.ones(3, device="mps", requires_grad=True)
            with pytest.raises(RuntimeError, match="same device"):
                x + torch.ones(3)
            with pytest.raises(RuntimeError):
                x.detach().numpy()
            with pytest.raises(RuntimeError, match="generator"):
                torch.randn(2, generator=torch.Generator(), device="mps")
            (x[[0, 2]] * 2.0).sum().backward()
            assert x.grad.tolist() == [2.0, 0.0, 2.0] and x.device == NAME and x.grad.device == NAME
