"""Each backbone does what its own pipeline in diffusers does, and fits its full-size transformer."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
import torch
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import BACKBONES, Flux1, Flux1Kontext, ReferenceCache, backbone_of, get_backbone
from multicrafter.models.backbones.drift import reference_drift
from multicrafter.models.flux.model import sample
from multicrafter.models.flux.packing import pack_latents, unpack_latents
from multicrafter.models.loading import load_flux
from multicrafter.pipeline import to_image
from multicrafter.world.tiny_backbones import tiny_flux1, tiny_klein, tiny_kontext
from multicrafter.world.tiny_flux import TinyFluxConfig

CONFIG = TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, vae_channels=(8, 8, 8), text_width=16)
NAMES = [b.name for b in BACKBONES]


def make(name):
    made = {
        "flux1_dev": lambda: tiny_flux1(CONFIG, guidance_embeds=True),
        "flux1_kontext": lambda: tiny_kontext(CONFIG),
        "flux2_klein": tiny_klein,
        "flux2_klein_kv": lambda: tiny_klein(kv=True),
    }[name]()
    generator = torch.Generator().manual_seed(1)
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    for parameter in made.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def pipes():
    """Read only."""
    return {name: make(name) for name in NAMES}


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(3)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=generator), 64, mode="bilinear")
    return smooth


def draw(pipe, prompts, noise, references, num_steps, *, cache=None):
    """Our sampler over a backbone's velocity."""
    backbone = backbone_of(pipe)
    side = backbone.token_side(pipe)
    grid, small = (64 // side,) * 2, [(r.shape[-2] // side, r.shape[-1] // side) for r in references]
    tokens = [backbone.encode_pictures(pipe, r[None]) for r in references]
    text = backbone.encode_prompts(pipe, prompts)
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


@pytest.mark.parametrize("name", ["flux2_klein", "flux2_klein_kv"])
def test_klein_equals_its_pipeline_of_diffusers(name, pipes, pictures):
    """Two references, shifted schedule, normalised latents: the same decoded latents."""
    pipe, noise = pipes[name], torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    references = [pictures[0], torch.cat([pictures[1], pictures[2, :, :, :16]], dim=2)]
    options = {} if name == "flux2_klein_kv" else {"guidance_scale": 1.0}
    want = pipe(
        image=[to_image(r) for r in references], prompt="one person", height=64, width=64, num_inference_steps=4, latents=noise,
        output_type="latent", max_sequence_length=32, text_encoder_out_layers=(1, 2, 3), **options,
    ).images  # fmt: skip
    rounded = [torch.from_numpy(np.array(to_image(r))).permute(2, 0, 1) / 255 for r in references]
    got = draw(pipe, ["one person"], noise.flatten(2).transpose(1, 2), rounded, 4)
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    assert torch.allclose(unpack_latents(got * std + pipe.vae.bn.running_mean, (8, 8)), want, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_encode_and_decode_as_in_diffusers(name, pipes, pictures):
    pipe, backbone = pipes[name], get_backbone(name)
    tokens = backbone.encode_pictures(pipe, pictures)
    assert tokens.shape == (3, 64, pipe.transformer.config.in_channels)
    if "klein" in name:
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


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_points_at_the_references(name, pipes):
    """A span's own tokens, and no others, change their keys when only that reference changes (first block)."""
    pipe, backbone = pipes[name], get_backbone(name)
    d, text = pipe.transformer.config.in_channels, backbone.encode_prompts(pipe, ["one person"])
    layout = backbone.layout(text.embeds.shape[1], (4, 4), [(2, 2), (3, 2)])
    generator = torch.Generator().manual_seed(0)
    image, one, two, other = (torch.randn(1, n, d, generator=generator) for n in (16, 4, 6, 6))
    attention = pipe.transformer.transformer_blocks[0].attn

    def keys(second):
        kept = []
        handle = attention.norm_k.register_forward_hook(lambda _m, _i, out: kept.append(out))
        with torch.no_grad():
            backbone.velocity(
                pipe.transformer, image, torch.tensor([0.5]), text, image_grid=(4, 4), references=[one, second],
                reference_grids=[(2, 2), (3, 2)],
            )  # fmt: skip
        handle.remove()
        return kept[0]

    changed = (keys(two) - keys(other)).abs().amax((0, 2, 3)) > 1e-6
    start, stop = layout.subject_spans[1]
    want = torch.zeros(26, dtype=torch.bool)
    want[start - layout.num_text : stop - layout.num_text] = True
    assert torch.equal(changed, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_claimed_only_where_it_is_exact(name, pipes, pictures):
    pipe, backbone = pipes[name], get_backbone(name)
    tokens = backbone.encode_pictures(pipe, pictures)
    small = backbone.encode_pictures(pipe, pictures[:, :, :32, :32])
    drift = reference_drift(
        backbone, pipe.transformer, backbone.encode_prompts(pipe, ["one person"] * 3), tokens=tokens,
        references=[small, small.flip(0)], image_grid=(8, 8), reference_grids=[(4, 4)] * 2,
    )  # fmt: skip
    assert len(drift) == pipe.transformer.config.num_layers + pipe.transformer.config.num_single_layers
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


def linear(d_in, d_out):
    return d_in * d_out + d_out


W, M = 3072, 9216  # width of both, FFN width of klein 4B
FLUX1 = (  # summed by hand from the released shapes
    linear(64, W) + linear(4096, W) + 2 * (linear(256, W) + linear(W, W)) + linear(768, W) + linear(W, W)
    + 19 * (2 * linear(W, 6 * W) + 8 * linear(W, W) + 2 * (linear(W, 4 * W) + linear(4 * W, W)) + 4 * 128)
    + 38 * (linear(W, 3 * W) + 3 * linear(W, W) + linear(W, 4 * W) + linear(5 * W, W) + 2 * 128)
    + linear(W, 2 * W) + linear(W, 64)
)  # fmt: skip
FULL = {
    "flux1_dev": FLUX1,
    "flux1_kontext": FLUX1,
    "flux2_klein": (128 + 7680 + 256 + W) * W  # picture, text, time
    + (2 * 6 + 3) * W * W  # modulations, shared by all blocks
    + 5 * (8 * W * W + 2 * (W * 2 * M + M * W) + 4 * 128)
    + 20 * (W * (3 * W + 2 * M) + (W + M) * W + 2 * 128)
    + 2 * W * W + W * 128,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_full_size_on_the_meta_device(name):
    """The whole network without memory: parameters, the velocity's shape, where the adapters sit."""
    backbone = get_backbone(name)
    with torch.device("meta"):
        transformer = backbone.build_transformer()
        tokens, references = (
            torch.zeros(2, 1024, transformer.config.in_channels),
            [torch.zeros(2, 400, transformer.config.in_channels)] * 4,
        )
        text, sigma = backbone.empty_text(transformer, 2, 512), torch.ones(2)
        velocity = backbone.velocity(
            transformer, tokens, sigma, text, image_grid=(32, 32), references=references, reference_grids=[(20, 20)] * 4
        )
    assert velocity.shape == tokens.shape
    assert velocity.is_meta
    if name in FULL:
        assert sum(p.numel() for p in transformer.parameters()) == FULL[name]
    double, single = transformer.config.num_layers, transformer.config.num_single_layers
    with torch.device("meta"):
        adapters = Adapters(transformer, AdapterConfig(rank=512, alpha=512.0), backbone=backbone)
    lora = {n.rsplit(".lora_A", 1)[0] for n, _ in adapters.named_parameters() if "lora_A" in n}
    assert len(lora) == double * 8 + single * (3 if name.startswith("flux1") else 1)
    assert len(adapters.experts.layers) == double * 2 + single
    touched = {n for n, _ in adapters.named_parameters()}
    assert all("blocks." in n for n in touched)


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
    saved = Adapters(make("flux1_dev").transformer, AdapterConfig(rank=2, alpha=2.0), backbone=mine).save(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=r"backbone flux1_dev, got one of below"):
        Adapters.load(make("flux1_dev").transformer, saved)
    assert Adapters.load(make("flux1_dev").transformer, saved, backbone=mine)[1]["backbone"] == "below"
