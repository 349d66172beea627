"""Each backbone does what its own pipeline in diffusers does."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as diffusers_qwen
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import BACKBONES, Flux1, Flux1Kontext, ReferenceCache, backbone_of, get_backbone
from multicrafter.models.backbones.drift import reference_drift
from multicrafter.models.flux.model import sample
from multicrafter.models.flux.packing import pack_latents, unpack_latents
from multicrafter.models.loading import load_flux
from multicrafter.pipeline import to_image
from multicrafter_tiny import smooth_pictures, tiny

NAMES = [b.name for b in BACKBONES]


@pytest.fixture(scope="module")
def pipes():
    """Read only."""
    return {name: tiny(name) for name in NAMES}


@pytest.fixture(scope="module")
def pictures():
    return smooth_pictures()


def draw(pipe, prompts, noise, references, num_steps, *, cache=None):
    """Our sampler over a backbone's velocity."""
    backbone = backbone_of(pipe)
    side = backbone.token_side(pipe)
    grid, small = (64 // side,) * 2, [(r.shape[-2] // side, r.shape[-1] // side) for r in references]
    tokens = [backbone.encode_pictures(pipe, r[None]) for r in references]
    text = backbone.encode_prompts_with(pipe, prompts, [references] * len(prompts))
    with torch.no_grad():
        return sample(
            lambda x, s: backbone.velocity(
                pipe.transformer,
                x,
                s,
                text,
                image_grid=grid,
                references=tokens,
                reference_grids=small,
                guidance=2.0,
                cache=cache,
            ),
            noise,
            backbone.sigmas(pipe, num_steps, grid[0] * grid[1]),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_directory_of_its_class_loads(name, pipes, tmp_path):
    backbone = get_backbone(name)
    pipes[name].save_pretrained(tmp_path / "m")
    loaded = load_flux(tmp_path / "m")
    assert type(loaded).__name__ == backbone.pipeline_class
    assert backbone_of(loaded) is backbone
    for part in backbone.parts[1:]:
        shutil.move(tmp_path / "m" / part, tmp_path / "away")
        with pytest.raises(ValueError, match=rf"lacks {part}$"):
            load_flux(tmp_path / "m")
        shutil.move(tmp_path / "away", tmp_path / "m" / part)


def test_kontext_equals_its_pipeline_of_diffusers(pipes, pictures):
    """One reference, embedded guidance: the same latents; the reference goes in as latents to spare its resizing."""
    pipe, noise = pipes["flux1_kontext"], torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    reference = pictures[0, :, :32, :32]
    latents = pipe.vae.encode(reference[None] * 2 - 1).latent_dist.mean
    want = pipe(
        image=latents, prompt="one person", height=64, width=64, num_inference_steps=3, sigmas=[1.0, 2 / 3, 1 / 3], latents=noise,
        guidance_scale=2.0, output_type="latent", max_sequence_length=16, max_area=64 * 64, _auto_resize=False,
    ).images  # fmt: skip
    assert torch.allclose(draw(pipe, ["one person"], noise, [reference], 3), want, atol=1e-4)
    flux = Flux1().velocity
    grids = {"image_grid": (8, 8), "reference_grids": [(4, 4)], "references": [pack_latents(latents)]}
    text = Flux1().encode_prompts(pipe, ["one person"])
    with torch.no_grad():
        other = flux(pipe.transformer, noise, torch.ones(1), text, **grids)
        own = Flux1Kontext().velocity(pipe.transformer, noise, torch.ones(1), text, **grids)
    assert not torch.allclose(own, other, atol=1e-4), "its reference ids are its own"


@pytest.mark.parametrize("name", ["flux2_klein", "flux2_klein_kv", "flux2_dev"])
def test_flux2_equals_its_pipeline_of_diffusers(name, pipes, pictures):
    """Two references, shifted schedule, normalised latents: the same decoded latents."""
    pipe, noise = pipes[name], torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    references = [pictures[0], torch.cat([pictures[1], pictures[2, :, :, :16]], dim=2)]
    options = {"flux2_klein_kv": {}, "flux2_klein": {"guidance_scale": 1.0}, "flux2_dev": {"guidance_scale": 2.0}}[name]
    want = pipe(
        image=[to_image(r) for r in references], prompt="one person", height=64, width=64, num_inference_steps=4, latents=noise,
        output_type="latent", max_sequence_length=64 if name == "flux2_dev" else 32, text_encoder_out_layers=(1, 2, 3), **options,
    ).images  # fmt: skip
    rounded = [torch.from_numpy(np.array(to_image(r))).permute(2, 0, 1) / 255 for r in references]
    got = draw(pipe, ["one person"], noise.flatten(2).transpose(1, 2), rounded, 4)
    if name == "flux2_dev":  # hands out its tokens as they are
        assert torch.allclose(got, want, atol=1e-4)
        return
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    assert torch.allclose(unpack_latents(got * std + pipe.vae.bn.running_mean, (8, 8)), want, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_2509"])
def test_qwen_equals_its_pipeline_of_diffusers(name, pictures, monkeypatch):
    """Two references that are not square, through the vision-language encoder and as latents, and both guided passes."""
    monkeypatch.setattr(diffusers_qwen, "VAE_IMAGE_SIZE", 32 * 64)
    pipe, noise = tiny(name), torch.randn(1, 48, 16, generator=torch.Generator().manual_seed(0))
    references = [to_image(pictures[0, :, :32, :32]), to_image(pictures[1, :, :32])]
    want = pipe(
        image=references, prompt="one person", negative_prompt="snow", true_cfg_scale=4.0, height=48, width=64, num_inference_steps=3,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    backbone, grids = backbone_of(pipe), [(4, 4), (4, 8)]
    seen = [torch.from_numpy(np.array(r)).permute(2, 0, 1) / 255 for r in references]
    given = {
        "image_grid": (6, 8),
        "references": [backbone.encode_pictures(pipe, r[None]) for r in seen],
        "reference_grids": grids,
    }
    positive, negative = (backbone.encode_prompts_with(pipe, [text], [seen]) for text in ("one person", "snow"))
    with torch.no_grad():
        got = sample(
            lambda x, s: backbone.guide(
                *(backbone.velocity(pipe.transformer, x, s, text, **given) for text in (positive, negative)), 4.0
            ),
            noise,
            backbone.sigmas(pipe, 3, 48),
        )
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_encode_and_decode_as_in_diffusers(name, pipes, pictures):
    pipe, backbone = pipes[name], get_backbone(name)
    tokens = backbone.encode_pictures(pipe, pictures)
    side = 64 // backbone.token_side(pipe)
    assert tokens.shape == (3, side * side, pipe.transformer.config.in_channels)
    if name == "qwen_image_21":  # a fourth channel says how opaque a picture is
        opaque = torch.cat([pictures, torch.ones(3, 1, 64, 64)], 1)
        latents = pipe.vae.encode(opaque[:, :, None] * 2 - 1).latent_dist.mode()
        mean, std = (torch.tensor(v) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
        assert torch.allclose(tokens * std + mean, latents[:, :, 0].flatten(2).transpose(1, 2), atol=1e-4)
        want = (pipe.vae.decode(latents).sample[:, :, 0] / 2 + 0.5).clamp(0, 1)
        white = want[:, :3] * want[:, 3:] + 1 - want[:, 3:]
        assert torch.allclose(backbone.decode_pictures(pipe, tokens, (side, side)), white, atol=1e-4)
        return
    if "qwen" in name:
        latents = pipe.vae.encode(pictures[:, :, None] * 2 - 1).latent_dist.mode()
        want = pipe.vae.decode(latents).sample[:, :, 0]
        mean, std = (
            torch.tensor(v).repeat_interleave(4) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        assert torch.allclose(tokens * std + mean, pack_latents(latents[:, :, 0]), atol=1e-4)
        assert torch.allclose(backbone.decode_pictures(pipe, tokens, (8, 8)), (want / 2 + 0.5).clamp(0, 1), atol=1e-4)
        return
    if "flux2" in name:
        mean = pack_latents(pipe.vae.encode(pictures * 2 - 1).latent_dist.mode())
        want = pipe.vae.decode(pipe.vae.encode(pictures * 2 - 1).latent_dist.mode()).sample
        spread = (
            tokens * (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt() + pipe.vae.bn.running_mean
        ) - mean
        assert spread.abs().max() < 1e-4
    else:
        want = pipe.vae.decode(pipe.vae.encode(pictures * 2 - 1).latent_dist.mean).sample
    assert torch.allclose(backbone.decode_pictures(pipe, tokens, (8, 8)), (want / 2 + 0.5).clamp(0, 1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_tokens_share_a_place(name):
    ids = get_backbone(name).position_ids((4, 4), [(2, 2), (2, 3), (4, 4)])
    assert len({tuple(r) for r in ids.tolist()}) == len(ids) == 16 + 4 + 6 + 16


def test_the_places_of_flux1_are_on_the_diagonal():
    """By hand: a picture of 2 rows and 3 columns, a wide reference, then a tall one that begins behind both."""
    ids = get_backbone("flux1_dev").position_ids((2, 3), [(1, 2), (2, 1)])
    picture = [(row, column) for row in (0, 1) for column in (0, 1, 2)]
    assert ids.tolist() == [[0, *place] for place in [*picture, (2, 3), (2, 4), (3, 5), (4, 5)]]


def test_settings_of_a_picture_where_nobody_names_any():
    """Embedded guidance, scale of the second pass (1: none), steps."""
    found = {b.name: (b.default_guidance, b.default_true_guidance, b.default_num_steps) for b in BACKBONES}
    assert found == {
        "flux1_dev": (3.5, 1.0, 20),
        "flux1_kontext": (2.5, 1.0, 20),
        "flux2_klein": (1.0, 4.0, 20),
        "flux2_klein_kv": (1.0, 4.0, 4),
        "flux2_dev": (4.0, 1.0, 28),
        "qwen_image_edit": (1.0, 4.0, 40),
        "qwen_image_21": (1.0, 1.0, 40),
    }
    assert not get_backbone("flux2_klein_kv").has_true_guidance(None)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_points_at_the_references(name, pipes):
    """A span's own tokens, and no others, change their keys when only that reference changes (first block)."""
    pipe, backbone = pipes[name], get_backbone(name)
    d, side = pipe.transformer.config.in_channels, backbone.token_side(pipe)
    seen = [torch.rand(3, rows * side, columns * side) for rows, columns in ((2, 2), (4, 2))]
    text = backbone.encode_prompts_with(pipe, ["one person"], [seen])
    layout = backbone.layout_of(text, (4, 4), [(2, 2), (4, 2)])
    generator = torch.Generator().manual_seed(0)
    image, one, two, other = (torch.randn(1, n, d, generator=generator) for n in (16, 4, 8, 8))
    attention = pipe.transformer.transformer_blocks[0].attn

    def keys(second):
        kept = []
        handle = attention.norm_k.register_forward_hook(lambda _m, _i, out: kept.append(out))
        with torch.no_grad():
            backbone.velocity(
                pipe.transformer, image, torch.tensor([0.5]), text, image_grid=(4, 4), references=[one, second],
                reference_grids=[(2, 2), (4, 2)],
            )  # fmt: skip
        handle.remove()
        return kept[0]

    changed = (keys(two) - keys(other)).abs().amax((0, 2, 3)) > 1e-6
    start, stop = layout.subject_spans[1]
    before = 0 if name == "qwen_image_21" else layout.num_text  # its one stream holds the words, too
    assert (start, stop) != (before, before + 8) and len(
        changed
    ) == layout.stop - layout.num_text + layout.num_text - before
    want = torch.zeros(len(changed), dtype=torch.bool)
    want[start - before : stop - before] = True
    assert torch.equal(changed, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_claimed_only_where_it_is_exact(name, pipes, pictures):
    pipe, backbone = pipes[name], get_backbone(name)
    tokens = backbone.encode_pictures(pipe, pictures)
    small = backbone.encode_pictures(pipe, pictures[:, :, :32, :32])
    side = backbone.token_side(pipe)
    drift = reference_drift(
        backbone, pipe.transformer, backbone.encode_prompts(pipe, ["one person"] * 3), tokens=tokens,
        references=[small, small.flip(0)], image_grid=(64 // side,) * 2, reference_grids=[(32 // side,) * 2] * 2,
    )  # fmt: skip
    config = pipe.transformer.config
    assert len(drift) == config.num_layers + getattr(config, "num_single_layers", 0)
    if backbone.caches_references:
        assert max(drift.values()) == 0
    else:
        assert max(drift.values()) > 1e-2
        with pytest.raises(ValueError, match="cache must be None"):
            draw(pipe, ["x"], torch.randn(1, 64, pipe.transformer.config.in_channels), [], 1, cache=ReferenceCache())


def test_cached_references_change_nothing(pipes, pictures):
    """All steps with references in the sequence, and all but the first with their kept keys: the same latents, fewer tokens."""
    pipe, noise = pipes["flux2_klein_kv"], torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(5))
    references = [pictures[0, :, :32, :32], pictures[1, :, :32, :48]]
    lengths = []
    handle = pipe.transformer.x_embedder.register_forward_hook(lambda _m, i, _o: lengths.append(i[0].shape[1]))
    plain, cached = (draw(pipe, ["one person"], noise, references, 4, cache=c) for c in (None, ReferenceCache()))
    handle.remove()
    assert lengths == [64 + 16 + 24] * 4 + [64 + 16 + 24] + [64] * 3
    assert torch.allclose(plain, cached, atol=1e-5)
    assert not torch.allclose(plain, draw(pipe, ["one person"], noise, references[::-1], 4), atol=1e-3)


CALLS = {  # the one pass that diffusers' own pipeline makes, with references that are taken as they are; FLUX.1-dev's takes none
    "flux1_dev": {"height": 48, "width": 64, "guidance_scale": 2.0, "max_sequence_length": 16},
    "flux1_kontext": {"height": 64, "width": 64, "max_area": 64 * 64, "_auto_resize": False, "guidance_scale": 2.0, "max_sequence_length": 16},
    "flux2_klein": {"height": 48, "width": 64, "guidance_scale": 1.0, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
    "flux2_klein_kv": {"height": 48, "width": 64, "max_sequence_length": 32, "text_encoder_out_layers": (1, 2, 3)},
    "flux2_dev": {
        "height": 48, "width": 64, "guidance_scale": 2.0, "max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3),
    },
    "qwen_image_edit": {"height": 48, "width": 64},
    "qwen_image_edit_2509": {"height": 48, "width": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_velocity_is_the_call_of_diffusers_own_pipeline_bit_for_bit(name, pictures, monkeypatch):
    """Whatever its pipeline hands to the transformer, ours hands over too: same tokens, ids, text, level; equal to the last bit."""
    monkeypatch.setattr(diffusers_qwen, "VAE_IMAGE_SIZE", 32 * 64)
    pipe = tiny(name)
    backbone, calls = backbone_of(pipe), []
    small = [pictures[0, :, :32, :32], pictures[1, :, :32]]
    large = [
        pictures[0],
        torch.cat([pictures[1], pictures[2, :, :, :16]], dim=2),
    ]  # FLUX.2 takes nothing below 64 pixels
    most = {"flux1_dev": 0, "flux1_kontext": 1}.get(name, 2)
    references = [to_image(p) for p in (large if "flux2" in name else small)][:most]
    image = {} if not references else {"image": references[0] if most == 1 else references}
    hook = pipe.transformer.register_forward_hook(
        lambda _m, _a, kwargs, out: calls.append((kwargs, out)), with_kwargs=True
    )
    pipe(
        **image, prompt="one person", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0), **CALLS[name]
    )  # fmt: skip
    hook.remove()
    (kwargs, out), grids = calls[0], [(r.height // 8, r.width // 8) for r in references]
    count = CALLS[name]["height"] * CALLS[name]["width"] // 64
    seen = [torch.from_numpy(np.array(r)).permute(2, 0, 1) / 255 for r in references]
    sizes = [rows * columns for rows, columns in grids]
    order = [*sizes, count] if name == "flux2_klein_kv" else [count, *sizes]
    streams = list(kwargs["hidden_states"].split(order, dim=1))
    tokens = streams.pop(-1 if name == "flux2_klein_kv" else 0)
    text = backbone.encode_prompts_with(pipe, ["one person"], [seen])
    assert torch.equal(text.embeds, kwargs["encoder_hidden_states"])
    for stream, picture in zip(streams, seen, strict=True):
        assert torch.allclose(backbone.encode_pictures(pipe, picture[None]), stream, atol=1e-5)
    with torch.no_grad():
        got = backbone.velocity(
            pipe.transformer, tokens, kwargs["timestep"], text, image_grid=(count // 8, 8), references=streams, reference_grids=grids,
            guidance=2.0,
        )  # fmt: skip
    assert torch.equal(got, out[0][:, :count])


def test_the_places_of_qwen_are_those_of_its_rotary_embedding():
    """The transformer makes its own: equal rows of ours get equal rotations of its, and unequal ones unequal."""
    rope = tiny("qwen_image_edit").transformer.pos_embed
    grids = [(3, 4), (2, 2), (5, 3)]
    rotations, _ = rope([[(1, *grid) for grid in grids]], max_txt_seq_len=4, device=torch.device("cpu"))
    ids = get_backbone("qwen_image_edit").position_ids(grids[0], grids[1:])
    halves = [dim // 2 for dim in rope.axes_dim]
    for axis, part in enumerate(rotations.split(halves, dim=1)):
        frequency = 1.0 / 10000 ** (torch.arange(0, rope.axes_dim[axis], 2) / rope.axes_dim[axis])
        want = torch.polar(torch.ones(len(ids), halves[axis]), ids[:, axis, None] * frequency)
        assert torch.allclose(part, want, atol=1e-5)


def test_prompts_of_different_lengths_are_padded_and_masked(pipes, pictures):
    """A batch of two prompts, one padded, gives what each gives alone; what stands in the padding changes nothing."""
    pipe = pipes["qwen_image_edit"]
    backbone, seen = backbone_of(pipe), list(pictures[:2, :, :32, :32])
    prompts = ["one person", "two people in the park at night"]
    text = backbone.encode_prompts_with(pipe, prompts, [seen, seen[::-1]])
    alone = [backbone.encode_prompts_with(pipe, [p], [s]) for p, s in zip(prompts, (seen, seen[::-1]), strict=True)]
    assert text.mask is not None and text.mask.sum(1).tolist() == [t.embeds.shape[1] for t in alone]
    assert not torch.equal(alone[0].embeds, backbone.encode_prompts_with(pipe, prompts[:1], [seen[::-1]]).embeds)
    noisy = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    references = [torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]

    def run(text, rows):
        given = {"image_grid": (4, 4), "references": [r[rows] for r in references], "reference_grids": [(2, 2)] * 2}
        with torch.no_grad():
            return backbone.velocity(pipe.transformer, noisy[rows], torch.full((len(noisy[rows]),), 0.7), text, **given)

    both = run(text, slice(None))
    junk = text._replace(embeds=torch.where(text.mask[..., None], text.embeds, torch.full_like(text.embeds, 9.0)))
    assert torch.allclose(run(junk, slice(None)), both, atol=1e-6)
    for row, single in enumerate(alone):
        assert torch.allclose(run(single, slice(row, row + 1)), both[row : row + 1], atol=1e-5)


def test_noise_levels_end_where_the_scheduler_says(pipes):
    """diffusers' own scheduler, with the last level before 0 that published Qwen-Image schedulers name; and a checkpoint's own levels."""
    pipe, backbone = pipes["qwen_image_21"], get_backbone("qwen_image_21")
    scheduler = type(pipe.scheduler)(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    mu = backbone.shift_exponent(scheduler.config, 5, 24)
    for own in (None, [1.0, 0.9, 0.6, 0.3, 0.1]):
        scheduler.set_timesteps(sigmas=own or [1.0, 0.8, 0.6, 0.4, 0.2], mu=mu)
        stand_in = type("Pipe", (), {"scheduler": scheduler, "config": {"sample_sigmas": own}})
        assert torch.allclose(backbone.sigmas(stand_in, 5, 24), scheduler.sigmas, atol=1e-6)
        assert float(scheduler.sigmas[-2]) == pytest.approx(0.02)


def test_unknown_pipelines_and_names_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"FluxPipeline.*got Linear"):
        backbone_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"flux1_dev.*got 'flux9'"):
        get_backbone("flux9")
    with pytest.raises(ValueError, match="importable"):
        get_backbone("no_such_module:X")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="got StableDiffusionPipeline"):
        load_flux(tmp_path)
    for unsupported in (
        "QwenImageLayeredPipeline",
        "QwenImageEditPipeline",
        "QwenImagePipeline",
    ):  # they take one picture, or none
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{unsupported}"}}')
        with pytest.raises(ValueError, match=rf"QwenImageEditPlusPipeline, QwenImage21Pipeline, .*got {unsupported}$"):
            load_flux(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="broken"):
        load_flux(tmp_path)
    with pytest.raises(ValueError, match=r"dtype must be one of float32.*int8"):
        load_flux(dtype="int8")


def test_a_fourth_backbone_is_one_file(tmp_path, monkeypatch, pipes):
    """A module outside the package, named on the command line; here FLUX.1-dev with references below the picture."""
    (tmp_path / "my_backbone.py").write_text(
        "import torch\n"
        "from multicrafter.models.backbones import Flux1\n"
        "from multicrafter.models.flux.packing import grid_ids\n"
        "class Below(Flux1):\n"
        "    name = 'below'\n"
        "    def position_ids(self, image, references=()):\n"
        "        parts, row = [grid_ids(image)], image[0]\n"
        "        for grid in references:\n"
        "            parts.append(grid_ids(grid, (row, 0)))\n"
        "            row += grid[0]\n"
        "        return torch.cat(parts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_backbone", raising=False)
    mine = get_backbone("my_backbone:Below")
    pipe = pipes["flux1_dev"]
    text = mine.encode_prompts(pipe, ["one person"])
    inputs = {"image_grid": (4, 4), "references": [torch.ones(1, 4, 32)], "reference_grids": [(2, 2)]}
    with torch.no_grad():
        own, base = (
            b.velocity(pipe.transformer, torch.ones(1, 16, 32), torch.ones(1), text, **inputs) for b in (mine, Flux1())
        )
    assert not torch.allclose(own, base, atol=1e-5)
    saved = Adapters(tiny("flux1_dev").transformer, AdapterConfig(rank=2, alpha=2.0), backbone=mine).save(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=r"backbone flux1_dev, got one of below"):
        Adapters.load(tiny("flux1_dev").transformer, saved)
    assert Adapters.load(tiny("flux1_dev").transformer, saved, backbone=mine)[1]["backbone"] == "below"
