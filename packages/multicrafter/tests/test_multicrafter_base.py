"""The recipe of the tiny base: weights of tokens, guidance inside the model, a short run."""

import pytest
import torch
from multicrafter.models.flux.model import Text, predict_velocity
from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline
from multicrafter.world.train_base import BaseConfig, guided_target, train, upper_half, with_guidance

SMALL = TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, latent_channels=4, vae_channels=(8, 8, 8))


def test_upper_half_cuts_each_mask_in_the_middle_of_its_own_extent():
    masks = torch.zeros(1, 2, 8, 2)
    masks[0, 0, 2:6] = 1
    masks[0, 1, 4:8] = 1
    upper = upper_half(masks)
    assert upper[0, 0, :, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    assert upper[0, 1, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert not upper_half(torch.zeros(1, 1, 4, 4)).any()


def test_guided_target_pushes_away_from_the_caption_alone():
    def teacher(references, reference_grids):
        return torch.full((2, 3, 1), 5.0 if references else 2.0)

    velocity = torch.ones(2, 3, 1)
    target = guided_target(
        teacher, velocity, torch.tensor([1.0, 3.0]), {"references": (0,), "reference_grids": ((4, 4),)}
    )
    assert target[0].flatten().tolist() == [1.0] * 3  # guidance 1 is plain flow matching
    assert target[1].flatten().tolist() == [1.0 + 2 * 3.0] * 3


def test_a_new_guidance_embedding_changes_nothing_until_it_is_trained():
    pipe = build_pipeline(SMALL, seed=0)
    for p in pipe.transformer.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    tokens, sigma = torch.randn(2, 64, 16), torch.tensor([0.3, 0.8])
    text = Text(torch.randn(2, 16, 64), torch.randn(2, 64))
    before = predict_velocity(pipe.transformer, tokens, sigma, text, image_grid=(8, 8))
    pipe = with_guidance(pipe, BaseConfig(guidance_max=4.0))
    assert pipe.transformer.config.guidance_embeds
    for guidance in (1.0, torch.tensor([1.0, 3.5])):
        after = predict_velocity(pipe.transformer, tokens, sigma, text, image_grid=(8, 8), guidance=guidance)
        assert torch.equal(before, after)


def test_a_short_run_writes_a_base_that_takes_guidance(tmp_path, tiny_vae):
    report = train(tiny_vae, tmp_path / "base", BaseConfig(minutes=0.02, batch=4, pool=16, lr_matrix=0.0))
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    assert pipe.transformer.config.guidance_embeds
    assert report["config"]["guidance_max"] == 4.0
    assert all(torch.isfinite(p).all() for p in pipe.transformer.parameters())


@pytest.fixture
def tiny_vae(tmp_path):
    pipe = build_pipeline(TinyFluxConfig(), seed=0)
    pipe.vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("wrong", [{"top_weight": -1.0}, {"guidance_max": 0.5}, {"minutes": 0.0}])
def test_a_wrong_recipe_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BaseConfig(**wrong)
