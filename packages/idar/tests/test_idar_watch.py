"""`idar.watch`: one call, any supported pipeline; maps, leakage and a figure that agree with the parts they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")
pytest.importorskip("PIL", reason="needs idar[diffusers]")

from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from idar import leakage, map_overlap, token_masks, watch
from idar.integrations.bound import draw_bound
from idar.integrations.recording import record
from idar.integrations.watching import watched
from PIL import Image

REFERENCES = [Image.new("RGB", (64, 64), (200, 30, 30)), Image.new("RGB", (64, 64), (20, 40, 200))]
LEFT = torch.zeros(64, 64)
LEFT[:, :32] = 1


def klein(pipeline: type) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    pipe = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    return pipe, {"prompt_embeds": embeds, **({} if pipeline is Flux2KleinKVPipeline else {"guidance_scale": 1.0})}


@pytest.mark.parametrize("pipeline", [Flux2KleinPipeline, Flux2KleinKVPipeline])
def test_one_call_gives_maps_leakage_and_a_figure(pipeline: type, tmp_path: Path) -> None:
    pipe, options = klein(pipeline)
    given = {"size": (64, 64), "num_steps": 3, "seed": 4, "options": options}
    found = watch(pipe, REFERENCES, "", masks=[LEFT, 1 - LEFT], names=["Ann", "Bob"], **given)
    want = record(pipe, REFERENCES, "", directions=["image_to_reference"], **given)
    maps = want.maps["image_to_reference"].mean((0, 1))
    assert want.maps["image_to_reference"].shape == (2, 3, 2, 16)
    assert torch.equal(found.picture, want.picture)
    torch.testing.assert_close(found.maps.flatten(1), maps)
    truth = token_masks(torch.stack([LEFT, 1 - LEFT])[None], (4, 4))
    torch.testing.assert_close(found.leakage, leakage(maps[None], truth)[0])
    torch.testing.assert_close(found.overlap, map_overlap(maps[None])[0])
    assert found.masks_given and str(found).startswith(f"Ann: leakage {found.leakage[0]:.3f}, overlap")
    pytest.importorskip("matplotlib", reason="needs idar[plot]")
    assert found._repr_png_()[:4] == b"\x89PNG"
    found.figure(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").stat().st_size > 1000


def test_without_masks_the_maps_say_where_subjects_are() -> None:
    pipe, options = klein(Flux2KleinPipeline)
    found = watch(pipe, REFERENCES, "", size=(64, 64), num_steps=1, options=options)
    assert not found.masks_given and "at least" in str(found)
    assert found.masks.shape == found.maps.shape == (2, 4, 4)
    alone = watch(pipe, REFERENCES[:1], "", size=(64, 64), num_steps=1, options=options)
    assert bool(alone.leakage.isnan().all()) and "subject A: leakage at least -, overlap -" in str(alone)


def test_what_is_wrong_is_said_before_the_pipeline_runs() -> None:
    pipe, options = klein(Flux2KleinPipeline)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the pipeline ran"))
    given = {"size": (64, 64), "num_steps": 1, "options": options}
    with pytest.raises(ValueError, match="masks must be one per reference, got 1 for 2"):
        watch(pipe, REFERENCES, "", masks=[LEFT], **given)
    with pytest.raises(ValueError, match="names"):
        watch(pipe, REFERENCES, "", names=["Ann"], **given)
    with pytest.raises(ValueError, match=r"references\[1\] must"):
        watch(pipe, [REFERENCES[0], "nowhere.png"], "", **given)
    with pytest.raises(ValueError, match="MODEL"):
        watch("/nowhere/model", REFERENCES, "")
    with pytest.raises(ValueError, match="margin"):
        draw_bound(pipe, REFERENCES, "", margin=-1.0, **given)
    with pytest.raises(ValueError, match="background"):
        draw_bound(pipe, REFERENCES, "", background="red", **given)  # type: ignore[arg-type]


def test_black_masks_and_other_directions() -> None:
    pipe, options = klein(Flux2KleinPipeline)
    given = {"size": (64, 64), "num_steps": 1, "options": options}
    recording = record(pipe, REFERENCES, "", **given)
    with pytest.warns(UserWarning, match=r"masks\[1\] is black"):
        found = watched(recording, masks=[LEFT, LEFT * 0])
    assert bool(found.leakage.isnan().all())  # nobody to leak onto, and nobody there
    with pytest.raises(ValueError, match="proportions"):
        watched(recording, masks=[LEFT, LEFT[:32]])
    with pytest.raises(ValueError, match="image_to_reference"):
        watched(record(pipe, REFERENCES, "", directions=["reference_to_image"], **given))


def test_a_picture_that_is_not_finite_is_refused() -> None:
    pipe, options = klein(Flux2KleinPipeline)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, torch.nan)
    with pytest.raises(ValueError, match="picture must be finite"):
        watch(pipe, REFERENCES, "", size=(64, 64), num_steps=1, options=options)


def test_the_kv_pipeline_is_bound_over_several_steps() -> None:
    """References come from a cache after the first step; what is forbidden stays forbidden there."""
    pipe, options = klein(Flux2KleinKVPipeline)
    find = lambda draft, _: torch.tensor([[0.0, 0, 31, 64], [33, 0, 64, 64]])  # noqa: E731
    given = {"size": (64, 64), "num_steps": 3, "seed": 3, "options": options}
    bound = draw_bound(pipe, REFERENCES, "", find=find, draft_steps=2, margin=0.0, **given)
    plain = record(pipe, REFERENCES, "", **given)
    assert bound.complete and not torch.allclose(bound.picture, plain.picture, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"references": "a.png"}, "references must be a list"), ({"references": Path("a.png")}, "references must be a list"),
        ({"references": REFERENCES[0]}, "put a single one into a list"), ({"references": None}, "references must be a list"),
        ({"names": "AB"}, "names must be a list"), ({"masks": "ab"}, "masks must be a list"), ({"size": 64}, "size must be two"),
        ({"size": "64x64"}, "size must be two"), ({"size": (64.0, 64)}, "size must be two"), ({"options": [1]}, "options must be"),
        ({"options": {"height": 32}}, r"got \['height'\]"), ({"seed": True}, "seed must be"), ({"num_steps": "2"}, "num_steps must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched(change: dict[str, Any], words: str) -> None:
    """A height among the options was drawn, and the maps were read as those of another."""
    pipe, options = klein(Flux2KleinPipeline)
    given = {"references": REFERENCES, "prompt": "", "size": (64, 64), "num_steps": 1, "options": options, **change}
    with pytest.raises(ValueError, match=words):
        watch(pipe, **given)


def test_a_generator_of_references_and_numbers_of_numpy() -> None:
    pipe, options = klein(Flux2KleinPipeline)
    want = watch(pipe, REFERENCES, "", size=(64, 64), num_steps=1, seed=3, options=options)
    found = watch(
        pipe,
        (r for r in REFERENCES),
        "",
        size=(np.int64(64), 64),
        num_steps=np.int64(1),
        seed=np.int64(3),
        options=options,
    )
    assert torch.equal(found.maps, want.maps)
