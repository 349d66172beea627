"""Qwen-Image 2.1, where references stand between the words of one causal sequence: capture and separation on the real class of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")
pytest.importorskip(
    "diffusers.models.transformers.transformer_qwenimage21", reason="needs a diffusers that has Qwen-Image 2.1"
)

from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from idar import SubjectLayout, attention_owners, separation_bias
from idar.integrations.diffusers import capture_subject_attention, qwen21_layout, qwen_layout, separate_subjects

ATTENTION = torch.nn.functional.scaled_dot_product_attention
LAYOUT = SubjectLayout(num_text=5, image_span=(17, 25), subject_spans=((2, 6), (7, 15)), length=25, causal=True)
"""Two words, a reference of 4 tokens, a word, one of 8, two words, the image of 8."""
MASKS = torch.tensor([[[1.0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]]).expand(2, 2, 8)


@pytest.fixture
def built() -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=12,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    slots = [False, False, True, False, True, True, False, False, True, True]
    return model, {
        "hidden_states": torch.randn(2, 20, 8),
        "encoder_hidden_states": torch.randn(2, 8, 12),
        "timestep": torch.tensor([0.9, 0.3]),
        "img_shapes": [[(1, 2, 2), (1, 2, 4), (1, 2, 4)]] * 2,
        "img_mask": torch.tensor([slots] * 2),
    }


def padded(given: dict[str, Any]) -> dict[str, Any]:
    """The second prompt's last word is padding."""
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, -1] = False
    return {**given, "encoder_hidden_states_mask": mask}


def run(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = model(**given, return_dict=False)[0]
    return output[:, -8:]


@contextmanager
def attention_replaced(change: Any) -> Iterator[None]:
    torch.nn.functional.scaled_dot_product_attention = change
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = ATTENTION


def test_the_layout_is_read_off_the_pass_and_another_is_refused(built: Any) -> None:
    model, given = built
    assert qwen21_layout(given) == LAYOUT
    flux_like = SubjectLayout.in_order(5, 8, [4, 8])
    moved = SubjectLayout(num_text=5, image_span=(17, 25), subject_spans=((2, 6), (8, 16)), length=25, causal=True)
    for wrong in (flux_like, moved):
        for use in (capture_subject_attention(model, wrong), separate_subjects(model, wrong, None)):
            with torch.no_grad(), pytest.raises(ValueError, match="layout must be causal, with its references"), use:
                run(model, given)
    one_person = SubjectLayout(num_text=5, image_span=(17, 25), subject_spans=((2, 15),), length=25, causal=True)
    with torch.no_grad(), capture_subject_attention(model, one_person) as captured:
        run(model, given)
    assert captured.maps.shape == (2, 1, 8)
    with pytest.raises(ValueError, match=r"image_span must be the last of a causal layout"):
        SubjectLayout(num_text=1, image_span=(0, 4), subject_spans=((5, 9),), causal=True)
    with (
        pytest.raises(ValueError, match="qwen21_layout must be given"),
        capture_subject_attention(model, qwen21_layout),
    ):
        run(model, {**given, "img_mask": None})
    with pytest.raises(ValueError, match="layout"), capture_subject_attention(model, qwen_layout):
        run(model, given)


@pytest.mark.parametrize("pad", [False, True])
def test_separated_attention_is_attention_under_the_bias(built: Any, pad: bool) -> None:
    """Every one of the several calls has the rows of the bias that its queries have in the sequence."""
    model, given = built
    given = padded(given) if pad else given
    bias, rows = separation_bias(LAYOUT, MASKS), []

    def materialised(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        stop = key.shape[2]
        start = stop - query.shape[2]
        rows.append((start, stop))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias[:, :, start:stop, :stop]
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        return scores.softmax(-1) @ value

    with torch.no_grad():
        with attention_replaced(materialised):
            want = run(model, given)
        with separate_subjects(model, qwen21_layout, MASKS):
            got = run(model, given)
        plain = run(model, given)
    assert rows == [(0, 2), (2, 6), (6, 7), (7, 15), (15, 17), (17, 25)] * 2
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_maps_are_the_mass_of_the_image_on_each_reference_and_the_output_is_as_it_was(built: Any) -> None:
    model, given = built
    given, mass = padded(given), []

    def watched(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        probabilities = scores.softmax(-1)
        if key.shape[2] == 25:
            mass.append(torch.stack([probabilities[..., a:b].sum(-1).mean(1) for a, b in LAYOUT.subject_spans], 1))
        return probabilities @ value

    with torch.no_grad():
        with attention_replaced(watched):
            run(model, given)
        plain = run(model, given)
        with capture_subject_attention(model, qwen21_layout, keep_blocks=True) as captured:
            assert torch.equal(run(model, given), plain)
        assert list(captured.blocks) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
        torch.testing.assert_close(captured.maps, torch.stack(mass).mean(0), atol=1e-5, rtol=1e-4)
        with (
            pytest.raises(ValueError, match="whose references attend to no image"),
            capture_subject_attention(model, qwen21_layout, direction="reference_to_image"),
        ):
            run(model, given)


def test_gradients_of_the_maps_reach_queries_and_keys(built: Any) -> None:
    model, given = built
    with capture_subject_attention(model, qwen21_layout) as captured:
        run(model, given)
        captured.maps[:, 0].sum().backward()
    for name in ("to_q", "to_k"):
        assert float(getattr(model.transformer_blocks[1].attn, name).weight.grad.abs().max()) > 0  # type: ignore[operator, index, union-attr]


@pytest.mark.parametrize("masks", [MASKS, attention_owners])
def test_nobody_looks_at_another_persons_reference(built: Any, masks: Any) -> None:
    model, given = built
    with (
        torch.no_grad(),
        separate_subjects(model, qwen21_layout, masks) as separation,
        capture_subject_attention(model, qwen21_layout, keep_blocks=True) as captured,
    ):
        run(model, given)
    if masks is MASKS:
        assert float((captured.maps * (1 - MASKS)).abs().max()) == 0 and float(captured.maps.max()) > 0
    else:
        for maps in captured.blocks.values():
            assert float(maps.amin(1).max()) == 0, "each token looks at one reference alone"
    separation.masks = None
    with torch.no_grad(), separate_subjects(model, qwen21_layout, masks, strength=0.0):
        still = run(model, given)
    assert torch.equal(still, run(model, given))


def test_a_cached_prefix_is_captured_and_separated_alike(built: Any) -> None:
    """The step that fills the cache and one that reads it have the maps and the output of a step without a cache."""
    model, given = built
    cache, seen = QwenImage21KVCache(2), []
    with (
        torch.no_grad(),
        separate_subjects(model, qwen21_layout, MASKS),
        capture_subject_attention(model, qwen21_layout) as captured,
    ):
        for kept in (
            {},
            {"kv_cache": cache, "kv_cache_mode": "extract"},
            {"kv_cache": cache, "kv_cache_mode": "cached"},
        ):
            seen.append((run(model, {**given, **kept}), captured.maps.clone()))
    for output, maps in seen[1:]:
        torch.testing.assert_close(output, seen[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps, seen[0][1], atol=1e-6, rtol=1e-4)
