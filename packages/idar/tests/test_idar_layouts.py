"""A layout that is not that of the pass is refused in one sentence, by capture and separation alike; the right ones are read off the pass."""

from __future__ import annotations

from collections.abc import Callable
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
from idar import SubjectLayout, capture_attention, separate_attention
from idar.integrations.diffusers import (
    capture_subject_attention,
    flux_kv_layout,
    flux_layout,
    qwen_layout,
    sd3_layout,
    separate_subjects,
)

Built = tuple[torch.nn.Module, dict[str, Any]]


def flux() -> Built:
    """Text 5, image 6, references 4 and 2, numbered on the first axis."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 12, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cat([torch.full((n, 3), float(g)) for g, n in enumerate((6, 4, 2))]),
        "txt_ids": torch.zeros(5, 3),
    }


def qwen() -> Built:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=8, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 12, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 3), (1, 2, 2), (1, 2, 1)]],
    }


def sd3() -> Built:
    """A canvas of 6 rows and 2 columns: 3 rows of picture, references of 2 rows and 1."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 6, 2),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([500.0]),
    }


RIGHT: dict[Callable[[], Built], Callable[[torch.nn.Module], Any]] = {
    flux: lambda _: flux_layout,
    qwen: lambda _: qwen_layout,
    sd3: lambda model: sd3_layout(model, [2, 1]),
}
EXPECTED = {
    flux: SubjectLayout.in_order(5, 6, [4, 2]),
    qwen: SubjectLayout.in_order(5, 6, [4, 2]),
    sd3: SubjectLayout.in_order(5, 6, [4, 2], text="last"),
}
WRONG = {
    "text at the other end": {
        flux: SubjectLayout.in_order(5, 6, [4, 2], text="last"),
        sd3: SubjectLayout.in_order(5, 6, [4, 2]),
    },
    "one text token too many": {m: SubjectLayout.in_order(6, 6, [4, 2]) for m in (flux, qwen)},
    "a reference too few": {m: SubjectLayout.in_order(5, 6, [4]) for m in (flux, qwen)},
    "a picture too small": {
        flux: SubjectLayout.in_order(5, 5, [4, 2]),
        sd3: SubjectLayout.in_order(5, 4, [4, 2], text="last"),
    },
    "edges that moved": {m: SubjectLayout.in_order(5, 4, [6, 2]) for m in (flux, qwen)},
    "spans without a length, at the wrong end": {
        flux: SubjectLayout(num_text=5, image_span=(0, 6), subject_spans=((6, 10), (10, 12)))
    },
}
CASES = [(what, build, layout) for what, cases in WRONG.items() for build, layout in cases.items()]


def entered(what: str, model: torch.nn.Module, layout: Any) -> Any:
    if what == "capture":
        return capture_subject_attention(model, layout, blocks=lambda _: True)
    return separate_subjects(model, layout, None)


@pytest.mark.parametrize("use", ["capture", "separate"])
@pytest.mark.parametrize(("what", "build", "layout"), CASES, ids=[f"{w}-{b.__name__}" for w, b, _ in CASES])
def test_a_wrong_layout_is_refused(use: str, what: str, build: Callable[[], Built], layout: SubjectLayout) -> None:
    model, given = build()
    with torch.no_grad(), pytest.raises(ValueError, match="layout must") as caught, entered(use, model, layout):
        model(**given)
    assert "\n" not in str(caught.value)
    model(**given)  # restored


@pytest.mark.parametrize("use", ["capture", "separate"])
@pytest.mark.parametrize("build", RIGHT)
def test_the_right_layout_is_read_off_the_pass(use: str, build: Callable[[], Built]) -> None:
    model, given = build()
    with torch.no_grad(), entered(use, model, RIGHT[build](model)) as state:
        model(**given)
    assert state.layout == EXPECTED[build]
    assert state.layout.length == 17
    with torch.no_grad(), entered(use, model, EXPECTED[build]):
        model(**given)


@pytest.mark.parametrize(("function", "build"), [(flux_layout, sd3), (flux_layout, qwen), (qwen_layout, flux)])
def test_a_layout_function_of_another_model_is_named(function: Any, build: Callable[[], Built]) -> None:
    model, given = build()
    with pytest.raises(ValueError, match=f"{function.__name__} must be given"), entered("capture", model, function):
        model(**given)


def test_arguments_by_position_are_known_by_name() -> None:
    model, given = flux()
    want = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids"]
    with torch.no_grad(), entered("capture", model, flux_layout) as captured:
        model(*(given[name] for name in want))
    assert captured.layout == EXPECTED[flux]
    with pytest.raises(ValueError, match="layout must"), entered("separate", model, SubjectLayout.in_order(5, 7, [4])):
        model(*(given[name] for name in want))


