"""The same capture on other MM-DiTs; each is compared with the definition on the queries and keys of its own attention calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from idar import SubjectLayout, reference
from idar.integrations.diffusers import attention_blocks, capture_subject_attention, flux_layout, qwen_layout

DIRECTIONS = ["reference_to_image", "image_to_reference"]
ATTENTION = torch.nn.functional.scaled_dot_product_attention


class Calls(torch.overrides.TorchFunctionMode):
    """Arguments of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATTENTION:
            names = ("query", "key", "value", "attn_mask")
            self.seen.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def flux2() -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """Four image axes: the references have T = 10 and 20."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    ids = torch.cat(
        [torch.tensor([[t, y, x, 0] for y in range(2) for x in range(w)]) for t, w in ((0, 3), (10, 2), (20, 1))]
    )
    text_ids = torch.tensor([[0, 0, 0, i] for i in range(5)])
    given = {
        "hidden_states": torch.randn(2, 12, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.rand(2),
        "guidance": torch.ones(2),
        "img_ids": ids.expand(2, -1, -1),
        "txt_ids": text_ids.expand(2, -1, -1),
    }
    return model, given, flux_layout


def qwen() -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """The second prompt is padded: its last two text tokens take no part."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    given = {
        "hidden_states": torch.randn(2, 12, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(2),
        "img_shapes": [[(1, 2, 3), (1, 2, 2), (1, 2, 1)]] * 2,
    }
    return model, given, qwen_layout


def sd3() -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """Text comes last and attention is its own function; two parts of the picture stand in for references."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=4,
        qk_norm="rms_norm",
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, 3, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.rand(2),
    }
    return model, given, SubjectLayout.in_order(5, 6, [4, 2], text="last")


LAYOUTS = {
    "flux2": SubjectLayout.in_order(5, 6, [4, 2]),
    "qwen": SubjectLayout.in_order(5, 6, [4, 2]),
    "sd3": SubjectLayout(num_text=5, image_span=(0, 6), subject_spans=((6, 10), (10, 12))),
}


@pytest.mark.parametrize("build", [flux2, qwen, sd3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_are_those_of_the_models_own_attention(build: Callable[[], Any], direction: str) -> None:
    model, given, layout = build()
    want_layout = LAYOUTS[build.__name__]
    plain = model(**given, return_dict=False)[0]
    with Calls() as calls, capture_subject_attention(model, layout, direction=direction, keep_blocks=True) as captured:  # type: ignore[arg-type]
        output = model(**given, return_dict=False)[0]
    assert torch.equal(output, plain)
    assert captured.layout == want_layout
    doubles = calls.seen[:2]
    want = []
    for call in doubles:
        hidden = call.get("attn_mask")
        want.append(
            reference.subject_attention(
                call["query"],
                call["key"],
                want_layout.subject_spans,
                want_layout.image_span,
                direction=direction,
                key_mask=None if hidden is None else hidden[:, 0, 0],
            )
        )
    assert (doubles[0].get("attn_mask") is not None) == (build is qwen)
    torch.testing.assert_close(torch.stack(list(captured.blocks.values())), torch.stack(want), atol=1e-6, rtol=1e-5)
    grads = torch.autograd.grad(captured.maps.square().sum(), list(model.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in grads) > 10


def test_single_blocks_of_flux2_can_be_watched() -> None:
    model, given, layout = flux2()
    with capture_subject_attention(
        model, layout, blocks=lambda n: n.startswith("single"), keep_blocks=True
    ) as captured:
        model(**given)
    assert list(captured.blocks) == ["single_transformer_blocks.0.attn"]
    assert len(attention_blocks(model)) == 2


def test_references_with_a_cache_of_keys() -> None:
    """FLUX.2-klein-KV: [text | references | image], references attend to themselves, then come from a cache."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    model, given, _ = flux2()
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    order = [*range(6, 12), *range(6)]
    given["hidden_states"], given["img_ids"] = given["hidden_states"][:, order], given["img_ids"][:, order]
    layout = flux_layout(given)
    assert layout == SubjectLayout(num_text=5, image_span=(11, 17), subject_spans=((5, 9), (9, 11)))
    with (
        Calls() as calls,
        torch.no_grad(),
        capture_subject_attention(model, layout, direction="image_to_reference", keep_blocks=True) as captured,
    ):
        _, cache = model(**given, kv_cache_mode="extract", num_ref_tokens=6, return_dict=False)
        extracted = captured.blocks
        given["hidden_states"], given["img_ids"] = given["hidden_states"][:, 6:], given["img_ids"][:, 6:]
        model(**given, kv_cache=cache, kv_cache_mode="cached", return_dict=False)
        cached = captured.blocks
    for maps, call in zip(
        (*extracted.values(), *cached.values()), (calls.seen[0], calls.seen[2], *calls.seen[-3:-1]), strict=True
    ):
        full = torch.softmax(call["query"][:, :, 5:] @ call["key"].transpose(2, 3) * 16**-0.5, -1)
        want = torch.stack([full[..., a:b].sum(-1).mean(1) for a, b in layout.subject_spans], 1)
        torch.testing.assert_close(maps, want, atol=1e-6, rtol=1e-5)
    with (
        pytest.raises(ValueError, match="image_to_reference"),
        capture_subject_attention(model, layout, direction="reference_to_image"),
    ):
        model(**given, kv_cache=cache, kv_cache_mode="cached")


def test_layouts_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="img_ids"):
        flux_layout({"img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="img_shapes"):
        qwen_layout({"img_shapes": [[(1, 2, 3)]], "encoder_hidden_states": torch.zeros(1, 5, 12)})
    with pytest.raises(ValueError, match="text"):
        SubjectLayout.in_order(5, 6, [4], text="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_text"):
        SubjectLayout(num_text=-1, image_span=(0, 2), subject_spans=((2, 3),))
    with pytest.raises(ValueError, match="overlap"):
        SubjectLayout(num_text=0, image_span=(0, 3), subject_spans=((2, 3),))
