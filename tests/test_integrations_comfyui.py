"""The nodes of integrations/comfyui in ComfyUI's own code: its FLUX, its LoRA loader, its patcher. COMFYUI=path/to/ComfyUI names a checkout."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from idar.integrations.diffusers import capture_subject_attention
from multicrafter import UserError
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import pack_latents, unpack_latents
from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = os.environ.get("COMFYUI", "")
pytestmark = pytest.mark.skipif(
    not COMFYUI, reason="COMFYUI must name a checkout of ComfyUI, which is none of this repository"
)
SMALL = TinyFluxConfig(num_heads=2, head_dim=16, num_double=2, num_single=2, vae_channels=(8, 8, 8), text_width=16)
SIZE, REFERENCE, TEXT = (4, 6), (2, 2), 5  # tokens
EXPERTS = AdapterConfig(rank=3, alpha=5.0, num_experts=3, top_k=2)


@pytest.fixture(scope="module")
def comfy() -> Any:
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    return comfy


@pytest.fixture(scope="module")
def nodes(comfy: Any) -> Any:
    where = ROOT / "integrations" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("multicrafter_nodes", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def build(config: TinyFluxConfig = SMALL) -> Any:
    """A tiny pipeline whose every weight matters."""
    pipe, generator = build_pipeline(config), torch.Generator().manual_seed(1)
    for parameter in pipe.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return pipe


def in_comfyui(comfy: Any, pipe: Any) -> Any:
    """The same transformer as ComfyUI's own class, in its patcher."""
    c = pipe.transformer.config
    state = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    unet = {
        "image_model": "flux", "guidance_embed": c.guidance_embeds, "in_channels": c.in_channels // 4,
        "out_channels": c.in_channels // 4, "patch_size": 2, "vec_in_dim": c.pooled_projection_dim,
        "context_in_dim": c.joint_attention_dim, "hidden_size": c.num_attention_heads * c.attention_head_dim, "mlp_ratio": 4.0,
        "num_heads": c.num_attention_heads, "depth": c.num_layers, "depth_single_blocks": c.num_single_layers,
        "axes_dim": list(c.axes_dims_rope), "theta": 10000, "qkv_bias": True,
    }  # fmt: skip
    config = comfy.supported_models.Flux(unet)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    missing, unexpected = model.diffusion_model.load_state_dict(
        comfy.model_detection.convert_diffusers_mmdit(state), strict=False
    )
    assert not unexpected and not missing, (missing, unexpected)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@torch.no_grad()
def ours(pipe: Any, given: dict[str, Any]) -> torch.Tensor:
    """The velocity in diffusers' class, as a latent picture."""
    text = Text(given["context"], given["y"])
    out = backbone_of(pipe).velocity(
        pipe.transformer, pack_latents(given["x"]), given["timestep"], text, image_grid=SIZE,
        references=[pack_latents(r) for r in given["ref_latents"]], reference_grids=[REFERENCE] * 2, guidance=2.5,
    )  # fmt: skip
    return unpack_latents(out, SIZE)


@torch.no_grad()
def theirs(patcher: Any, given: dict[str, Any]) -> torch.Tensor:
    """The velocity in ComfyUI's class, with what the patcher does to a model while it draws."""
    patcher.patch_model()
    try:
        options = {**patcher.model_options.get("transformer_options", {}), "wrappers": patcher.wrappers}
        return patcher.model.diffusion_model(
            **given, guidance=torch.full((2,), 2.5), ref_latents_method="uxo", transformer_options=options
        )
    finally:
        patcher.unpatch_model()


@pytest.fixture
def given() -> dict[str, Any]:
    generator, config = torch.Generator().manual_seed(3), build().transformer.config

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    channels = config.in_channels // 4
    return {
        "x": draw(2, channels, 2 * SIZE[0], 2 * SIZE[1]), "timestep": torch.tensor([0.7, 0.2]),
        "context": draw(2, TEXT, config.joint_attention_dim), "y": draw(2, config.pooled_projection_dim),
        "ref_latents": [draw(2, channels, 2 * REFERENCE[0], 2 * REFERENCE[1]) for _ in range(2)],
    }  # fmt: skip


@torch.no_grad()
def trained(pipe: Any, config: AdapterConfig, folder: Path) -> Path:
    made, generator = Adapters(pipe.transformer, config, backbone=backbone_of(pipe)), torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.save(folder)


