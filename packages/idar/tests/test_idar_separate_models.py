"""`separate_subjects` on the real transformer classes of diffusers: what is forbidden carries nothing, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from idar import SubjectLayout, attention_owners, separation_bias
from idar.integrations.diffusers import (
    attention_blocks,
    capture_subject_attention,
    flux_layout,
    qwen_layout,
    separate_subjects,
)

Built = tuple[torch.nn.Module, dict[str, Any], SubjectLayout, Any]
ATTENTION = torch.nn.functional.scaled_dot_product_attention


def flux1() -> Built:
    """Text 5, image 6, references 4 and 2."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 12, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.9, 0.3]),
        "img_ids": torch.cat([torch.full((n, 3), float(g)) for g, n in enumerate((6, 4, 2))]),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, given, SubjectLayout.in_order(5, 6, [4, 2]), flux_layout


def flux2() -> Built:
    """The same numbers; references have T = 10 and 20."""
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    ids = torch.cat(
        [torch.tensor([[t, y, x, 0] for y in range(2) for x in range(w)]) for t, w in ((0, 3), (10, 2), (20, 1))]
    )
    given = {
        "hidden_states": torch.randn(2, 12, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([0.9, 0.3]),
        "guidance": torch.ones(2),
        "img_ids": ids.expand(2, -1, -1),
        "txt_ids": torch.tensor([[0, 0, 0, i] for i in range(5)]).expand(2, -1, -1),
    }
    return model, given, SubjectLayout.in_order(5, 6, [4, 2]), flux_layout


def qwen() -> Built:
    """The second prompt is padded: a boolean mask is there already."""
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
        "timestep": torch.tensor([0.9, 0.3]),
        "img_shapes": [[(1, 2, 3), (1, 2, 2), (1, 2, 1)]] * 2,
    }
    return model, given, SubjectLayout.in_order(5, 6, [4, 2]), qwen_layout


def sd3() -> Built:
    """Text comes last, timesteps run to 1000; two parts of the picture stand in for references."""
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
        "timestep": torch.tensor([900.0, 300.0]),
    }
    return model, given, SubjectLayout.in_order(5, 6, [4, 2], text="last"), None


