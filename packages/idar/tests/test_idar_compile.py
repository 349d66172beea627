"""Blocks under torch.compile: no graph break, one compilation for all blocks, the values and gradients of eager mode."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss
from idar.integrations.diffusers import capture_subject_attention

NEWER = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9),
    reason="torch.compile of watched blocks needs torch 2.9: older ones break the graph at the attention call",
)
LAYOUT = SubjectLayout.in_order(5, 16, [4, 4])
DIRECTIONS = ["reference_to_image", "image_to_reference"]


def built() -> tuple[FluxTransformer2DModel, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=4, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 24, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.rand(2),
        "img_ids": torch.randint(0, 5, (24, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    masks = torch.zeros(2, 2, 16)
    masks[:, 0, :8], masks[:, 1, 8:] = 1, 1
    return model, given, masks


def step(
    model: FluxTransformer2DModel, given: dict[str, torch.Tensor], masks: torch.Tensor, direction: str
) -> list[torch.Tensor]:
    model.zero_grad()
    with capture_subject_attention(model, LAYOUT, direction=direction) as captured:  # type: ignore[arg-type]
        output = model(**given, return_dict=False)[0]
        maps = captured.maps
        (output.square().mean() + idar_loss(maps, masks, kind="dice").loss).backward()
    return [output.detach(), maps.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(backend: str, checkpointing: bool, direction: str) -> None:
    torch._dynamo.reset()
    model, given, masks = built()
    want = [t.clone() for t in step(model, given, masks, direction)]
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(backend=backend, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(
        error_on_recompile=False, recompile_limit=4
    ):  # more than four blocks' worth would raise
        for _ in range(2):
            got = step(model, given, masks, direction)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


@NEWER
@pytest.mark.parametrize(
    ("direction", "checkpointing"),
    [
        ("reference_to_image", True),
        pytest.param("reference_to_image", False, marks=pytest.mark.slow),
        pytest.param("image_to_reference", True, marks=pytest.mark.slow),
        pytest.param("image_to_reference", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_compiled_blocks(direction: str, checkpointing: bool) -> None:
    compare("aot_eager", checkpointing, direction)


@NEWER
@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inductor(direction: str) -> None:
    compare("inductor", False, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_operators_keep_their_contract(direction: str) -> None:
    """torch's own check of schema, fake kernel and autograd registration."""
    from idar import streaming

    q, k = (torch.randn(1, 9, 2, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in "qk")
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    bias[..., 1:3, 7:] = bias[..., 7:, 1:3] = -torch.inf
    if direction == "reference_to_image":
        rows = [torch.arange(5, 7), torch.arange(7, 9)]
        torch.library.opcheck(streaming.reference_to_image, (q, k, rows, [1, 5], None, bias, 0.5, 8))
    else:
        torch.library.opcheck(streaming.image_to_reference, (q, k, [1, 5], [5, 7, 7, 9], None, bias, 0.5, 8))
