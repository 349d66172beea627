"""Adapters, both stages, the loop: they start at the base, learn, resume exactly, and feel every switch."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import fields, replace

import gspo
import numpy as np
import pytest
import torch
from idar import leakage, owner_masks
from idar.integrations.diffusers import capture_subject_attention, separate_subjects
from multicrafter import UserError
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.flux.model import Text, add_noise, encode_prompts, predict_velocity
from multicrafter.training import loop
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.attention import layout_of
from multicrafter.training.distillation import DistillationConfig, PassOutputs, distillation_loss, watch_outputs
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain import (
    IDARConfig,
    Noised,
    Objective,
    Pretrain,
    PretrainConfig,
    SamplingConfig,
    SeparationConfig,
    measure_leakage,
    measure_leakages,
)
from multicrafter.training.runs import run_pretrain

SMALL = AdapterConfig(rank=4, alpha=4.0, num_experts=2)
STAGE1 = PretrainConfig(num_steps=6, batch=4, num_scenes=12, adapters=SMALL)
ONLINE = gspo.OnlineConfig(window=gspo.SlidingWindow(5, interval=4), group_size=3)
STAGE2 = AlignConfig(num_steps=3, prompts=2, lr=1e-3, online=ONLINE)


class Brightness:
    """A reward that needs no judge."""

    def __call__(self, images, prompts, references):
        values = np.array([float(i.mean()) for i in images])
        return type("Score", (), {"totals": values, "parts": {"brightness": values}})()


def velocity(pipe, scenes, rows=slice(0, 3)):
    x = torch.randn(scenes.tokens[rows].shape, generator=torch.Generator().manual_seed(0))
    text = encode_prompts(pipe, scenes.captions[rows])
    with torch.no_grad():
        return predict_velocity(
            pipe.transformer, x, torch.full((len(x),), 0.5), text, image_grid=scenes.grid,
            references=list(scenes.references[rows].unbind(1)), reference_grids=[scenes.reference_grid] * 2,
        )  # fmt: skip


def shake(adapters, scale=0.1):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("experts", [0, 2])
def test_adapters_start_at_the_base_and_switch_off_exactly(pipe, scenes, experts):
    base = velocity(pipe, scenes)
    adapters = Adapters(pipe.transformer, replace(SMALL, num_experts=experts))
    assert torch.allclose(velocity(pipe, scenes), base, atol=1e-6)
    shake(adapters)
    assert not torch.allclose(velocity(pipe, scenes), base, atol=1e-3)
    with adapters.disable():
        assert torch.equal(velocity(pipe, scenes), base)
    assert not torch.allclose(velocity(pipe, scenes), base, atol=1e-3)


@pytest.mark.parametrize("experts", [0, 2])
def test_only_adapters_train_and_all_of_them_do(pipe, scenes, experts):
    frozen = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    stage = Pretrain(pipe, replace(STAGE1, adapters=replace(SMALL, num_experts=experts)), scenes)
    names = {n for n, _ in stage.adapters.named_parameters()}
    assert names
    assert all("lora" in n or "expert" in n or "router" in n for n in names)
    assert any(".attn." in n for n in names)
    assert any(".ff" in n for n in names)
    assert any("proj_mlp" in n for n in names)
    before = stage.adapters.state_dict()
    for index in range(4):
        stage.step(index)
    after = stage.adapters.state_dict()
    still = [n for n in before if torch.equal(before[n], after[n])]
    assert not still
    for name, parameter in pipe.transformer.named_parameters():
        base = name.replace(".base_layer", "").replace(".base", "")
        if base in frozen:
            assert torch.equal(parameter, frozen[base]), name


def test_attention_loss_reaches_the_adapters_and_leakage_falls(pipe, scenes):
    """Two scenes, learned by heart with hardly anything but supervision: attention must come to tell their subjects apart."""
    of_scenes = [f.name for f in fields(scenes) if isinstance(getattr(scenes, f.name), (list, torch.Tensor))]
    two = replace(scenes, **{name: getattr(scenes, name)[:2] for name in of_scenes})
    before = measure_leakage(pipe, two, direction="image_to_reference").nanmean()
    config = replace(
        STAGE1,
        num_steps=150,
        batch=8,
        lr=1e-2,
        adapters=replace(SMALL, rank=8, num_experts=0),
        idar=IDARConfig(coef=20.0, all_blocks=True),
    )
    stage = Pretrain(pipe, config, two)
    losses = [stage.step(i)["attention_loss"] for i in range(150)]
    after = measure_leakage(pipe, two, direction="image_to_reference").nanmean()
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert after < before - 0.02


def test_leakage_of_groups_in_the_same_passes_is_that_of_each_alone(pipe, scenes):
    """By hand: a pass for each group, with the mean map that idar keeps."""
    groups = {"double": None, "single": lambda n: n.startswith("single_"), "all": lambda n: True}
    passes = []
    hook = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    got = measure_leakages(pipe, scenes, groups, direction="image_to_reference", sigmas=(0.4,), seed=3)
    hook.remove()
    assert len(passes) == 1
    noise = torch.randn(scenes.tokens.shape, generator=torch.Generator().manual_seed(3))
    level, backbone = torch.full((len(scenes),), 0.4), backbone_of(pipe)
    text, noisy = backbone.encode_prompts(pipe, scenes.captions), add_noise(scenes.tokens, noise, level)
    layout = layout_of(backbone, scenes, text)
    for name, blocks in groups.items():
        with torch.no_grad(), capture_subject_attention(
            pipe.transformer, layout, direction="image_to_reference", blocks=blocks
        ) as captured:  # fmt: skip
            backbone.velocity(pipe.transformer, noisy, level, text, **scenes.context(slice(None)))
        torch.testing.assert_close(got[name], leakage(captured.maps, scenes.masks).nanmean(1), equal_nan=True)
    assert not torch.allclose(got["double"], got["single"], equal_nan=True)


def test_without_the_coefficient_nothing_is_captured(pipe, scenes):
    stage = Pretrain(pipe, replace(STAGE1, idar=IDARConfig(coef=0.0)), scenes)
    assert "attention_loss" not in stage.step(0)


def test_supervision_may_end_early(pipe, scenes):
    stage = Pretrain(pipe, replace(STAGE1, num_steps=4, idar=IDARConfig(until=0.5)), scenes)
    assert ["attention_loss" in stage.step(i) for i in range(4)] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"until must be in \(0, 1\], got 0"):
        IDARConfig(until=0)


@pytest.mark.parametrize("idar", [IDARConfig.paper(), IDARConfig(sigma_max=0.5), IDARConfig(all_blocks=True)])
def test_forms_of_the_attention_loss_run(pipe, scenes, idar):
    metrics = Pretrain(pipe, replace(STAGE1, idar=idar), scenes).step(0)
    assert np.isfinite(metrics["attention_loss"])


def test_adapters_survive_the_disk(pipe, scenes, tmp_path):
    adapters = Adapters(pipe.transformer, SMALL)
    shake(adapters)
    want = velocity(pipe, scenes)
    adapters.save(tmp_path / "a", num_references=2)
    shake(adapters)
    fresh_pipe = _same(pipe)
    _, notes = Adapters.load(fresh_pipe.transformer, tmp_path / "a")
    assert notes["num_references"] == 2
    assert torch.allclose(velocity(fresh_pipe, scenes), want, atol=1e-6)


def _same(pipe):
    """The same base without adapters."""
    from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline

    made = build_pipeline(
        TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, vae_channels=(8, 8, 8), text_width=16)
    )
    generator = torch.Generator().manual_seed(1)
    made.transformer.requires_grad_(False).eval()
    for parameter in made.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("damage", ["missing", "json", "tensor", "shape", "base"])
def test_broken_adapters_are_named(pipe, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = Adapters(pipe.transformer, SMALL).save(tmp_path / "a")
    meta = json.loads((folder / "adapter.json").read_text())
    if damage == "missing":
        (folder / "adapter.safetensors").unlink()
    elif damage == "json":
        (folder / "adapter.json").write_text("{")
    elif damage == "tensor":
        (folder / "adapter.safetensors").write_bytes(b"no tensors")
    elif damage == "shape":
        tensors = load_file(folder / "adapter.safetensors")
        first = sorted(tensors)[0]
        save_file({**tensors, first: torch.zeros(1)}, folder / "adapter.safetensors")
    else:
        meta["base"]["num_layers"] = 19
        (folder / "adapter.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="adapter"):
        Adapters.load(_same(pipe).transformer, folder)


def test_stage1_resumes_exactly(pipe, scenes, tmp_path):
    straight = Pretrain(pipe, STAGE1, scenes)
    loop.run(straight, num_steps=6, out=tmp_path / "straight")
    other = _same(pipe)
    other.register_modules(text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2)
    half = Pretrain(other, STAGE1, scenes)
    loop.run(half, num_steps=3, out=tmp_path / "half")
    third = _same(pipe)
    third.register_modules(text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2)
    resumed = Pretrain(third, STAGE1, scenes)
    history = loop.run(resumed, num_steps=6, out=tmp_path / "half", resume=True)
    want, got = straight.adapters.state_dict(), resumed.adapters.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert [h["step"] for h in history] == [1, 2, 3, 4, 5, 6]


class TestGoingOnFromAnAdapter:
    def test_it_starts_where_the_other_run_ended(self, pipe, scenes, tmp_path):
        first = run_pretrain(pipe, STAGE1, tmp_path / "one", scenes=scenes)
        ended = first.state_dict()
        first.detach()
        config = replace(STAGE1, start=str(tmp_path / "one" / "adapter"), execution=ExecutionConfig(ema_decay=0.9))
        stage = Pretrain(pipe, config, scenes)
        assert all(torch.equal(ended[name], tensor) for name, tensor in stage.adapters.state_dict().items())
        assert all(torch.equal(ended[name], tensor) for name, tensor in stage.trainee.ema.items())
        stage.adapters.detach()
        run_pretrain(pipe, config, tmp_path / "two", scenes=scenes)
        assert json.loads((tmp_path / "two/adapter/adapter.json").read_text())["steps"] == 2 * STAGE1.num_steps
        assert (tmp_path / "one/adapter/adapter.safetensors").is_file()

    @pytest.mark.parametrize(("changes", "word"), [({"rank": 8}, "rank=8"), ({"num_experts": 0}, "num_experts=0")])
    def test_adapters_of_another_kind_are_refused_and_taken_off(self, pipe, scenes, tmp_path, changes, word):
        base = velocity(pipe, scenes)
        adapters = Adapters(pipe.transformer, SMALL)
        shake(adapters)
        adapters.save(tmp_path / "adapter", stage=1)
        adapters.detach()
        config = replace(STAGE1, start=str(tmp_path / "adapter"), adapters=replace(SMALL, **changes))
        with pytest.raises(UserError, match=word):
            Pretrain(pipe, config, scenes)
        assert torch.equal(velocity(pipe, scenes), base)

    def test_an_adapter_of_stage_2_is_refused(self, pipe, scenes, tmp_path):
        adapters = Adapters(pipe.transformer, SMALL)
        adapters.save(tmp_path / "adapter", stage=2)
        adapters.detach()
        with pytest.raises(UserError, match="stage 1, got one of stage 2"):
            Pretrain(pipe, replace(STAGE1, start=str(tmp_path / "adapter")), scenes)


def test_stage2_resumes_exactly(pipe, scenes, tmp_path):
    def make(base):
        base.register_modules(text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2, vae=pipe.vae)
        adapters = Adapters(base.transformer, SMALL)
        shake(adapters, 0.02)
        return Align(base, adapters, STAGE2, scenes, Brightness())

    straight, half, resumed = (make(_same(pipe)) for _ in range(3))
    loop.run(straight, num_steps=3, out=tmp_path / "straight")
    loop.run(half, num_steps=1, out=tmp_path / "half")
    loop.run(resumed, num_steps=3, out=tmp_path / "half", resume=True)
    want, got = straight.adapters.state_dict(), resumed.adapters.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_a_corrupt_checkpoint_is_skipped_and_said(tmp_path, caplog):
    for step in (1, 2):
        loop.save_checkpoint(tmp_path, step, {"x": torch.full((1,), float(step))})
    (tmp_path / "step_000002" / "state.safetensors").write_bytes(b"half a file")
    step, tensors = loop.load_checkpoint(tmp_path)
    assert (step, tensors["x"].item()) == (1, 1.0)
    assert "step_000002" in caplog.text


def test_a_signal_saves_and_says_how_to_go_on(tmp_path):
    class Counter:
        def __init__(self):
            self.count = torch.zeros(1)

        def step(self, index):
            self.count += 1
            if index == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return {"loss": 0.0}

        def tensors(self):
            return {"count": self.count}

        def restore(self, tensors):
            self.count = tensors["count"]

    with pytest.raises(loop.Interrupted, match="--resume"):
        loop.run(Counter(), num_steps=10, out=tmp_path)
    again = Counter()
    loop.run(again, num_steps=3, out=tmp_path, resume=True)
    assert again.count.item() == 3


def test_ratio_is_exactly_one_before_the_first_update(pipe, scenes):
    adapters = Adapters(pipe.transformer, SMALL)
    shake(adapters, 0.02)
    assert Align(pipe, adapters, STAGE2, scenes, Brightness()).step(0)["initial_log_ratio"] == 0.0

    def meddle(*columns):
        shake(adapters, 0.02)
        return Brightness()(*columns)

    with pytest.warns(gspo.OffPolicy):
        assert Align(pipe, adapters, STAGE2, scenes, meddle).step(0)["initial_log_ratio"] > 0


def test_stage2_raises_a_reward_it_can_reach(pipe, scenes, monkeypatch):
    """Brightness, with the first three latent channels as the picture: an untrained decoder hides what the latents say."""
    monkeypatch.setattr("multicrafter.models.backbones.base.decode_latents", lambda vae, latents: latents[:, :3])
    adapters = Adapters(pipe.transformer, SMALL)
    online = replace(
        ONLINE,
        window=gspo.SlidingWindow(5, interval=100),
        kernel=gspo.FlowSDE(noise_level=1.0),
        group_size=8,
        policy=gspo.PolicyConfig(num_inner_epochs=2),
    )
    config = replace(STAGE2, num_steps=9, prompts=3, lr=2e-2, online=online)
    stage = Align(pipe, adapters, config, scenes, Brightness())
    steps = [stage.step(i) for i in range(9)]
    gain = np.mean([s["reward"] for s in steps[-3:]]) - np.mean([s["reward"] for s in steps[:3]])
    assert gain > 2 * np.mean([s["reward_spread"] for s in steps[:3]])


def test_kl_needs_the_base_and_uses_it(pipe, scenes):
    adapters = Adapters(pipe.transformer, SMALL)
    shake(adapters, 0.05)
    stage = Align(
        pipe,
        adapters,
        replace(STAGE2, online=replace(ONLINE, policy=gspo.PolicyConfig(kl_coef=0.1))),
        scenes,
        Brightness(),
    )
    assert stage.step(0)["kl"] > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: IDARConfig(coef=-1.0),
        lambda: IDARConfig(sigma_max=0.0),
        lambda: PretrainConfig(lr=0.0),
        lambda: AlignConfig(guidance=0.5),
    ],
)
def test_wrong_configurations_are_refused(make):
    with pytest.raises(ValueError, match=r"must"):
        make()


def test_text_rows(pipe):
    text = encode_prompts(pipe, ["one person", "two people"])
    part = text[torch.tensor([1])]
    assert isinstance(part, Text)
    assert torch.equal(part.embeds[0], text.embeds[1])


def test_the_diffusion_loss_is_that_of_the_straight_path(pipe, scenes):
    """``||v - (noise - x_0)||^2`` at ``x = (1 - sigma) x_0 + sigma noise`` (rectified flow), written out with the path by hand."""
    stage = Pretrain(pipe, replace(STAGE1, idar=IDARConfig(coef=0.0)), scenes)
    shake(stage.adapters)
    rows, sigma = torch.arange(3), torch.tensor([0.2, 0.5, 0.9])
    noise = torch.randn(scenes.tokens[rows].shape, generator=torch.Generator().manual_seed(1))
    text = stage.text([scenes.captions[r] for r in range(3)])
    level = sigma[:, None, None]
    with torch.no_grad():
        x = (1 - level) * scenes.tokens[rows] + level * noise
        velocity = stage.trainee.predict(x, sigma, text, **scenes.context(rows))
    expected = (velocity + scenes.tokens[rows] - noise).pow(2).mean()
    losses = stage.objective.backward(scenes, rows, noise, sigma, text)
    assert float(losses["diffusion_loss"]) == pytest.approx(float(expected), rel=1e-5)
    stage.adapters.detach()


class TestSeparation:
    """Mask dropout: chosen samples are trained with attention between subjects forbidden."""

    @pytest.mark.parametrize(("share", "crossing"), [(1.0, False), (0.0, True)])
    def test_chosen_samples_do_not_look_at_the_other(self, pipe, scenes, share, crossing, monkeypatch):
        config = replace(STAGE1, separation=SeparationConfig(share=share), idar=replace(STAGE1.idar, coef=0.1))
        stage, seen = Pretrain(pipe, config, scenes), []
        rows = torch.arange(4)
        separated = torch.full((4,), share)
        noise, text = torch.randn_like(scenes.tokens[rows]), stage.text([scenes.captions[r] for r in range(4)])
        monkeypatch.setattr(Objective, "_attention_loss", lambda _, maps, *__: seen.append(maps.detach()) or maps.sum())
        stage.objective.backward(scenes, rows, noise, torch.full((4,), 0.5), text, separated=separated)
        (seen,) = seen
        wrong = seen * (1 - owner_masks(scenes.masks[rows]))
        assert bool((wrong > 0).any()) == crossing
        stage.adapters.detach()

    def test_the_share_is_of_samples_and_low_noise_may_be_left_out(self, pipe, scenes):
        stage = Pretrain(pipe, replace(STAGE1, separation=SeparationConfig(share=0.3, sigma_min=0.5)), scenes)
        sigma = torch.linspace(0, 1, 4001)
        chosen = stage._draw_separated(sigma)
        assert chosen[sigma < 0.5].sum() == 0
        assert float(chosen[sigma >= 0.5].mean()) == pytest.approx(0.3, abs=0.04)
        stage.adapters.detach()

    def test_without_it_nothing_is_drawn_and_share_0_trains_the_same(self, pipe, scenes):
        losses = []
        for separation in (None, SeparationConfig(share=0.0), SeparationConfig(share=1.0)):
            stage = Pretrain(pipe, replace(STAGE1, separation=separation), scenes)
            losses.append(stage.step(0)["loss"])
            stage.adapters.detach()
        assert losses[0] == losses[1] != losses[2]

    def test_routing_by_attention_is_another_training(self, pipe, scenes):
        losses = []
        for routing in (False, True):
            separation = SeparationConfig(share=1.0, routing=routing)
            stage = Pretrain(pipe, replace(STAGE1, separation=separation), scenes)
            losses.append(stage.step(0)["loss"])
            stage.adapters.detach()
        assert losses[0] != losses[1]

    def test_micro_batches_and_checkpointing_train_the_same(self, pipe, scenes):
        norms = []
        for changes in ({}, {"micro_batch": 2, "gradient_checkpointing": True}):
            config = replace(STAGE1, separation=SeparationConfig(), adapters=AdapterConfig(rank=4, num_experts=0))
            config = replace(config, execution=replace(config.execution, **changes))
            stage = Pretrain(pipe, config, scenes)
            norms.append(stage.step(0)["grad_norm"])
            stage.adapters.detach()
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"share": 1.5}, "share"),
            ({"share": float("nan")}, "share"),
            ({"strength": -1.0}, "strength"),
            ({"background": "x"}, "background"),
            ({"threshold": 0.0}, "threshold"),
            ({"sigma_min": 1.0}, "sigma_min"),
        ],
    )
    def test_refusals(self, changes, word):
        with pytest.raises(ValueError, match=word):
            SeparationConfig(**changes)

    def test_adapters_say_how_they_are_drawn(self):
        from multicrafter.training.pretrain import sampling_notes

        config = replace(
            STAGE1, separation=SeparationConfig(), sampling=SamplingConfig(num_sampling_steps=7, guidance=3.0)
        )
        assert sampling_notes(config) == {"separation": "draft", "num_steps": 7, "guidance": 3.0}
        assert sampling_notes(STAGE1) == {"separation": "none"}
        with pytest.raises(ValueError, match="guidance"):
            SamplingConfig(guidance=float("nan"))


class TestDistillation:
    """The model with separated attention teaches the same model without."""

    CONFIG = replace(
        STAGE1,
        separation=SeparationConfig(),
        distillation=DistillationConfig(velocity=1.0, attention=0.1),
        idar=replace(STAGE1.idar, coef=0.0),
    )

    def step(self, pipe, scenes, config, separated, rows=4):
        stage = Pretrain(pipe, config, scenes)
        shake(stage.adapters)
        rows = torch.arange(rows)
        noise = torch.randn(scenes.tokens[rows].shape, generator=torch.Generator().manual_seed(3))
        text = stage.text([scenes.captions[r] for r in rows.tolist()])
        losses = stage.objective.backward(scenes, rows, noise, torch.full((len(rows),), 0.7), text, separated=separated)
        gradient = torch.cat([p.grad.flatten() for p in stage.adapters.parameters() if p.grad is not None])
        stage.adapters.detach()
        return losses, gradient

    def test_the_loss_is_the_formula(self):
        g = torch.Generator().manual_seed(0)
        student, teacher = (
            PassOutputs(torch.randn(3, 5, 2, generator=g), [torch.randn(3, n, 4, generator=g) for n in (5, 7)])
            for _ in range(2)
        )
        weight = torch.tensor([1.0, 0.0, 0.5])
        expected = 0.0
        for row, share in ((0, 1 / 3), (2, 0.5 / 3)):
            v = ((student.velocity[row] - teacher.velocity[row]) ** 2).mean()
            pairs = list(zip(student.attention, teacher.attention, strict=True))
            o = sum(((a[row] - b[row]) ** 2).sum() / (b[row] ** 2).sum() for a, b in pairs) / 2
            expected += share * float(2.0 * v + 0.5 * o)
        config = DistillationConfig(velocity=2.0, attention=0.5)
        assert distillation_loss(student, teacher, config, weight) == pytest.approx(expected, rel=1e-5)
        assert distillation_loss(student, teacher, config, torch.zeros(3)) == 0

    def test_the_target_is_the_separated_velocity_and_has_no_gradient(self, pipe, scenes):
        stage = Pretrain(pipe, self.CONFIG, scenes)
        shake(stage.adapters)
        rows, sigma = torch.arange(3), torch.full((3,), 0.7)
        noise = torch.randn(scenes.tokens[rows].shape, generator=torch.Generator().manual_seed(3))
        text = stage.text([scenes.captions[r] for r in range(3)])
        teacher = stage.objective._teach(Noised(scenes, rows, noise, sigma, text), torch.zeros(3))
        x = add_noise(scenes.tokens[rows], noise, sigma)
        masks = owner_masks(scenes.masks[rows], threshold=0.15)
        with (
            torch.no_grad(),
            watch_outputs(pipe.transformer) as outputs,
            separate_subjects(pipe.transformer, layout_of(stage.model.backbone, scenes, text), masks),
        ):
            expected = stage.trainee.predict(x, sigma, text, **scenes.context(rows))
        assert torch.equal(teacher.velocity, expected) and not teacher.velocity.requires_grad
        streams = 2 * len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
        assert len(outputs) == len(teacher.attention) == streams
        assert all(torch.equal(a, b) for a, b in zip(outputs, teacher.attention, strict=True))
        assert stage.objective._teach(Noised(scenes, rows, noise, sigma, text), torch.ones(3)) is None
        stage.adapters.detach()

    def test_only_samples_without_separation_learn_from_it(self, pipe, scenes):
        none, all_of_them = torch.zeros(4), torch.ones(4)
        plain = replace(self.CONFIG, distillation=None)
        assert "distillation_loss" not in self.step(pipe, scenes, self.CONFIG, all_of_them)[0]
        with_teacher, gradient = self.step(pipe, scenes, self.CONFIG, none)
        without, other = self.step(pipe, scenes, plain, none)
        assert with_teacher["distillation_loss"] > 0
        assert with_teacher["loss"] == pytest.approx(
            float(without["loss"] + with_teacher["distillation_loss"]), rel=1e-5
        )
        assert not torch.allclose(gradient, other)

    def test_a_teacher_that_separates_nothing_teaches_nothing(self, pipe, scenes):
        config = replace(self.CONFIG, separation=SeparationConfig(strength=0.0))
        losses, gradient = self.step(pipe, scenes, config, torch.zeros(4))
        assert losses["distillation_loss"] == 0
        _, other = self.step(pipe, scenes, replace(config, distillation=None), torch.zeros(4))
        assert torch.allclose(gradient, other, atol=1e-7)

    def test_micro_batches_train_the_same(self, pipe, scenes):
        config = replace(self.CONFIG, adapters=AdapterConfig(rank=4, num_experts=0))
        (whole, gradient), halves = self.step(pipe, scenes, config, torch.tensor([0.0, 1.0, 0.0, 0.0])), []
        stage = Pretrain(pipe, config, scenes)
        shake(stage.adapters)
        noise = torch.randn(scenes.tokens[:4].shape, generator=torch.Generator().manual_seed(3))
        for part in (slice(0, 2), slice(2, 4)):
            rows = torch.arange(4)[part]
            text = stage.text([scenes.captions[r] for r in rows.tolist()])
            sigma, separated = torch.full((2,), 0.7), torch.tensor([0.0, 1.0, 0.0, 0.0])[part]
            halves.append(
                stage.objective.backward(scenes, rows, noise[part], sigma, text, separated=separated, scale=0.5)["loss"]
            )
        together = torch.cat([p.grad.flatten() for p in stage.adapters.parameters() if p.grad is not None])
        stage.adapters.detach()
        assert float(sum(halves) / 2) == pytest.approx(float(whole["loss"]), rel=1e-5)
        assert torch.allclose(together, gradient, atol=1e-6)

    @pytest.mark.parametrize(
        ("make", "word"),
        [
            (lambda: DistillationConfig(velocity=-1.0, attention=0.1), "velocity"),
            (lambda: DistillationConfig(velocity=1.0, attention=float("nan")), "attention"),
            (lambda: DistillationConfig(velocity=0.0, attention=0.0), "positive"),
            (lambda: replace(STAGE1, distillation=DistillationConfig(velocity=1.0, attention=0.1)), "separation"),
            (lambda: replace(TestDistillation.CONFIG, separation=SeparationConfig(share=1.0)), "some of the samples"),
            (
                lambda: replace(
                    TestDistillation.CONFIG, execution=replace(STAGE1.execution, gradient_checkpointing=True)
                ),
                "gradient_checkpointing",
            ),
            (
                lambda: replace(TestDistillation.CONFIG, execution=replace(STAGE1.execution, compile_blocks=True)),
                "compile",
            ),
        ],
    )
    def test_refusals(self, make, word):
        with pytest.raises(ValueError, match=word):
            make()