MODELS = [flux1, flux2, qwen, sd3]
MASKS = torch.tensor([[[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]]).expand(2, 2, 6)


def run(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    output: torch.Tensor = model(**given, return_dict=False)[0]
    return output


@contextmanager
def attention_replaced(change: Callable[..., Any]) -> Iterator[None]:
    """Independent of idar: torch's own function is another one."""
    torch.nn.functional.scaled_dot_product_attention = change
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = ATTENTION


@pytest.mark.parametrize("build", MODELS)
def test_separated_attention_is_attention_under_the_bias(build: Callable[[], Built]) -> None:
    model, given, layout, found = build()
    length = 17
    bias = separation_bias(layout, MASKS, num_tokens=length)
    kinds = []

    def materialised(query: Any, key: Any, value: Any, attn_mask: Any = None, **rest: Any) -> Any:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        probabilities = scores.softmax(-1)
        kinds.append(probabilities)
        return probabilities @ value

    with torch.no_grad():
        with attention_replaced(materialised):
            want = run(model, given)
        with separate_subjects(model, layout if found is None else found, MASKS):
            got = run(model, given)
        assert torch.allclose(got, want, atol=1e-5)
        assert not torch.allclose(got, run(model, given), atol=1e-3)
    assert len(kinds) == len(attention_blocks(model, lambda _: True))
    a, b = layout.subject_spans
    start = layout.image_span[0]
    for probabilities in kinds:
        assert probabilities[..., start : start + 3, slice(*b)].max() == 0
        assert probabilities[..., start + 3 : start + 6, slice(*a)].max() == 0
        assert probabilities[..., slice(*a), slice(*b)].max() == 0


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("direction", ["image_to_reference", "reference_to_image"])
@pytest.mark.parametrize("capture_first", [True, False])
def test_no_attention_crosses_in_the_captured_maps(
    build: Callable[[], Built], direction: Any, capture_first: bool
) -> None:
    """Whichever context comes first, what is watched is the attention that takes place."""
    model, given, layout, _ = build()
    with torch.no_grad():
        if capture_first:
            with (
                capture_subject_attention(model, layout, direction=direction, blocks=lambda _: True) as captured,
                separate_subjects(model, layout, MASKS),
            ):
                run(model, given)
        else:
            with (
                separate_subjects(model, layout, MASKS),
                capture_subject_attention(model, layout, direction=direction, blocks=lambda _: True) as captured,
            ):
                run(model, given)
    maps = captured.maps
    assert maps[:, 0, 3:].max() == 0 and maps[:, 1, :3].max() == 0 and maps[:, :, 5].max() == 0
    assert maps[:, 0, :3].min() > 0 and maps[:, 1, 3:5].min() > 0
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("build", MODELS)
def test_bit_equal_where_nothing_is_forbidden(build: Callable[[], Built]) -> None:
    model, given, layout, _ = build()
    with torch.no_grad():
        want = run(model, given)
        for options in (
            {"masks": MASKS, "strength": 0.0},
            {"masks": None},
            {"masks": torch.ones(2, 2, 6), "arrows": ("image_to_reference", "reference_to_image")},
            {"masks": torch.zeros(2, 2, 6), "arrows": ("image_to_reference",), "background": "all"},
            {"masks": MASKS, "arrows": ()},
        ):
            with separate_subjects(model, layout, **options):
                assert torch.equal(run(model, given), want), options
        assert torch.equal(run(model, given), want)


@pytest.mark.parametrize("build", [flux1, *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS[1:])])
@pytest.mark.parametrize(
    ("background", "masks"),
    [pytest.param("none", MASKS, marks=pytest.mark.slow), ("all", MASKS), ("none", MASKS * 0.7)],
)
def test_flex_attention_agrees(build: Callable[[], Built], background: Any, masks: torch.Tensor) -> None:
    """What a GPU runs, here in its eager form: hard masks by blocks, soft ones by score."""
    model, given, layout, _ = build()
    if build is qwen:
        given = {**given, "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool)}
    with torch.no_grad():
        with separate_subjects(model, layout, masks, background=background, backend="mask"):
            want = run(model, given)
        with separate_subjects(model, layout, masks, background=background, backend="flex"):
            got = run(model, given)
        with separate_subjects(model, layout, masks, background=background, backend="flex", heads=[1]):
            one = run(model, given)
        with separate_subjects(model, layout, masks, background=background, backend="mask", heads=[1]):
            want_one = run(model, given)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(one, want_one, atol=1e-5) and not torch.allclose(one, want, atol=1e-4)


def test_strength_follows_rows_and_noise_levels() -> None:
    model, given, layout, _ = flux1()
    with torch.no_grad():
        plain = run(model, given)
        with separate_subjects(model, layout, MASKS):
            apart = run(model, given)
        with separate_subjects(model, layout, MASKS, strength=torch.tensor([1.0, 0.0])):
            by_row = run(model, given)
        with separate_subjects(model, layout, MASKS, strength=lambda sigma: (sigma > 0.5).float()):
            by_sigma = run(model, given)
    assert torch.allclose(by_row[0], apart[0], atol=1e-6) and torch.allclose(by_row[1], plain[1], atol=1e-6)
    assert torch.equal(by_row, by_sigma)
    model, given, layout, _ = sd3()
    seen = []
    with torch.no_grad(), separate_subjects(model, layout, MASKS, strength=lambda s: seen.append(s) or s * 0):  # type: ignore[func-returns-value]
        run(model, given)
    torch.testing.assert_close(seen[0], torch.tensor([0.9, 0.3]))


def test_nested_weights_multiply() -> None:
    model, given, layout, _ = flux1()
    with torch.no_grad():
        with separate_subjects(model, layout, MASKS, strength=0.75):
            want = run(model, given)
        with (
            separate_subjects(model, layout, MASKS, strength=0.5),
            separate_subjects(model, layout, MASKS, strength=0.5),
        ):
            got = run(model, given)
    assert torch.allclose(got, want, atol=1e-6)


def test_only_the_named_blocks() -> None:
    model, given, layout, _ = flux1()
    names = list(attention_blocks(model, lambda _: True))
    with (
        torch.no_grad(),
        separate_subjects(model, layout, MASKS, blocks=names[:1]),
        capture_subject_attention(
            model, layout, direction="image_to_reference", blocks=names, keep_blocks=True
        ) as captured,
    ):
        run(model, given)
    crossing = [float(captured.blocks[name][:, 0, 3:].max()) for name in names]
    assert crossing[0] == 0 and min(crossing[1:]) > 0


def test_masks_change_between_passes() -> None:
    """Binding in flight: nothing is separated until the masks are known."""
    model, given, layout, _ = flux1()
    with torch.no_grad():
        plain = run(model, given)
        with separate_subjects(model, layout, MASKS) as separation:
            apart = run(model, given)
            separation.masks = None
            assert torch.equal(run(model, given), plain)
            separation.masks = MASKS.flip(1)
            flipped = run(model, given)
            separation.masks = MASKS
            assert torch.equal(run(model, given), apart)
    assert not torch.allclose(flipped, apart, atol=1e-4)


def test_masks_of_half_a_batch_that_guidance_doubled() -> None:
    model, given, layout, _ = flux1()
    doubled = {k: torch.cat([v, v]) if k not in ("img_ids", "txt_ids") else v for k, v in given.items()}
    masks = torch.stack([MASKS[0], MASKS[0].flip(0)])
    with torch.no_grad(), separate_subjects(model, layout, masks):
        once, twice = run(model, given), run(model, doubled)
    assert torch.allclose(twice, torch.cat([once, once]), atol=1e-6)
    with (
        pytest.raises(ValueError, match="masks"),
        torch.no_grad(),
        separate_subjects(model, layout, masks.repeat(2, 1, 1)[:3]),
    ):
        run(model, given)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    """Equal to those under the materialised bias; and a forbidden reference gets none from the tokens of others."""
    model, given, layout, _ = flux1()
    bias = separation_bias(layout, MASKS)

    def materialised(query: Any, key: Any, value: Any, **_: Any) -> Any:
        return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias).softmax(-1) @ value

    with attention_replaced(materialised):
        run(model, given)[:, :6].square().mean().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    with separate_subjects(model, layout, MASKS):
        run(model, given)[:, :6].square().mean().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_nothing_of_the_other_reference_reaches_a_token_in_one_block() -> None:
    """With one block, person A's tokens do not depend on B's reference at all: the derivative is exactly 0."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    _, given, layout, _ = flux1()
    given["hidden_states"] = given["hidden_states"].requires_grad_()
    with separate_subjects(model, layout, MASKS):
        output = run(model, given)
    (grad,) = torch.autograd.grad(output[:, :3].square().sum(), given["hidden_states"])
    assert grad[:, 10:].abs().max() == 0 and grad[:, 6:10].abs().max() > 0


def test_routing_by_the_models_own_attention() -> None:
    """Every image token looks at one reference only, and at the one that it preferred in that block."""
    model, given, layout, _ = flux1()
    with (
        torch.no_grad(),
        separate_subjects(model, layout, attention_owners),
        capture_subject_attention(
            model, layout, direction="image_to_reference", blocks=lambda _: True, keep_blocks=True
        ) as captured,
    ):
        run(model, given)
    for maps in captured.blocks.values():
        assert bool(((maps > 0).sum(1) == 1).all())
    with (
        torch.no_grad(),
        capture_subject_attention(
            model, layout, direction="image_to_reference", blocks=lambda _: True, keep_blocks=True
        ) as free,
    ):
        run(model, given)
    name = next(iter(free.blocks))  # both see the same input in the first block
    assert torch.equal(free.blocks[name].argmax(1), captured.blocks[name].argmax(1))


def test_autocast() -> None:
    model, given, layout, _ = flux1()
    with torch.no_grad(), separate_subjects(model, layout, MASKS):
        want = run(model, given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(model, given)
    assert torch.allclose(got.float(), want, atol=0.1)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9),
    reason="torch.compile of watched blocks needs torch 2.9: older ones break the graph at the attention call",
)
def test_compiled_blocks() -> None:
    """No graph break, and the values of eager mode, for masks that come later too."""
    torch._dynamo.reset()
    model, given, layout, _ = flux1()
    with torch.no_grad():
        with separate_subjects(model, layout, MASKS):
            want = run(model, given)
        plain = run(model, given)
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:  # type: ignore[union-attr]
            block.compile(backend="aot_eager", fullgraph=True)
        with separate_subjects(model, layout, MASKS) as separation:
            got = run(model, given)
            separation.masks = MASKS.flip(1)
            run(model, given)
            separation.masks = None
            assert torch.allclose(run(model, given), plain, atol=1e-5)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_model_is_restored_after_an_error() -> None:
    model, given, layout, _ = flux1()
    with torch.no_grad():
        want = run(model, given)
        with pytest.raises(RuntimeError, match="on purpose"), separate_subjects(model, layout, MASKS):
            raise RuntimeError("on purpose")
        assert torch.equal(run(model, given), want)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"masks": torch.ones(2, 2, 5)}, "masks"),
        ({"masks": MASKS, "strength": 2.0}, "strength"),
        ({"masks": MASKS, "background": "red"}, "background"),
        ({"masks": MASKS, "arrows": ("up",)}, "arrows"),
        ({"masks": MASKS, "backend": "magic"}, "backend"),
        ({"masks": MASKS, "heads": []}, "heads"),
        ({"masks": MASKS, "blocks": ["no.such.attn"]}, "blocks"),
    ],
)
def test_refusals_come_before_the_first_pass(options: dict[str, Any], word: str) -> None:
    model, _, layout, _ = flux1()
    with pytest.raises(ValueError, match=word), separate_subjects(model, layout, **options):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layout_longer_than_the_sequence_is_said() -> None:
    model, given, _, _ = flux1()
    layout = SubjectLayout.in_order(5, 6, [4, 20])
    with pytest.raises(ValueError, match="holds the layout's 35 tokens"), separate_subjects(model, layout, MASKS):
        run(model, given)
