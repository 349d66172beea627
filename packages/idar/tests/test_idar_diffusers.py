from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss
from idar.capture import stack_blocks
from idar.integrations.diffusers import capture_subject_attention

LAYOUT = SubjectLayout.in_order(5, 16, [4, 4])
DIRECTIONS = ["reference_to_image", "image_to_reference"]


def tiny_flux(seed: int = 0, num_layers: int = 2) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=num_layers, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
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
        (output.square().mean() + idar_loss(maps, masks(), kind="dice").loss).backward()
    return (
        output.detach(),
        maps.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_outputs_are_bit_equal_and_the_model_is_restored(direction: str) -> None:
    model = tiny_flux()
    before, state = model.attn_processors, {name: dict(m.__dict__) for name, m in model.named_modules()}
    plain = model(**inputs(), return_dict=False)[0]
    output, maps, _ = run(model, direction)
    assert torch.equal(output, plain)
    assert maps.shape == (2, 2, 16)
    with pytest.raises(RuntimeError, match="boom"), capture_subject_attention(model, LAYOUT):
        raise RuntimeError("boom")
    with pytest.raises(RuntimeError), capture_subject_attention(model, LAYOUT):
        model(**{**inputs(), "encoder_hidden_states": torch.zeros(2, 5, 3)})  # fails inside the model
    assert all(model.attn_processors[n] is before[n] for n in before)
    for name, module in model.named_modules():
        assert dict(module.__dict__).keys() == state[name].keys()
        assert not module._forward_pre_hooks
    assert torch.equal(model(**inputs(), return_dict=False)[0], plain)


def test_gradients_of_the_outputs_are_bit_equal() -> None:
    grads = []
    for capture in (False, True):
        model = tiny_flux()
        context = capture_subject_attention(model, LAYOUT) if capture else nullcontext()
        with context:
            model(**inputs(), return_dict=False)[0].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


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


@pytest.mark.parametrize("keep_blocks", [False, True])
def test_a_block_that_runs_again_in_the_backward_counts_once(keep_blocks: bool) -> None:
    model = tiny_flux().train()
    model.enable_gradient_checkpointing()
    with capture_subject_attention(model, LAYOUT, keep_blocks=keep_blocks) as captured:
        output = model(**inputs(), return_dict=False)[0]
        before = captured.maps.detach().clone()
        (output.square().mean() + captured.maps.square().sum()).backward()
        torch.testing.assert_close(captured.maps.detach(), before)


def test_single_blocks_can_be_chosen_and_wrong_layouts_are_named() -> None:
    model = tiny_flux()
    _, maps, _ = run(model, "reference_to_image", blocks=lambda n: "single" in n)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2))
    run_layout = SubjectLayout.in_order(5, 16, [4, 400])
    with pytest.raises(ValueError, match="layout"), capture_subject_attention(model, run_layout):
        model(**inputs())
    for wrong in (torch.nn.Linear(2, 2), tiny_flux(num_layers=0)):
        with pytest.raises(ValueError, match="double-stream"), capture_subject_attention(wrong, LAYOUT):
            pass
    with pytest.raises(ValueError, match="blocks"), capture_subject_attention(model, LAYOUT, blocks=["nowhere.attn"]):
        pass
    with (
        pytest.raises(ValueError, match="direction"),
        capture_subject_attention(model, LAYOUT, direction="up"),  # type: ignore[arg-type]
    ):
        pass


