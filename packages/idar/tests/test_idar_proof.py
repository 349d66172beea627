"""The proof on a tiny FLUX: trained with the loss, the maps' peaks move into the masks; trained without, they do not.

Pictures are 4 x 4 tokens of noise with two subjects, each a quadrant of one colour; each reference is four tokens of that colour as another
camera sees it (a fixed rotation): what matches what has to be learned, and at little noise the picture can be restored without.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss, leakage, peak_in_mask
from idar.integrations.diffusers import capture_subject_attention

LAYOUT = SubjectLayout.in_order(2, 16, [4, 4])


def scenes(count: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """latents (b, 16, 8), references (b, 2, 4, 8), masks (b, 2, 16)."""
    colors = torch.nn.functional.normalize(torch.randn(count, 2, 8, generator=g), dim=-1) * 3
    quadrants = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(count)])
    rows, columns = torch.arange(16) // 4 // 2, torch.arange(16) % 4 // 2
    masks = ((rows * 2 + columns)[None, None] == quadrants[..., None]).float()
    latents = 0.3 * torch.randn(count, 16, 8, generator=g) + torch.einsum("bsn,bsd->bnd", masks, colors)
    other_view = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(7))).Q
    references = (colors @ other_view)[:, :, None] + 0.3 * torch.randn(count, 2, 4, 8, generator=g)
    return latents, references, masks


def trained(direction: str, kind: str, normalization: str, coef: float, steps: int) -> tuple[float, float]:
    """Peak-in-mask rate and leakage on new scenes after training."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.zeros(24, 3)
    ids[:16, 1], ids[:16, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    for i in range(2):
        ids[16 + 4 * i : 20 + 4 * i, 1] = 4 + 2 * i + torch.arange(4) // 2
        ids[16 + 4 * i : 20 + 4 * i, 2] = 4 + 2 * i + torch.arange(4) % 2
    g = torch.Generator().manual_seed(1)

    def run(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents, references, masks = scenes(count, g)
        noise, sigma = torch.randn(latents.shape, generator=g), 0.3 * torch.rand(count, generator=g)
        noisy = (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * noise
        with capture_subject_attention(model, LAYOUT, direction=direction) as captured:  # type: ignore[arg-type]
            velocity = model(
                hidden_states=torch.cat([noisy, references.flatten(1, 2)], 1), encoder_hidden_states=torch.zeros(count, 2, 8),
                pooled_projections=torch.zeros(count, 8), timestep=sigma, img_ids=ids, txt_ids=torch.zeros(2, 3),
                return_dict=False,
            )[0]  # fmt: skip
        return (velocity[:, :16] - (noise - latents)).square().mean(), captured.maps, masks

    for _ in range(steps):
        diffusion, maps, masks = run(16)
        loss = diffusion + coef * idar_loss(maps, masks, kind=kind, normalization=normalization).loss  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        _, maps, masks = run(128)
    return peak_in_mask(maps, masks).nanmean().item(), leakage(maps, masks).nanmean().item()


@pytest.mark.slow
def test_supervision_moves_the_peak_into_the_mask() -> None:
    """Without it, references look anywhere: peaks inside a mask by chance (a quarter) and maps that tell nobody apart."""
    peak, leak = trained("reference_to_image", "dice", "max", 0.0, 150)
    assert peak < 0.5
    assert leak > 0.4
    for kind, normalization in (("dice", "max"), ("cross_entropy", "none")):
        peak, leak = trained("reference_to_image", kind, normalization, 1.0, 150)
        assert peak > 0.9, kind
        assert leak < 0.15, kind


@pytest.mark.slow
def test_supervision_separates_what_the_picture_takes() -> None:
    """Image queries find their references by themselves here; supervised, they hardly look at the other one."""
    _, without = trained("image_to_reference", "share_cross_entropy", "none", 0.0, 150)
    peak, leak = trained("image_to_reference", "share_cross_entropy", "none", 1.0, 150)
    assert peak > 0.9
    assert leak < 0.1 < without
