"""Qwen-Image 2.1, whose references stand between the words, does what its own pipeline in diffusers does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multicrafter.models.backbones import ReferenceCache, backbone_of, get_backbone
from multicrafter.models.flux.model import sample
from multicrafter.pipeline import to_image
from multicrafter.world.tiny_backbones import tiny_qwen21
from multicrafter_tiny import smooth_pictures, tiny


@pytest.fixture(scope="module")
def spoken():
    """What diffusers' own pipeline of Qwen-Image 2.1 makes of two references, one of them wide: calls, both guided passes, cached or not."""
    pipe = tiny("qwen_image_21")
    pictures = smooth_pictures()
    references = [to_image(pictures[0]), to_image(torch.cat([pictures[1], pictures[2]], dim=2))]
    seen = [references[0], references[1].resize((96, 32))]  # what it makes of them at 64 x 64 pixels
    calls, noise = [], torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(0))
    hook = pipe.transformer.register_forward_hook(
        lambda _m, _a, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    drawn = [
        pipe(
            image=list(references), prompt="one person", negative_prompt="snow", true_cfg_scale=2.0, height=64, width=96, latents=noise,
            num_inference_steps=3, output_type="latent", output_resolution=64, use_kv_cache=cached,
        ).images
        for cached in (False, True)
    ]  # fmt: skip
    hook.remove()
    sizes = [(4, 4), (2, 6)]
    shown = [
        torch.from_numpy(
            np.array(pipe.image_processor.resize(r.convert("RGBA"), *(16 * n for n in size)).convert("RGB"))
        )
        for r, size in zip(references, sizes, strict=True)
    ]
    assert [tuple(s.shape[:2]) for s in shown] == [(64, 64), (32, 96)] and seen[1].size == (96, 32)
    return pipe, [s.permute(2, 0, 1) / 255 for s in shown], calls, drawn, noise


def test_qwen_21_calls_its_transformer_as_diffusers_does_bit_for_bit(spoken):
    """Words, places of the references between them, tokens, level; our own numbers in place of its masks give the same again."""
    pipe, seen, calls, _, _ = spoken
    backbone, (kwargs, out) = backbone_of(pipe), calls[0]
    grids = [shape[1:] for shape in kwargs["img_shapes"][0]]
    assert grids == [(4, 4), (2, 6), (4, 6)]
    *streams, tokens = kwargs["hidden_states"].split([16, 12, 24], dim=1)
    text = backbone.encode_prompts_with(pipe, ["one person"], [seen])
    words = ~kwargs["img_mask"][:, : kwargs["encoder_hidden_states"].shape[1]]
    assert torch.equal(text.embeds[0], kwargs["encoder_hidden_states"][words])
    for stream, picture in zip(streams, seen, strict=True):
        assert torch.allclose(backbone.encode_pictures(pipe, picture[None]), stream, atol=1e-5)
    given = {"image_grid": grids[-1], "references": streams, "reference_grids": grids[:-1]}
    with torch.no_grad():
        got = backbone.velocity(pipe.transformer, tokens, kwargs["timestep"], text, **given)
        assert torch.equal(got, out[:, -24:])
        joint = backbone.joint_pass(
            pipe.transformer, kwargs["hidden_states"], kwargs["timestep"], text, text.slots[0].tolist(), grids
        )
        assert torch.allclose(joint[:, -24:], got, atol=1e-6)
        moved = text._replace(slots=text.slots + 1)
        assert not torch.allclose(
            backbone.velocity(pipe.transformer, tokens, kwargs["timestep"], moved, **given), got, atol=1e-4
        )
    layout = backbone.layout_of(text, grids[-1], grids[:-1])
    assert layout == backbone.layout_of_pass(kwargs, grids[-1], grids[:-1])
    assert layout.subject_spans[1][0] - layout.subject_spans[0][1] > 3, "words stand between the references"


@pytest.mark.parametrize("cached", [False, True])
def test_qwen_21_equals_its_pipeline_of_diffusers(spoken, cached):
    pipe, seen, _, drawn, noise = spoken
    backbone = backbone_of(pipe)
    positive, negative = (backbone.encode_prompts_with(pipe, [text], [seen]) for text in ("one person", "snow"))
    given = {"image_grid": (4, 6), "reference_grids": [(4, 4), (2, 6)]}
    given["references"] = [backbone.encode_pictures(pipe, r[None]) for r in seen]
    caches, lengths = [ReferenceCache() if cached else None for _ in range(2)], []
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )

    def velocity(x, s):
        passes = [
            backbone.velocity(pipe.transformer, x, s, text, cache=cache, **given)
            for text, cache in zip((positive, negative), caches, strict=True)
        ]
        return backbone.guide(*passes, 2.0)

    with torch.no_grad():
        got = sample(velocity, noise, backbone.sigmas(pipe, 3, 24))
    hook.remove()
    assert torch.allclose(got, drawn[cached], atol=1e-4)
    assert (lengths[-1] == 24) == cached


def test_what_qwen_21_cannot_do_is_refused(spoken):
    pipe, backbone = spoken[0], get_backbone("qwen_image_21")
    text, tokens = backbone.encode_prompts(pipe, ["x"]), torch.ones(1, 6, 4)
    with pytest.raises(ValueError, match=r"grids must have even rows and columns for qwen_image_21, got \(2, 3\)"):
        backbone.velocity(pipe.transformer, tokens, torch.ones(1), text, image_grid=(2, 3))
    shown = backbone.encode_prompts_with(pipe, ["x"], [[torch.rand(3, 32, 32)]])
    with pytest.raises(ValueError, match="text must be encoded with the 2 references"):
        backbone.velocity(
            pipe.transformer, torch.ones(1, 4, 4), torch.ones(1), shown, image_grid=(2, 2), references=[torch.ones(1, 4, 4)] * 2,
            reference_grids=[(2, 2)] * 2,
        )  # fmt: skip
    blind = tiny_qwen21(causal_condition=False)
    with pytest.raises(ValueError, match="cache must be None"):
        backbone.velocity(
            blind.transformer, torch.ones(1, 4, 4), torch.ones(1), text, image_grid=(2, 2), cache=ReferenceCache()
        )
