"""Pipelines of every supported class are recorded as they draw, and drawn bound; they are left as they were."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")
pytest.importorskip("transformers", reason="needs idar[diffusers]")

sys.path.insert(0, str(Path(__file__).parent))

import diffusers
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from idar import SubjectLayout
from idar.integrations.bound import draw_bound
from idar.integrations.diffusers import capture_subject_attention, flux_layout, qwen21_layout, qwen_layout
from idar.integrations.recording import guided, record, references_in_context, to_tensor
from idar_tiny_flux import picture, tiny_flux
from PIL import Image


def test_recording_leaves_the_pipeline_as_it_was_and_is_the_references_doing() -> None:
    pipe = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    plain = lambda: pipe(  # noqa: E731
        "two", height=24, width=24, num_inference_steps=2, max_sequence_length=6, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    before = plain()
    found = [
        record(pipe, [picture(40, 40, c), picture(20, 40)], "two", num_steps=2) for c in ((9, 9, 9), (250, 250, 9))
    ]
    assert torch.equal(plain(), before)
    assert found[0].maps["image_to_reference"].shape == (2, 2, 2, 36)
    torch.testing.assert_close(found[0].maps["reference_to_image"].sum(-1), torch.ones(2, 2, 2))
    assert found[0].sigmas == (1.0, 0.5)
    assert not torch.allclose(found[0].picture, before.clamp(0, 1), atol=1e-4)  # the references are in the context
    assert not torch.allclose(found[0].maps["image_to_reference"], found[1].maps["image_to_reference"], atol=1e-6)
    with pytest.raises(ValueError, match="size"):
        record(pipe, [picture(8, 8)], "two", size=(25, 24))


def test_references_follow_the_image_diagonally() -> None:
    """A 40 x 40 and a 20 x 40 picture at a long side of 12 pixels: 3 x 3 and 3 x 2 tokens behind 6 x 6."""
    pipe, seen = tiny_flux(), {}
    pipe.transformer.register_forward_hook(lambda m, a, k, o: seen.update(k), with_kwargs=True)
    with torch.no_grad(), references_in_context(pipe, [picture(40, 40), picture(20, 40)], 12, (24, 24)) as layout:
        image = torch.randn(1, 36, 16)
        output = pipe.transformer(
            hidden_states=image, encoder_hidden_states=torch.randn(1, 6, 16), pooled_projections=torch.randn(1, 16),
            timestep=torch.ones(1), img_ids=torch.zeros(36, 3), txt_ids=torch.zeros(6, 3), return_dict=False,
        )[0]  # fmt: skip
    assert output.shape == image.shape
    assert seen["img_ids"][36:].tolist() == [
        *([0, 6 + r, 6 + c] for r in range(3) for c in range(3)),
        *([0, 9 + r, 9 + c] for r in range(3) for c in range(2)),
    ]
    assert layout(seen).subject_spans == ((42, 51), (51, 57))
    latents = pipe.vae.encode(torch.full((1, 3, 12, 12), 1.0) * torch.tensor([200, 30, 30])[:, None, None] / 127.5 - 1)
    want = (latents.latent_dist.mode() - 0.1) * 0.5  # (1, 4, 6, 6)
    packed = seen["hidden_states"][:, 36:45].view(3, 3, 4, 2, 2)  # rows, columns, channels, 2, 2
    for r in range(3):
        for c in range(3):
            torch.testing.assert_close(
                packed[r, c], want[0, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2], atol=1e-4, rtol=1e-3
            )


def flux2(pipeline: type, *, guidance: bool) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    pipe = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("pipeline", [Flux2KleinPipeline, Flux2Pipeline])
def test_flux2_takes_its_references_itself(pipeline: type) -> None:
    embeds = torch.randn(1, 5, 12)
    options = {"prompt_embeds": embeds, "guidance_scale": 4.0}
    if pipeline is Flux2KleinPipeline:  # guidance by a second pass, which is not a step
        options["negative_prompt_embeds"] = embeds
    pipe = flux2(pipeline, guidance=pipeline is Flux2Pipeline)
    found = record(pipe, [picture(64, 64), picture(128, 64)], "", num_steps=2, size=(64, 64), options=options)
    assert found.grid == (4, 4)
    assert found.maps["image_to_reference"].shape == (2, 2, 2, 16)
    torch.testing.assert_close(found.maps["reference_to_image"].sum(-1), torch.ones(2, 2, 2))


def test_kontext_takes_one_reference() -> None:
    parts = tiny_flux().components
    pipe = FluxKontextPipeline(**{k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")})
    pipe.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": 6}
    found = record(pipe, [picture(40, 40)], "two", num_steps=2, options=options)
    assert found.grid == (6, 6) and found.sigmas == (1.0, 0.5)
    assert found.maps["image_to_reference"].shape == (2, 2, 1, 36)
    torch.testing.assert_close(found.maps["reference_to_image"].sum(-1), torch.ones(2, 2, 1))
    other = record(pipe, [picture(40, 40, (0, 255, 0))], "two", num_steps=2, options=options)
    assert not torch.allclose(found.maps["image_to_reference"], other.maps["image_to_reference"], atol=1e-6)
    with pytest.raises(ValueError, match="at most 1 for FluxKontextPipeline, got 2"):
        record(pipe, [picture(8, 8)] * 2, "two")


def qwen() -> tuple[Any, dict[str, Any]]:
    """A `QwenImageEditPlusPipeline` without its vision-language encoder, and the prompt that it would have encoded."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, processor=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt_embeds": torch.randn(1, 5, 12), "prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit makes a megapixel of each reference, whatever its size; here 64 x 64."""
    monkeypatch.setattr("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE", 64 * 64)


