from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss
from idar.integrations.diffusers import capture_subject_attention

LAYOUT = SubjectLayout.in_order(5, 16, [4, 4])
DIRECTIONS = ["reference_to_image", "image_to_reference"]


def tiny_flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    ids = torch.zeros(24, 3)
    ids[:16, 1], ids[:16, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    ids[16:, 1] = ids[16:, 2] = torch.arange(8) + 4
    return {
        "hidden_states": torch.randn(batch, 24, 8, generator=g),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=g),
        "pooled_projections": torch.randn(batch, 12, generator=g),
        "timestep": torch.rand(batch, generator=g),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }


def masks() -> torch.Tensor:
    m = torch.zeros(2, 2, 16)
    m[:, 0, :8], m[:, 1, 8:] = 1, 1
    return m


def run(
    model: torch.nn.Module, direction: str, **options: object
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    with capture_subject_attention(model, LAYOUT, direction=direction, **options) as captured:  # type: ignore[arg-type]
        output = model(**inputs(), return_dict=False)[0]
        maps = captured.maps
        (output.square().mean() + idar_loss(maps, masks()).loss).backward()
    return (
        output.detach(),
        maps.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_outputs_are_bit_equal_and_the_model_is_restored(direction: str) -> None:
    model = tiny_flux()
    plain = model(**inputs(), return_dict=False)[0]
    before = model.attn_processors
    output, maps, _ = run(model, direction)
    assert torch.equal(output, plain)
    assert maps.shape == (2, 2, 16)
    assert all(model.attn_processors[n] is before[n] for n in before)
    with pytest.raises(RuntimeError, match="boom"), capture_subject_attention(model, LAYOUT):
        raise RuntimeError("boom")
    assert all(model.attn_processors[n] is before[n] for n in before)


def test_maps_are_those_of_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries and keys that reach the attention kernel give the same maps."""
    from diffusers.models.transformers import transformer_flux
    from idar import reference

    model, seen = tiny_flux(), []
    original = transformer_flux.dispatch_attention_fn
    monkeypatch.setattr(
        transformer_flux,
        "dispatch_attention_fn",
        lambda q, k, v, **kw: (seen.append((q, k)), original(q, k, v, **kw))[1],
    )
    for direction in DIRECTIONS:
        seen.clear()
        with (
            torch.no_grad(),
            capture_subject_attention(model, LAYOUT, direction=direction, keep_blocks=True) as captured,
        ):  # type: ignore[arg-type]
            model(**inputs())
        want = [
            reference.subject_attention(
                q.transpose(1, 2), k.transpose(1, 2), LAYOUT.subject_spans, LAYOUT.image_span, direction=direction
            )
            for q, k in seen[:2]
        ]
        torch.testing.assert_close(torch.stack(list(captured.blocks.values())), torch.stack(want), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(captured.maps, torch.stack(want).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_checkpointing_gives_values_once_and_gradients_once(direction: str) -> None:
    plain = run(tiny_flux(), direction)
    model = tiny_flux()
    model.enable_gradient_checkpointing()
    again = run(model.train(), direction)
    torch.testing.assert_close(again[1], plain[1])
    assert again[2].keys() == plain[2].keys()
    for name in plain[2]:
        torch.testing.assert_close(again[2][name], plain[2][name], atol=1e-6, rtol=1e-4)


def test_single_blocks_can_be_chosen_and_wrong_layouts_are_named() -> None:
    model = tiny_flux()
    _, maps, _ = run(model, "reference_to_image", blocks=lambda n: "single" in n)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2))
    run_layout = SubjectLayout.in_order(5, 16, [4, 400])
    with pytest.raises(ValueError, match="layout"), capture_subject_attention(model, run_layout):
        model(**inputs())
    with pytest.raises(ValueError, match="double-stream"), capture_subject_attention(torch.nn.Linear(2, 2), LAYOUT):
        pass


def test_autocast_keeps_maps_in_fp32() -> None:
    model = tiny_flux()
    with torch.autocast("cpu", dtype=torch.bfloat16), capture_subject_attention(model, LAYOUT) as captured:
        model(**inputs())
    assert captured.maps.dtype == torch.float32
    torch.testing.assert_close(captured.maps.sum(-1), torch.ones(2, 2), atol=1e-3, rtol=0)
