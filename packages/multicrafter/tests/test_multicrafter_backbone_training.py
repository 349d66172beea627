"""Both stages train, and evaluation runs, on every backbone, with and without recomputed blocks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from gspo import OnlineConfig, SlidingWindow
from id_reward import CompositeReward
from multicrafter.demo.figures import subject_maps
from multicrafter.models import export
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.binding import BindingConfig
from multicrafter.models.placing import transformer_blocks
from multicrafter.scoring.evaluate import METRICS, EvaluateConfig, WorldJudges, cases, evaluate, generate_cases
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain import IDARConfig, Pretrain, PretrainConfig
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import WorldConfig
from multicrafter.world.tiny_backbones import (
    tiny_flux1,
    tiny_flux2_dev,
    tiny_klein,
    tiny_kontext,
)
from multicrafter.world.tiny_flux import TinyFluxConfig
from multicrafter_tiny import MAKERS, filled

CONFIG = TinyFluxConfig(num_heads=2, head_dim=16, num_double=2, num_single=1, vae_channels=(8, 8, 8), text_width=16)
WORLD = WorldConfig(numbers=(2,), shared_attributes=4)
SMALL = AdapterConfig(rank=2, alpha=2.0, num_experts=2)
TWO_BLOCKS = {
    "flux1_dev": lambda: tiny_flux1(CONFIG, guidance_embeds=True),
    "flux1_kontext": lambda: tiny_kontext(CONFIG),
    "flux2_klein": lambda: tiny_klein(num_double=2),
    "flux2_dev": lambda: tiny_flux2_dev(num_double=2),
}
MADE = {name: TWO_BLOCKS.get(name, make) for name, make in MAKERS.items() if name != "qwen_image_edit_2509"}


def make(name):
    return filled(MADE[name]())


def first_step(name, **execution):
    """Metrics and gradients of one step of stage 1."""
    pipe = make(name)
    config = PretrainConfig(
        batch=3,
        num_steps=10,
        adapters=SMALL,
        idar=IDARConfig(coef=0.5),
        world=WORLD,
        execution=ExecutionConfig(**execution),
    )
    stage = Pretrain(pipe, config, encode_scenes(pipe, WORLD, 4, seed=3))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stage.adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    stage.optimizer.step = lambda *a, **k: None
    metrics = stage.step(5)
    return metrics, {n: p.grad.clone() for n, p in stage.adapters.named_parameters()}


@pytest.mark.parametrize("name", MADE)
def test_stage_1_reaches_every_adapter_and_recomputing_changes_nothing(name):
    """Also with micro-batches; the attention loss (both passes of a block!) counts once."""
    metrics, gradients = first_step(name)
    assert metrics["attention_loss"] > 0
    assert not [n for n, g in gradients.items() if not g.abs().max() > 0]
    transformer = MADE[name]().transformer
    blocks = [block for block, _ in transformer_blocks(transformer)]
    assert len(blocks) > 1 and all(any(n.startswith(f"{block}.") for n in gradients) for block in blocks)
    if idle := backbone_of(transformer).without_effect(transformer):
        assert any(re.match(idle, n) for n, _ in transformer.named_modules())
        assert not [n for n in gradients if re.match(idle, n)], "what nothing reads has no adapter"
    again, recomputed = first_step(name, gradient_checkpointing=True)
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for key, gradient in gradients.items():
        assert torch.allclose(recomputed[key], gradient, rtol=1e-4, atol=1e-6), key


def test_qwen_21_has_no_map_of_references_on_the_picture():
    pipe = make("qwen_image_21")
    config = PretrainConfig(batch=2, adapters=SMALL, idar=IDARConfig.paper(), world=WORLD)
    with pytest.raises(ValueError, match="whose references attend to no image"):
        Pretrain(pipe, config, encode_scenes(pipe, WORLD, 2, seed=3)).step(0)


def test_what_klein_kv_cannot_do_is_refused():
    """Its references look at themselves only, so nobody can say where in the picture they look; foreign processors look at everything."""
    pipe = make("flux2_klein_kv")
    config, scenes = (
        PretrainConfig(batch=2, adapters=SMALL, idar=IDARConfig.paper(), world=WORLD),
        encode_scenes(pipe, WORLD, 2, seed=3),
    )
    with pytest.raises(ValueError, match="only 'image_to_reference' exists"):
        Pretrain(pipe, config, scenes).step(0)
    pipe.transformer.transformer_blocks[0].attn.processor = object()
    with pytest.raises(ValueError, match="own attention processors"):
        backbone_of(pipe).velocity(
            pipe.transformer, torch.ones(1, 4, 16), torch.ones(1), backbone_of(pipe).encode_prompts(pipe, ["x"]), image_grid=(2, 2),
            references=[torch.ones(1, 4, 16)], reference_grids=[(2, 2)],
        )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["flux1_kontext", "flux2_klein", "flux2_klein_kv", "flux2_dev", "qwen_image_edit", "qwen_image_21"]
)
def test_stage_2_moves_the_adapters(name):
    pipe = make(name)
    adapters = Adapters(pipe.transformer, SMALL)
    before = adapters.state_dict()
    reward = CompositeReward(
        {"bright": (lambda images, prompts, references: torch.stack([i.mean() for i in images]).double().numpy(), 1.0)}
    )
    config = AlignConfig(num_steps=1, prompts=1, online=OnlineConfig(window=SlidingWindow(4), group_size=3))
    stage = Align(pipe, adapters, config, replace_scenes(pipe), reward)
    metrics = stage.step(0)
    assert metrics["reward_spread"] > 0
    assert any(not torch.equal(v, before[k]) for k, v in adapters.state_dict().items())


def replace_scenes(pipe):
    return encode_scenes(pipe, replace(WORLD, numbers=(2,)), 2, seed=4)


@pytest.mark.parametrize("name", MADE)
def test_every_backbone_can_be_evaluated_and_looked_at(name):
    """Cases are drawn through the backbone: its references reach the pictures, and its attention is read."""
    pipe = make(name)
    config = EvaluateConfig(num_cases=2, num_sampling_steps=2)
    scenes = cases(pipe, config)
    metrics, pictures = evaluate(pipe, scenes, WorldJudges.load(), config)
    assert pictures.shape == scenes.images.shape
    assert metrics.keys() == METRICS.keys() - {"found"}
    bound = replace(config, separation=BindingConfig(mode="draft", draft_steps=1))
    kept_apart, other_pictures = evaluate(pipe, scenes, WorldJudges.load(), bound)
    assert kept_apart.keys() == METRICS.keys()
    given = generate_cases(pipe, scenes, replace(config, separation=BindingConfig(mode="masks")))
    assert not torch.equal(given, pictures) and other_pictures.shape == pictures.shape
    assert ((metrics["leakage"] > 0) & (metrics["leakage"] < 1)).all()
    exchanged = generate_cases(pipe, replace(scenes, references=scenes.references.flip(1)), config)
    assert not torch.equal(exchanged, pictures)
    # which products a batch of another size takes differs: rounding, two steps deep
    torch.testing.assert_close(generate_cases(pipe, scenes, config, batch=1), pictures, atol=1e-5, rtol=0)
    if not hasattr(pipe.transformer, "single_transformer_blocks"):
        maps = subject_maps(pipe, scenes, [1])
        assert torch.allclose(maps.sum(1), torch.ones(1, *scenes.grid))
        return
    double, single, every = (
        subject_maps(pipe, scenes, [1], blocks=blocks)
        for blocks in (None, lambda name: name.startswith("single"), lambda _: True)
    )
    for maps in (double, single, every):
        assert torch.allclose(maps.sum(1), torch.ones(1, *scenes.grid))
    assert not torch.allclose(double, single) and not torch.allclose(every, double)


@pytest.mark.parametrize("name", ["flux2_dev", "qwen_image_edit", "qwen_image_21"])
def test_an_exported_adapter_draws_the_same_in_diffusers_own_pipeline(name, tmp_path):
    """Written for diffusers, read by ``load_lora_weights`` of a fresh pipeline: every key finds its layer, the velocity is the same."""
    pipe, fresh = make(name), make(name)
    adapters = Adapters(pipe.transformer, replace(SMALL, num_experts=0))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapters.save(tmp_path / "adapter", stage=1)
    backbone, channels = backbone_of(pipe), pipe.transformer.config.in_channels
    text = backbone.encode_prompts(pipe, ["one person"])
    given = {"image_grid": (4, 4), "references": [torch.ones(1, 4, channels)] * 2, "reference_grids": [(2, 2)] * 2}

    def velocity(transformer):
        with torch.no_grad():
            return backbone.velocity(transformer, torch.ones(1, 16, channels), torch.full((1,), 0.5), text, **given)

    base = velocity(fresh.transformer)
    file = export.write(export.read_plain(tmp_path / "adapter"), "diffusers", tmp_path / "lora.safetensors")
    fresh.load_lora_weights(str(file))
    assert torch.allclose(velocity(fresh.transformer), velocity(pipe.transformer), atol=1e-5)
    assert not torch.allclose(velocity(fresh.transformer), base, atol=1e-3)
