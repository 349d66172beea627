"""Layout, sampler, pipeline directory: what must agree with diffusers agrees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multicrafter.models.flux.model import Text, add_noise, encode_prompts, predict_velocity, sample, sigma_schedule
from multicrafter.models.flux.packing import diagonal_ids, grid_ids, pack_latents, reference_spans, unpack_latents
from multicrafter.pipeline import MultiCrafterPipeline, load_flux, to_image, to_tensor
from PIL import Image


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_packing_is_inverted(b, c, rows, columns):
    latents = torch.randn(b, c, 2 * rows, 2 * columns)
    assert torch.equal(unpack_latents(pack_latents(latents), (rows, columns)), latents)


def test_packing_equals_diffusers(pipe):
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(pack_latents(latents), pipe._pack_latents(latents, 2, 8, 16, 16))
    assert torch.equal(grid_ids((8, 8)), pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))


def test_references_never_share_a_position():
    ids = diagonal_ids((8, 8), [(4, 4), (3, 5), (4, 4)])
    assert len(ids) == 64 + 16 + 15 + 16
    assert len({tuple(r) for r in ids.tolist()}) == len(ids)


def test_spans_follow_the_sequence():
    assert reference_spans(16, (8, 8), [(4, 4), (2, 2)]) == [(80, 96), (96, 100)]


def test_prompts_encode_as_in_diffusers(pipe):
    prompts = ["two people in the park", "one person"]
    embeds, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=prompts, max_sequence_length=16)
    text = encode_prompts(pipe, prompts)
    assert torch.allclose(text.embeds, embeds, atol=1e-6)
    assert torch.allclose(text.pooled, pooled, atol=1e-6)


def test_sampler_equals_the_pipeline_of_diffusers(pipe):
    """Without references our Euler sampler and `FluxPipeline.__call__` must draw the same latents."""
    start = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    want = pipe(
        prompt="one person", height=64, width=64, num_inference_steps=4, sigmas=sigma_schedule(4)[:-1].tolist(), latents=start,
        output_type="latent", max_sequence_length=16,
    ).images  # fmt: skip
    text = encode_prompts(pipe, ["one person"])
    with torch.no_grad():
        got = sample(
            lambda x, s: predict_velocity(pipe.transformer, x, s, text, image_grid=(8, 8)), start, sigma_schedule(4)
        )
    assert torch.allclose(got, want, atol=1e-4)


def test_references_and_prompt_reach_the_picture(pipe, scenes):
    x, sigma = torch.randn(1, 64, 32), torch.tensor([0.5])

    def velocity(text, references):
        with torch.no_grad():
            return predict_velocity(
                pipe.transformer,
                x,
                sigma,
                text,
                image_grid=(8, 8),
                references=references,
                reference_grids=[(4, 4)] * len(references),
            )

    one, other = (
        encode_prompts(pipe, [p]) for p in ("one person in the park at night", "two people in the snow by day")
    )
    a, b = scenes.references[0, :1], scenes.references[1, :1]
    base = velocity(one, [a])
    assert not torch.allclose(base, velocity(other, [a]), atol=1e-5)
    assert not torch.allclose(base, velocity(one, [b]), atol=1e-5)
    assert not torch.allclose(velocity(one, [a, b]), velocity(one, [b, a]), atol=1e-6)
    assert velocity(one, [a, b]).shape == (1, 64, 32)


def test_velocity_checks_its_references(pipe):
    text = Text(torch.zeros(1, 16, 16), torch.zeros(1, 16))
    with pytest.raises(ValueError, match="reference_grids"):
        predict_velocity(
            pipe.transformer,
            torch.zeros(1, 64, 32),
            torch.ones(1),
            text,
            image_grid=(8, 8),
            references=[torch.zeros(1, 16, 32)],
        )


@given(st.integers(1, 30), st.floats(0.5, 6))
def test_schedule_falls_from_one_to_zero(steps, shift):
    sigmas = sigma_schedule(steps, shift=shift)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas[:-1] > sigmas[1:]).all()


def test_noise_is_a_straight_line():
    x, e = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    assert torch.equal(add_noise(x, e, torch.zeros(2)), x)
    assert torch.equal(add_noise(x, e, torch.ones(2)), e)
    exact = sample(lambda y, s: e - x, e, sigma_schedule(7))
    assert torch.allclose(exact, x, atol=1e-5)


def test_a_saved_pipeline_loads_and_draws(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    loaded = MultiCrafterPipeline.from_pretrained(tmp_path / "m")
    reference = Image.new("RGB", (50, 80), (200, 30, 30))
    first = loaded("two people", [reference, reference], num_steps=2, num_images=2, seed=4)
    again = loaded("two people", [reference, reference], num_steps=2, num_images=2, seed=4)
    other = loaded("two people", [reference, reference], num_steps=2, num_images=2, seed=5)
    assert [p.size for p in first] == [(64, 64)] * 2
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert first[0].tobytes() != other[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()


@pytest.mark.parametrize("part", ["model_index.json", "transformer", "vae", "tokenizer_2"])
def test_a_directory_that_lacks_a_part_is_named(pipe, tmp_path, part):
    import shutil

    pipe.save_pretrained(tmp_path / "m")
    target = tmp_path / "m" / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ValueError, match=part):
        load_flux(tmp_path / "m")


def test_pictures_survive_the_tensor():
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    assert to_image(to_tensor(picture, 32)).tobytes() == picture.tobytes()
    wide = to_tensor(Image.new("RGB", (64, 16), (255, 0, 0)), 32)
    assert torch.allclose(wide[:, 0, 0], torch.tensor(128 / 255), atol=0.01), "padded with grey, not stretched"
    assert torch.allclose(wide[:, 16, 16], torch.tensor([1.0, 0, 0]), atol=0.01)


def test_shipped_model_is_a_flux_pipeline():
    from multicrafter.models import flux

    loaded = load_flux()
    assert type(loaded).__name__ == "FluxPipeline"
    size = sum(f.stat().st_size for f in flux.shipped().parent.rglob("*") if f.is_file())
    assert size <= 20e6
    assert sum(p.numel() for p in loaded.transformer.parameters()) > 2.5e6
    assert loaded.transformer.config.num_attention_heads * loaded.transformer.config.attention_head_dim >= 128
