"""On a card: maps under torch's fast attention kernels and torch.compile are those of plain attention. Bodies run on the CPU as well."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss, subject_attention
from idar.integrations.diffusers import capture_subject_attention, separate_subjects

NO_CARD = "needs a CUDA device, and there is none here"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]
LAYOUT = SubjectLayout.in_order(8, 64, [16, 16])
BOUND = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of maps that sum to 1, relative to the largest


def built(device: str, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, dict[str, torch.Tensor], torch.Tensor]:
    """Two double and one single block with heads of 64, which every kernel takes."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 96, 8),
        "encoder_hidden_states": torch.randn(2, 8, 12),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.rand(2),
    }
    given = {k: v.to(device, dtype) for k, v in given.items()}
    given |= {"img_ids": torch.randint(0, 5, (96, 3)).float().to(device), "txt_ids": torch.zeros(8, 3, device=device)}
    masks = torch.zeros(2, 2, 64, device=device)
    masks[:, 0, :32], masks[:, 1, 32:] = 1, 1
    return model.to(device, dtype), given, masks


def watched(model: torch.nn.Module, given: dict[str, torch.Tensor], masks: torch.Tensor) -> list[torch.Tensor]:
    """Output, maps and gradients of one step."""
    model.zero_grad()
    with capture_subject_attention(model, LAYOUT) as captured:
        output = model(**given, return_dict=False)[0]
        (output.float().square().mean() + idar_loss(captured.maps, masks, kind="dice").loss).backward()
        maps = captured.maps
    return [output.detach(), maps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def maps_do_not_depend_on_the_kernel(device: str, dtype: torch.dtype, backend: SDPBackend) -> None:
    """Captured or not, the output is the same to the bit; maps and loss gradients are those of fp32 on the CPU to the dtype's resolution."""
    model, given, masks = built("cpu", torch.float32)
    want = watched(model, given, masks)
    model, given, masks = built(device, dtype)
    with sdpa_kernel(backend):
        plain = model(**given, return_dict=False)[0].detach()
        got = watched(model, given, masks)
    assert torch.equal(got[0], plain)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].sum(-1).cpu(), want[1].sum(-1), atol=BOUND[dtype], rtol=BOUND[dtype])
    assert (got[1].cpu() - want[1]).abs().max() < BOUND[dtype] * want[1].abs().max()
    assert len(got) == len(want)
    assert all(bool(torch.isfinite(g).all()) for g in got[2:])


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        *(
            pytest.param("cuda", dtype, backend, marks=GPU)
            for dtype, backend in (
                (torch.bfloat16, SDPBackend.FLASH_ATTENTION),
                (torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION),
                (torch.bfloat16, SDPBackend.CUDNN_ATTENTION),
                (torch.bfloat16, SDPBackend.MATH),
                (torch.float32, SDPBackend.EFFICIENT_ATTENTION),
                (torch.float32, SDPBackend.MATH),
            )
        ),
        ("cpu", torch.bfloat16, SDPBackend.FLASH_ATTENTION),
        ("cpu", torch.float32, SDPBackend.FLASH_ATTENTION),
        ("cpu", torch.float32, SDPBackend.MATH),
    ],
)
def test_maps_do_not_depend_on_the_attention_kernel(device: str, dtype: torch.dtype, backend: SDPBackend) -> None:
    maps_do_not_depend_on_the_kernel(device, dtype, backend)


def compiled_blocks_give_the_same(device: str, dtype: torch.dtype, backend: str) -> None:
    torch._dynamo.reset()
    model, given, masks = built(device, dtype)
    want = watched(model, given, masks)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(backend=backend)
    got = watched(model, given, masks)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a - b).abs().max() < BOUND[dtype] * b.abs().max()


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        pytest.param("cuda", torch.bfloat16, "inductor", marks=GPU),
        pytest.param("cuda", torch.float32, "inductor", marks=GPU),
        pytest.param("cpu", torch.float32, "eager", marks=pytest.mark.slow),  # test_idar_compile has more of it
    ],
)
def test_compiled_blocks_are_watched_the_same(device: str, dtype: torch.dtype, backend: str) -> None:
    compiled_blocks_give_the_same(device, dtype, backend)


def flex_equals_mask(device: str) -> None:
    """Separation by FlexAttention, which skips blocks, and by an additive mask."""
    model, given, masks = built(device, torch.float32)
    found = []
    for backend in ("mask", "flex"):
        with torch.no_grad(), separate_subjects(model, LAYOUT, masks, backend=backend):  # type: ignore[arg-type]
            found.append(model(**given, return_dict=False)[0])
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        assert not torch.allclose(found[0], model(**given, return_dict=False)[0], atol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_flex_attention_separates_as_a_mask_does(device: str) -> None:
    flex_equals_mask(device)


def peak_of_maps(device: str, tokens: int) -> tuple[int, int]:
    """Bytes that the maps of one block take at most beyond queries and keys, and bytes of one whole matrix of weights."""
    query, key = (
        torch.randn(1, 8, tokens, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    spans, image = [(tokens // 2, 3 * tokens // 4), (3 * tokens // 4, tokens)], (0, tokens // 2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    maps = subject_attention(query, key, spans, image, direction="image_to_reference")
    maps.square().sum().backward()
    assert query.grad is not None and bool(torch.isfinite(query.grad).all())
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    return peak, 8 * tokens * tokens * 4


@pytest.mark.parametrize(("device", "tokens"), [pytest.param("cuda", 8192, marks=GPU), ("cpu", 128)])
def test_maps_of_a_long_sequence_never_hold_the_matrix(device: str, tokens: int) -> None:
    peak, matrix = peak_of_maps(device, tokens)
    assert peak < matrix / 4