@pytest.mark.usefixtures("small")
def test_qwen_image_edit_takes_several() -> None:
    pipe, options = qwen()
    found = record(pipe, [picture(64, 64), picture(128, 64)], "", num_steps=2, size=(64, 64), options=options)
    assert found.grid == (4, 4) and found.sigmas == (1.0, 0.5)
    assert found.maps["image_to_reference"].shape == (2, 2, 2, 16)
    torch.testing.assert_close(found.maps["reference_to_image"].sum(-1), torch.ones(2, 2, 2))


class Words:
    """Stands in for the processor of Qwen-Image 2.1, which only its text encoder needs once the pipeline is made."""

    tokenizer = property(lambda self: self)

    def encode(self, text: str) -> list[int]:
        return [0]

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]


def qwen21() -> tuple[Any, dict[str, Any]]:
    """A `QwenImage21Pipeline` whose text encoder gives three words, a reference, a word, the next one, ..., and a last word."""
    if not hasattr(diffusers, "QwenImage21Pipeline"):
        pytest.skip("needs a diffusers that has Qwen-Image 2.1")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[False, True, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=12,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = diffusers.QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, text_encoder=None,
        processor=Words(), transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def encode_prompt(*, prompt: str, image: list[Image.Image], **_: Any) -> Any:
        pads = [False] * 2
        for shown in image:
            pads += [False, *[True] * (shown.width * shown.height // 32**2)]
        pads.append(False)
        embeds = torch.randn(1, len(pads), 12, generator=torch.Generator().manual_seed(len(prompt)))
        return embeds, None, torch.tensor([pads])

    pipe.encode_prompt = encode_prompt
    return pipe, {"prompt": "two people"}


@pytest.mark.filterwarnings("ignore:.*divisible by")
def test_qwen_image_21_shows_where_the_picture_looks_at_references_between_its_words() -> None:
    """With its own cache of keys after the first step, guided by a second pass, and without: the same maps."""
    pipe, options = qwen21()
    references = [picture(64, 64), picture(128, 32)]
    given = {"num_steps": 3, "size": (64, 96), "reference_size": 64, "seed": 2}
    found, plain = (
        record(pipe, references, "two", **given, options={**options, **guided(pipe, 2.0), "use_kv_cache": cached})
        for cached in (True, False)
    )
    assert found.grid == (4, 6) and len(found.sigmas) == 3
    assert set(found.maps) == {"image_to_reference"} and found.maps["image_to_reference"].shape == (2, 3, 2, 24)
    torch.testing.assert_close(found.maps["image_to_reference"], plain.maps["image_to_reference"], atol=1e-5, rtol=1e-4)
    exchanged = record(pipe, references[::-1], "two", **given, options=options)
    assert not torch.allclose(exchanged.maps["image_to_reference"], found.maps["image_to_reference"], atol=1e-5)
    with pytest.raises(ValueError, match="directions must hold one that QwenImage21Pipeline has"):
        record(pipe, references, "two", directions=["reference_to_image"], **given)
    with pytest.raises(ValueError, match="reference_size must be at least 32 pixels"):
        record(pipe, references, "two", reference_size=8)
    pipe.vae.decoder.conv_out.weight.data[3:] = 0
    pipe.vae.decoder.conv_out.bias.data[3:] = -1  # the fourth channel: all transparent
    clear = record(pipe, references, "two", **given, options=options).picture
    torch.testing.assert_close(clear, torch.ones_like(clear))


def klein() -> tuple[Any, dict[str, Any]]:
    pipe = flux2(Flux2KleinPipeline, guidance=False)
    embeds = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    return pipe, {"prompt_embeds": embeds, "guidance_scale": 1.0}


def context() -> tuple[Any, dict[str, Any]]:
    pipe = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"max_sequence_length": 6}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("build", [context, klein, qwen, qwen21])
def test_somebody_elses_pipeline_is_bound(build: Callable[[], Any]) -> None:
    """The pass that counts: a draft of two steps, boxes given by a detector, attention between subjects exactly 0 afterwards."""
    pipe, options = build()
    references = [picture(64, 64), picture(64, 64, (0, 255, 0))]
    size = (64, 64) if build in (qwen, qwen21) else None
    asked: list[Any] = []

    def find(draft: torch.Tensor, given: Any) -> torch.Tensor:
        asked.append((draft, given))
        height, width = draft.shape[1:]
        return torch.tensor([[0, 0, width / 2 - 1, height], [width / 2 + 1, 0, width, height]])

    prompt = "two people" if build is context else ""
    given = {"num_steps": 2, "seed": 3, "size": size, "options": options}
    if build is qwen21:
        given["reference_size"] = 64
    plain = record(pipe, references, prompt, **given)
    crossing = []
    with watched(pipe, crossing):
        bound = draw_bound(pipe, references, prompt, find=find, draft_steps=2, margin=0.0, **given)
    assert bound.complete and bound.num_steps == 4 and len(asked) == 1 and asked[0][1] is references
    torch.testing.assert_close(bound.draft, plain.picture, atol=1e-5, rtol=0)  # as many steps, the same noise
    assert not torch.allclose(bound.picture, plain.picture, atol=1e-6)
    rows, columns = plain.grid
    masks = bound.masks.view(2, rows, columns)
    assert masks[0, :, : columns // 2].min() == 1 and masks[1, :, columns // 2 :].min() == 1
    assert bool(((bound.masks.sum(0)) == 1).all())
    assert len(crossing) == 4 and crossing[0] > 0 and crossing[1] > 0 and crossing[2:] == [0.0, 0.0]
    again = record(pipe, references, prompt, **given)
    assert torch.equal(again.picture, plain.picture)
    everywhere = draw_bound(
        pipe, references, prompt, find=lambda d, _: torch.full((2, 4), torch.nan), draft_steps=1, **given
    )
    assert not everywhere.complete and bool((everywhere.masks == 1).all())
    by_maps = draw_bound(pipe, references, prompt, draft_steps=1, **given)
    assert by_maps.boxes.shape == (2, 4)
    with pytest.raises(ValueError, match="one box per reference"):
        draw_bound(pipe, references, prompt, find=lambda d, _: torch.zeros(1, 4), draft_steps=1, **given)


@contextmanager
def watched(pipe: Any, crossing: list[float]) -> Iterator[None]:
    """Attention mass of every pass from the left half of the picture to reference B and from the right half to A."""
    layout = {"QwenImageEditPlusPipeline": qwen_layout, "QwenImage21Pipeline": qwen21_layout}.get(
        type(pipe).__name__, flux_layout
    )
    if isinstance(pipe, FluxPipeline):
        layout = lambda kwargs: SubjectLayout.in_order(6, 36, [9, 9])  # noqa: E731
    with capture_subject_attention(
        pipe.transformer, layout, direction="image_to_reference", blocks=lambda _: True
    ) as captured:

        def note(*_: Any) -> None:
            maps = captured.maps[0]
            rows = int(maps.shape[1] ** 0.5)
            half = maps.view(2, rows, rows)
            crossing.append(float(half[1, :, : rows // 2].sum() + half[0, :, rows // 2 :].sum()))

        hook = pipe.transformer.register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()


def test_pictures_become_tensors() -> None:
    made = Image.new("RGB", (2, 1))
    made.putpixel((1, 0), (255, 0, 51))
    torch.testing.assert_close(to_tensor(made)[:, 0, 1], torch.tensor([1.0, 0.0, 0.2]))


def test_a_pipeline_of_another_kind_is_named() -> None:
    with pytest.raises(ValueError, match="FluxPipeline"):
        record(Any, [picture(8, 8)], "x")