def test_wrapped_models_are_known() -> None:
    """As DDP and `torch.compile` wrap them: the class inside says where the text is, and how noise levels are counted."""

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model, given = sd3()
    seen: list[torch.Tensor] = []
    masks = torch.ones(1, 2, 6)
    wrapped = Wrapped(model)
    with (
        torch.no_grad(),
        separate_subjects(wrapped, EXPECTED[sd3], masks, strength=lambda s: seen.append(s) or s * 0),  # type: ignore[func-returns-value]
    ):
        wrapped(**given)
    torch.testing.assert_close(seen[0], torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"5 of text \(last\)"), entered("capture", wrapped, EXPECTED[flux]):
        wrapped(**given)


def test_hooks_that_add_references_later_are_heard() -> None:
    """The layout is that of the attention that takes place, not of what the forward was given before other hooks changed it."""
    model, given = flux()
    extra, given["hidden_states"] = given["hidden_states"][:, 6:], given["hidden_states"][:, :6]
    with torch.no_grad(), entered("capture", model, EXPECTED[flux]) as captured:
        hook = model.register_forward_pre_hook(
            lambda m, a, k: (a, {**k, "hidden_states": torch.cat([k["hidden_states"], extra], 1)}), with_kwargs=True
        )
        model(**given)
        hook.remove()
    assert captured.maps.shape == (1, 2, 6)


def test_any_models_sequence_has_the_length_of_its_layout() -> None:
    """Models that nobody knows: the attention call itself says how long the sequence is."""

    class Joint(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    model, x = torch.nn.Sequential(Joint()), torch.randn(1, 2, 17, 4)
    masks = torch.ones(1, 2, 5)
    wrong = SubjectLayout.in_order(5, 5, [4, 2])
    for context in (
        capture_attention(model, {"joint": model[0]}, wrong),
        separate_attention(model, {"joint": model[0]}, wrong, masks),
    ):
        with pytest.raises(ValueError, match="17 tokens of the attention, got one of 16 tokens"), context:
            model(x)
    loose = SubjectLayout(num_text=5, image_span=(5, 10), subject_spans=wrong.subject_spans)
    with capture_attention(model, {"joint": model[0]}, loose) as captured:  # says nothing about what follows
        model(x)
    assert captured.maps.shape == (1, 2, 5)
    with pytest.raises(ValueError, match="length"):
        SubjectLayout(num_text=5, image_span=(5, 10), subject_spans=((10, 12),), length=11)


def test_canvases_of_sd3_that_do_not_fit() -> None:
    model, given = sd3()
    for rows in ([], [0], [2, -1]):
        with pytest.raises(ValueError, match="reference_rows"):
            sd3_layout(model, rows)
    with pytest.raises(ValueError, match="leave rows to the picture"):
        sd3_layout(model, [4, 2])(given)


def kv() -> tuple[torch.nn.Module, dict[str, Any]]:
    """FLUX.2-klein-KV: [text 5 | references 4 and 2 | image 6]."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    model.single_transformer_blocks[0].attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    ids = [[t, y, x, 0] for t, w in ((10, 2), (20, 1), (0, 3)) for y in range(2) for x in range(w)]
    return model, {
        "hidden_states": torch.randn(1, 12, 8),
        "encoder_hidden_states": torch.randn(1, 5, 12),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.ones(1),
        "img_ids": torch.tensor(ids),
        "txt_ids": torch.tensor([[0, 0, 0, i] for i in range(5)]),
    }


def test_the_layout_outlives_references_that_come_from_a_cache() -> None:
    model, given = kv()
    later = {**given, "hidden_states": given["hidden_states"][:, 6:], "img_ids": given["img_ids"][6:]}
    with torch.no_grad(), entered("capture", model, flux_kv_layout()) as captured:
        _, cache = model(**given, kv_cache_mode="extract", num_ref_tokens=6, return_dict=False)
        first = captured.layout
        model(**later, kv_cache=cache, kv_cache_mode="cached")
    assert first == captured.layout == SubjectLayout(num_text=5, image_span=(11, 17), subject_spans=((5, 9), (9, 11)))
    with pytest.raises(ValueError, match="fills the cache"), entered("capture", model, flux_kv_layout()):
        model(**later, kv_cache=cache, kv_cache_mode="cached")


def test_references_that_attend_to_themselves_are_kept_apart_too() -> None:
    """Their call is a short one of its own: what is kept of reference A must not depend on reference B."""
    model, given = kv()
    masks = torch.tensor([[[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]])
    other = {**given, "hidden_states": given["hidden_states"].clone()}
    other["hidden_states"][:, 4:6] += 1.0  # reference B

    def kept(inputs: dict[str, Any], separated: bool) -> torch.Tensor:
        with torch.no_grad(), separate_subjects(model, flux_kv_layout(), masks if separated else None):
            cache = model(**inputs, kv_cache_mode="extract", num_ref_tokens=6, return_dict=False)[1]
        return cache.get_single(0).get()[0][:, :4]  # keys of reference A in the block after the first

    assert torch.equal(kept(given, True), kept(other, True))
    assert not torch.allclose(kept(given, False), kept(other, False), atol=1e-5)