@pytest.mark.parametrize("kind", ["experts beside FFNs", "experts on linears", "plain"])
def test_an_adapter_gives_the_same_velocity(comfy, nodes, given, kind, tmp_path):
    pipe, config = build(), {
        "experts beside FFNs": EXPERTS,
        "experts on linears": AdapterConfig(rank=3, alpha=5.0, num_experts=3, experts_on_linears=True),
        "plain": AdapterConfig(rank=3, alpha=5.0, num_experts=0),
    }[kind]  # fmt: skip
    patcher = in_comfyui(comfy, pipe)
    before = ours(pipe, given)
    torch.testing.assert_close(theirs(patcher, given), before, atol=1e-5, rtol=0)
    folder = trained(pipe, config, tmp_path / "adapter")
    after = ours(pipe, given)
    assert float((after - before).abs().max()) > 0.1
    (loaded,) = nodes.LoadMixture().load(patcher, str(folder), 1.0)
    torch.testing.assert_close(theirs(loaded, given), after, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs(patcher, given), before, atol=1e-5, rtol=0)  # and the model is what it was
    (nothing,) = nodes.LoadMixture().load(patcher, str(folder), 0.0)
    torch.testing.assert_close(theirs(nothing, given), before, atol=1e-5, rtol=0)


def test_a_model_of_another_size_is_refused(comfy, nodes, tmp_path):
    folder = trained(build(), EXPERTS, tmp_path / "adapter")
    other = TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=2, vae_channels=(8, 8, 8), text_width=16)
    with pytest.raises(UserError, match="must be the adapter's base"):
        nodes.LoadMixture().load(in_comfyui(comfy, build(other)), str(folder), 1.0)
    with pytest.raises(UserError, match=r"must hold adapter\.json"):
        nodes.LoadMixture().load(in_comfyui(comfy, build()), str(tmp_path), 1.0)


def test_the_map_is_that_of_the_microscope(comfy, nodes, given):
    pipe = build()
    watched, seen = nodes.WatchAttention().watch(in_comfyui(comfy, pipe))
    with pytest.raises(UserError, match="sample with the watched model first"):
        nodes.LeakageMap().draw(seen, {"samples": given["x"]})
    drawn = theirs(watched, given)
    torch.testing.assert_close(drawn, ours(pipe, given), atol=1e-5, rtol=0)  # watching changes nothing
    layout = backbone_of(pipe).layout(TEXT, SIZE, [REFERENCE] * 2)
    with capture_subject_attention(pipe.transformer, layout, direction="image_to_reference") as captured:
        ours(pipe, given)
    torch.testing.assert_close(seen.maps, captured.maps[0], atol=1e-6, rtol=0)
    assert seen.passes == SMALL.num_double
    picture, text = nodes.LeakageMap().draw(seen, {"samples": given["x"]})
    assert picture.shape == (1, 16 * SIZE[0], 2 * 16 * SIZE[1], 3) and picture.min() >= 0 and picture.max() <= 1
    left, right = picture[0, ..., 0].chunk(2, 1)
    torch.testing.assert_close(left + right, torch.ones_like(left))
    assert text.startswith("reference 1: ") and "reference 2: " in text


def test_they_work_in_its_sampler(comfy, nodes, given, tmp_path):
    """Two Euler steps by ComfyUI's guider, sampler and memory management, and by hand."""
    import comfy.samplers

    pipe = build()
    patcher = in_comfyui(comfy, pipe)
    folder = trained(pipe, EXPERTS, tmp_path / "adapter")
    (loaded,) = nodes.LoadMixture().load(patcher, str(folder), 1.0)
    watched, seen = nodes.WatchAttention().watch(loaded)
    one = {k: v[:1] if isinstance(v, torch.Tensor) else [r[:1] for r in v] for k, v in given.items()}
    model = loaded.model
    about = {
        "pooled_output": one["y"], "guidance": 2.5, "reference_latents_method": "uxo",
        "reference_latents": [model.process_latent_out(r) for r in one["ref_latents"]],
    }  # fmt: skip
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    guider = comfy.samplers.CFGGuider(watched)
    guider.inner_set_conds({"positive": [[one["context"], about]]})
    guider.set_cfg(1.0)
    sampler = comfy.samplers.sampler_object("euler")
    drawn = guider.sample(one["x"], torch.zeros_like(one["x"]), sampler, sigmas, disable_pbar=True, seed=0)
    x = one["x"]
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - sigma) * ours(pipe, {**one, "x": x, "timestep": sigma[None]})
    torch.testing.assert_close(model.process_latent_in(drawn), x, atol=1e-4, rtol=0)
    assert seen.passes == 2 * SMALL.num_double
    _, text = nodes.LeakageMap().draw(seen, {"samples": drawn})
    assert text.count("reference") == 2


def test_places_are_named_once(nodes):
    assert nodes.place("single_transformer_blocks.3.proj_mlp") == ("single_blocks.3.linear1", True)
    with pytest.raises(UserError, match="must sit on an FFN"):
        nodes.place("transformer_blocks.0.attn.to_q")
