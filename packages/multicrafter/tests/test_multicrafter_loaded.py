"""A loaded model is one object: its backbone is found once, at the door, and a backbone of one's own reaches everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gspo import OnlineConfig, SlidingWindow
from multicrafter import UserError
from multicrafter.models import backbones, loaded, loading
from multicrafter.models.adapters import AdapterConfig
from multicrafter.models.backbones import Flux1, backbone_of
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.loading import load_flux, load_model
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, cases, evaluate
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.pretrain import PretrainConfig
from multicrafter.training.runs import run_align, run_pretrain


class Mine(Flux1):
    """A backbone of one's own; pictures of its VAE are upside down."""

    name = "mine"

    def matches(self, pipe_or_transformer):
        raise AssertionError("nobody asks which it is")

    def decode_pictures(self, pipe, tokens, grid):
        return super().decode_pictures(pipe, tokens, grid).flip(2)


@pytest.fixture
def unknown(monkeypatch):
    """As if no backbone were known: whoever identifies a pipeline again is refused."""
    monkeypatch.setattr(backbones, "BACKBONES", ())


def test_a_model_is_made_once_and_passed_as_it_is(pipe):
    model = LoadedModel.of(pipe)
    assert model.backbone is backbone_of(pipe) and model.transformer is pipe.transformer
    assert LoadedModel.of(model) is model
    assert LoadedModel.of(model, Flux1()).pipe is pipe
    assert MultiCrafterPipeline(model).model is model
    tokens = model.encode_pictures(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    side = 64 // model.token_side
    upright = model.decode_pictures(tokens, (side, side))
    assert torch.equal(LoadedModel(pipe, Mine()).decode_pictures(tokens, (side, side)), upright.flip(2))


def test_loading_gives_the_model_and_the_pipeline_alone(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    assert isinstance(model, LoadedModel) and not any(p.requires_grad for p in model.transformer.parameters())
    assert type(load_flux(tmp_path / "base")) is type(model.pipe)
    mine = Mine()
    assert load_model(tmp_path / "base", backbone=mine).backbone is mine
    assert loading.load_model is load_model


def test_a_pipeline_that_nobody_knows_is_refused_in_one_sentence(pipe, unknown):
    with pytest.raises(UserError, match=r"pipeline must be one of .*, or come with a backbone, got FluxPipeline"):
        LoadedModel.of(pipe)
    assert LoadedModel.of(pipe, Flux1()).pipe is pipe


def test_a_backbone_of_ones_own_trains_both_stages_draws_and_is_scored(pipe, tmp_path, unknown, monkeypatch):
    """It used to be guessed anew from the pipeline at fifteen places, where one that is not built in is nobody's."""
    monkeypatch.setattr(loaded, "backbone_of", lambda _: pytest.fail("guessed again"))
    model = LoadedModel(pipe, Mine())
    stage1 = PretrainConfig(
        num_steps=1, batch=2, num_scenes=2, adapters=AdapterConfig(rank=2, alpha=2.0, num_experts=0)
    )
    adapters = run_pretrain(model, stage1, tmp_path / "one")
    assert adapters.backbone is model.backbone
    online = OnlineConfig(window=SlidingWindow(3, size=1), group_size=2)
    run_align(model, adapters, AlignConfig(num_steps=1, prompts=1, online=online), tmp_path / "two")
    config = EvaluateConfig(num_cases=2, num_sampling_steps=2)
    scenes = cases(model, config)
    metrics, pictures = evaluate(model, scenes, WorldJudges.load(), config)
    assert len(metrics["identity"]) == 2
    upright = evaluate(replace(model, backbone=Flux1()), scenes, WorldJudges.load(), config)[1]
    assert torch.equal(pictures, upright.flip(2)), "its own decoder drew them"