def test_autocast_keeps_maps_in_fp32_and_their_gradient() -> None:
    plain = run(tiny_flux(), "image_to_reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(tiny_flux(), "image_to_reference")
    assert cast[1].dtype == torch.float32
    torch.testing.assert_close(cast[1], plain[1], atol=2e-3, rtol=0.02)
    name = "transformer_blocks.0.attn.to_k.weight"
    assert torch.cosine_similarity(cast[2][name].flatten(), plain[2][name].flatten(), dim=0) > 0.99


def test_both_directions_at_once_and_pass_after_pass() -> None:
    """Nested contexts do not disturb each other; a pass forgets the one before; a running sum is all that is kept."""
    model = tiny_flux().requires_grad_(False)
    alone = {d: run(tiny_flux(), d)[1] for d in DIRECTIONS}
    with (
        capture_subject_attention(model, LAYOUT, direction="reference_to_image") as looks,
        capture_subject_attention(model, LAYOUT, direction="image_to_reference", keep_blocks=True) as takes,
    ):
        for _ in range(2):
            model(**inputs())
            torch.testing.assert_close(looks.maps, alone["reference_to_image"])
            torch.testing.assert_close(takes.maps, alone["image_to_reference"])
    assert looks.blocks == {}
    assert list(takes.blocks) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    torch.testing.assert_close(stack_blocks(takes).mean(0), takes.maps)
    with pytest.raises(ValueError, match="keep_blocks"):
        stack_blocks(looks)


def test_the_estimator_draws_once_a_pass_and_again_for_the_next() -> None:
    model = tiny_flux().requires_grad_(False)
    with capture_subject_attention(
        model,
        LAYOUT,
        direction="reference_to_image",
        num_samples=2,
        generator=torch.Generator().manual_seed(0),
        keep_blocks=True,
    ) as captured:
        passes = []
        for _ in range(100):
            model(**inputs())
            passes.append(captured.maps)
    found = torch.stack(passes)
    exact = run(tiny_flux(), "reference_to_image")[1]
    assert found.std(0).max() > 1e-5
    assert ((found.mean(0) - exact).abs() / (found.std(0) / 10 + 1e-9)).max() < 5


def test_checkpointed_estimates_use_the_same_subset_again() -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_flux().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        results.append(run(model, "reference_to_image", num_samples=2, generator=torch.Generator().manual_seed(1)))
    for name in results[0][2]:
        torch.testing.assert_close(results[1][2][name], results[0][2][name], atol=1e-6, rtol=1e-4)


def test_reentrant_checkpointing_is_refused() -> None:
    from torch.utils.checkpoint import checkpoint

    model = tiny_flux().train()
    model.enable_gradient_checkpointing(lambda f, *a: checkpoint(f.__call__, *a, use_reentrant=True))
    given = {**inputs(), "hidden_states": inputs()["hidden_states"].requires_grad_()}
    with capture_subject_attention(model, LAYOUT) as captured:
        output = model(**given, return_dict=False)[0]
        loss = output.square().mean() + captured.maps.sum()
        with pytest.raises(ValueError, match="non-reentrant"):
            loss.backward()


def test_memory_kept_for_the_backward_does_not_grow_with_blocks() -> None:
    """Autograd keeps the same storages with and without, but for the maps themselves."""
    extra = []
    for layers in (2, 6):
        kept: list[set[tuple[int, int]]] = []
        for capture in (False, True):
            model, found = tiny_flux(num_layers=layers), {}

            def pack(t: torch.Tensor, found: dict[int, torch.UntypedStorage] = found) -> torch.Tensor:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage()
                return t

            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
                capture_subject_attention(model, LAYOUT, direction="reference_to_image") if capture else nullcontext(),
            ):
                model(**inputs(), return_dict=False)
                kept.append(sum(storage.nbytes() for storage in found.values()))
        extra.append(kept[1] - kept[0])
    assert extra[1] <= extra[0] <= 8 * 8  # the positions of the queries, once


def test_no_pass_yet_and_queries_that_are_not_finite_are_named() -> None:
    model = tiny_flux()
    with capture_subject_attention(model, LAYOUT) as captured:
        with pytest.raises(ValueError, match="forward pass"):
            _ = captured.maps
        bad = inputs()
        bad["hidden_states"][0, 3, 0] = torch.nan
        model(**bad)
        with pytest.raises(ValueError, match="finite"):
            idar_loss(captured.maps, masks())


def test_other_attention_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", lambda q, k, v, **_: v)
    model = tiny_flux()
    with pytest.raises(ValueError, match="native"), capture_subject_attention(model, LAYOUT):
        model(**inputs())


def test_processors_that_hold_parameters_and_extra_arguments_still_work() -> None:
    """An IP-Adapter's processor is a module with arguments of its own: capture neither moves nor starves it."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny_flux()
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32, num_tokens=(2,)))
    given = {**inputs(), "joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 2, 32)]}}
    plain, names = model(**given, return_dict=False)[0], list(model.state_dict())
    with capture_subject_attention(model, LAYOUT, direction="reference_to_image") as captured:
        assert torch.equal(model(**given, return_dict=False)[0], plain)
        assert list(model.state_dict()) == names
    torch.testing.assert_close(captured.maps.sum(-1), torch.ones(2, 2))
