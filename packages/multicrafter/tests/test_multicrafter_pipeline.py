"""Inference on every backbone: batches, seeds, callbacks, guidance, LoRAs of others."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from multicrafter.models.backbones import backbone_of
from multicrafter.models.binding import BindingConfig
from multicrafter.pipeline import MultiCrafterPipeline, own_shape
from multicrafter.world.tiny_backbones import tiny_flux1, tiny_klein, tiny_qwen, tiny_qwen21
from multicrafter_tiny import BLUE, CONFIG, GREEN, RED, filled, latents, with_adapter
from PIL import Image


@pytest.fixture
def flux():
    return filled(tiny_flux1(CONFIG, guidance_embeds=True))


@pytest.fixture
def klein():
    return filled(tiny_klein())


@pytest.fixture
def qwen():
    pipe = filled(tiny_qwen())
    pipe.default_sample_size = 16  # 64 pixels
    return pipe


@pytest.fixture
def qwen21():
    return filled(tiny_qwen21())


@pytest.mark.parametrize("kind", ["flux", "klein", "kv", "qwen", "qwen21"])
def test_a_batch_gives_what_its_prompts_give_alone(kind, request):
    """Unequal numbers of references too, each prompt with its own seed, two pictures each."""
    pipe = filled(tiny_klein(kv=True)) if kind == "kv" else request.getfixturevalue(kind)
    pipeline = with_adapter(pipe)
    prompts, references, seeds = ["one person", "two people", "one dog"], [[RED, BLUE], [GREEN], [BLUE, RED]], [3, 4, 5]
    together = latents(pipeline, prompts, references, seed=seeds, num_images=2).unflatten(0, (3, 2))
    for i in range(3):
        alone = latents(pipeline, prompts[i], references[i], seed=seeds[i], num_images=2)
        assert torch.allclose(together[i], alone, atol=2e-4)
        assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    shared = latents(pipeline, ["one person"] * 2, [RED], seed=7)
    assert torch.allclose(shared[0], shared[1], atol=2e-4), "one seed and one list of references serve all prompts"


def test_nothing_is_padded(klein):
    lengths = []
    klein.transformer.x_embedder.register_forward_hook(lambda _m, i, _o: lengths.append(tuple(i[0].shape[:2])))
    latents(MultiCrafterPipeline(klein), ["a", "b", "c"], [[RED], [RED, BLUE], [BLUE]], num_steps=1, true_guidance=1.0)
    assert lengths == [(2, 64 + 16), (1, 64 + 32)]


WIDE, TALL, SQUARE = (
    Image.fromarray(np.random.default_rng(k).integers(0, 255, (h, w, 3), np.uint8))
    for k, (h, w) in enumerate([(32, 64), (90, 45), (48, 48)])
)


@pytest.mark.parametrize("kind", ["flux", "klein", "kv", "qwen"])
def test_references_keep_their_own_shapes(kind, request):
    """As many tokens as the shape has, in its places; prompts of other shapes run apart and give what they give alone; squares are as before."""
    assert [own_shape(*p.size, (4, 4)) for p in (WIDE, TALL, SQUARE)] == [(3, 6), (6, 3), (4, 4)]  # rows, columns
    pipe = filled(tiny_klein(kv=True)) if kind == "kv" else request.getfixturevalue(kind)
    pipeline, calls = with_adapter(pipe), []
    hook = pipe.transformer.register_forward_hook(lambda _m, _a, k, _o: calls.append(k), with_kwargs=True)
    options = {"true_guidance": 1.0, "num_steps": 1, "reference_shape": "own"}
    prompts, references = ["one", "two", "three"], [[WIDE, TALL], [TALL, WIDE], [SQUARE, WIDE]]
    together = latents(pipeline, prompts, references, **options)
    sizes = [k["hidden_states"].shape[1] for k in calls]
    assert sorted(sizes) == sorted([64 + 18 + 18, 64 + 18 + 18, 64 + 16 + 18])  # 3 x 6 and 6 x 3 tokens, 4 x 4
    hook.remove()
    for i in range(3):
        alone = latents(pipeline, prompts[i], references[i], **options)
        assert torch.allclose(together[i], alone[0], atol=2e-4)
    plain = latents(pipeline, "one", [SQUARE, SQUARE], true_guidance=1.0)
    assert torch.equal(plain, latents(pipeline, "one", [SQUARE, SQUARE], true_guidance=1.0, reference_shape="own"))
    assert not torch.allclose(plain, latents(pipeline, "one", [SQUARE, WIDE], true_guidance=1.0), atol=1e-3)


@pytest.mark.parametrize("kind", ["kv", "qwen21"])
@pytest.mark.parametrize(
    "separation",
    [
        {"mode": "draft", "draft_steps": 2},
        {"mode": "in-flight", "bind_at": 0.9},
        {"mode": "masks", "sigmas": (0.4, 1.0)},
    ],
)
def test_kept_references_are_those_of_the_separation(kind, separation, request):
    """A draft's references look at each other, those of the picture do not: with and without keeping them the same picture."""
    pipeline = with_adapter(filled(tiny_klein(kv=True)) if kind == "kv" else request.getfixturevalue(kind))
    masks = None
    if separation["mode"] == "masks":
        masks = [torch.zeros(64, 64), torch.zeros(64, 64)]
        masks[0][:, :32], masks[1][:, 32:] = 1, 1
    options = {"separation": BindingConfig(**separation), "num_steps": 4, "masks": masks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept, anew = (latents(pipeline, "two", [RED, BLUE], cache_references=c, **options) for c in (True, False))
    assert torch.allclose(kept, anew, atol=2e-4)


def test_sides_that_no_grid_of_qwen_21_has_are_refused(qwen21):
    pipeline = with_adapter(qwen21)
    with pytest.raises(ValueError, match="size must be a positive multiple of 32 pixels, got 48"):
        latents(pipeline, "one", [RED], size=(64, 48))
    assert own_shape(300, 100, (4, 4), 2) == (2, 6)
    drawn = pipeline("one", [WIDE, TALL], size=(64, 96), reference_shape="own", num_steps=1, output_type="pt")
    assert drawn[0].shape == (3, 64, 96)


@pytest.mark.parametrize("kind", ["flux", "klein", "qwen", "qwen21"])
def test_one_person_may_have_several_references(kind, request):
    """Two references of the first person, one of the second: two places in the picture, two masks, and one span for both references."""
    pipeline = with_adapter(request.getfixturevalue(kind))
    references, options = [WIDE, TALL, SQUARE], {"reference_shape": "own", "true_guidance": 1.0}
    plain = latents(pipeline, "one", references, **options)
    with pytest.warns(UserWarning, match="2 references of one subject, but the adapter was trained with 1 of each"):
        grouped = latents(pipeline, "one", references, references_per_subject=[2, 1], **options)
    pipeline.notes["references_per_subject"] = 2
    assert torch.equal(plain, grouped), "without separation only the number of subjects differs"
    masks = [torch.zeros(64, 64), torch.zeros(64, 64)]
    masks[0][:, :32], masks[1][:, 32:] = 1, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = latents(
            pipeline, "one", references, references_per_subject=[2, 1], separation="masks", masks=masks, **options
        )
    assert pipeline.bindings[0].masks.shape[1] == 2
    assert not torch.allclose(bound, plain, atol=1e-4)
    three = latents(
        pipeline, "one", references, separation="masks", masks=[masks[0], masks[0] * 0, masks[1]], **options
    )
    assert not torch.allclose(bound, three, atol=1e-4), "the second reference is looked at by the first person's tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents(pipeline, "one", references, references_per_subject=[2, 1], separation="draft", **options)
    assert pipeline.bindings[0].places.boxes.shape[1] == 2
    with pytest.raises(ValueError, match=r"one per reference \(one per subject"):
        latents(pipeline, "one", references, references_per_subject=[2, 1], separation="masks", masks=[masks[0]] * 3)
    with pytest.raises(ValueError, match=r"references_per_subject must add up .* \[3\], got \[2, 2\]"):
        latents(pipeline, "one", references, references_per_subject=[2, 2])
    with pytest.raises(ValueError, match="reference_shape must be 'square' or 'own', got 'round'"):
        latents(pipeline, "one", references, reference_shape="round")


def test_true_guidance_is_the_formula(flux):
    pipeline, backbone = MultiCrafterPipeline(flux), backbone_of(flux)
    options = {"num_steps": 1, "guidance": 2.0}
    noise = torch.randn((1, 64, 32), generator=torch.Generator().manual_seed(0))
    positive = latents(pipeline, "one person", [RED], **options)
    negative = latents(pipeline, "night", [RED], **options)
    guided = latents(pipeline, "one person", [RED], negative_prompt="night", true_guidance=3.0, **options)
    velocity = (noise - negative) + 3.0 * (
        (noise - positive) - (noise - negative)
    )  # one step: latents = noise - velocity
    assert torch.allclose(guided, noise - velocity, atol=1e-4)
    assert backbone.default_true_guidance == 1
    assert not torch.allclose(positive, latents(pipeline, "one person", [RED], num_steps=1, guidance=5.0), atol=1e-4)


def test_qwen_is_guided_as_in_diffusers_and_reads_its_references(qwen):
    """A second pass by default, whose result keeps each token's length; the prompt is encoded with the references."""
    pipeline, noise = MultiCrafterPipeline(qwen), torch.randn((1, 64, 16), generator=torch.Generator().manual_seed(0))
    positive, negative = (
        noise - latents(pipeline, text, [RED], num_steps=1, true_guidance=1.0) for text in ("one person", "night")
    )
    guided = noise - latents(pipeline, "one person", [RED], negative_prompt="night", num_steps=1)
    combined = negative + 4.0 * (positive - negative)
    assert torch.allclose(
        guided, combined * positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True), atol=1e-3
    )
    assert pipeline.num_steps == 40
    seen = []
    hook = qwen.transformer.register_forward_hook(
        lambda _m, _a, k, _o: seen.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    for reference in (RED, BLUE):
        latents(pipeline, "one person", [reference], num_steps=1, true_guidance=1.0)
    hook.remove()
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


def test_a_distilled_model_has_no_true_guidance(klein):
    assert torch.allclose(
        latents(MultiCrafterPipeline(klein), "x", [RED]),
        latents(MultiCrafterPipeline(klein), "x", [RED], true_guidance=4.0),
    )
    distilled = MultiCrafterPipeline(filled(tiny_klein(distilled=True)))
    assert torch.allclose(latents(distilled, "x", [RED]), latents(distilled, "x", [RED], true_guidance=1.0))
    with pytest.raises(ValueError, match="distilled"):
        latents(distilled, "x", [RED], true_guidance=2.0)
    with pytest.raises(ValueError, match="cache_references must be off"):
        latents(distilled, "x", [RED], cache_references=True)


def test_callbacks_see_change_and_stop(klein):
    pipeline, seen = MultiCrafterPipeline(klein), []

    def look(owner, step, timestep, content):
        assert owner is pipeline
        seen.append((step, timestep, content["rows"]))
        return None

    plain = latents(pipeline, "x", [RED], num_steps=3, callback_on_step_end=look)
    assert torch.equal(plain, latents(pipeline, "x", [RED], num_steps=3))
    assert [s for s, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000
    assert all(a[1] > b[1] for a, b in zip(seen[:-1], seen[1:]))

    def zero(owner, step, timestep, content):
        return {"latents": torch.zeros_like(content["latents"])} if step == 2 else None

    assert latents(pipeline, "x", [RED], num_steps=3, callback_on_step_end=zero).abs().max() == 0

    def stop(owner, step, timestep, content):
        kept.append(content["latents"])
        owner.interrupt = step == 1

    kept: list[torch.Tensor] = []
    latents(pipeline, "x", [RED], num_steps=5, callback_on_step_end=stop)
    assert len(kept) == 2
    assert torch.equal(latents(pipeline, "x", [RED], num_steps=3), plain), "an interruption does not outlive its call"


def test_sizes(klein):
    pipeline = MultiCrafterPipeline(klein)
    assert pipeline("x", [RED], num_steps=1, size=(64, 96), reference_size=48)[0].size == (96, 64)
    for options, words in [
        ({"size": 60}, "size must be a positive multiple of 8"),
        ({"reference_size": 20}, "reference_size must be a positive multiple of 8"),
        ({"reference_size": 128}, "at most the picture's 64"),
        ({"size": 0}, "size must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipeline("x", [RED], num_steps=1, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", " "]}, "prompt"),
        ({"references": []}, "at least one"),
        ({"prompt": ["a", "b"], "references": [[RED]]}, "one list per prompt"),
        ({"prompt": ["a", "b"], "references": [[RED], []]}, "at least one"),
        ({"references": [RED, [RED]]}, "got both"),
        ({"prompt": ["a", "b"], "seed": [1]}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"output_type": "np"}, "output_type"),
    ],
)
def test_bad_calls_are_named(klein, change, words):
    with pytest.raises(ValueError, match=words):
        MultiCrafterPipeline(klein)(**{"prompt": "x", "references": [RED], "num_steps": 1, **change})


def lora_of(pipe, targets, *, seed=5):
    """A plain LoRA file's tensors, made by peft on another copy, in diffusers' layout."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), "made")
    state = get_peft_model_state_dict(pipe.transformer, adapter_name="made")
    return {f"transformer.{k}": v.clone() for k, v in state.items()}


def merged(pipe, state, weight):
    """The same update added to the weights: the slow twin."""
    parameters = dict(pipe.transformer.named_parameters())
    for key in [k for k in state if "lora_A" in k]:
        name = key.removeprefix("transformer.").replace(".lora_A", "").removesuffix(".weight")
        parameters[f"{name}.weight"].data += weight * state[key.replace("lora_A", "lora_B")] @ state[key]


@pytest.mark.parametrize("make", [lambda: tiny_flux1(CONFIG, guidance_embeds=True), tiny_klein], ids=["flux", "klein"])
def test_loras_of_others_mix_in(make, tmp_path):
    """FFN and attention layers, with our adapters before and after: equal to weights with the update merged in."""
    from safetensors.torch import save_file

    flux1 = "Flux2" not in type(make().transformer).__name__
    targets = ["to_k", "net.2", "proj_mlp"] if flux1 else ["to_k", "linear_out", "to_qkv_mlp_proj"]
    state = lora_of(filled(make()), targets)
    save_file(state, tmp_path / "style-v1.safetensors")
    twin = filled(make())
    merged(twin, state, 0.5)
    want, pipeline = latents(with_adapter(twin), "x", [RED]), with_adapter(filled(make()))
    before = latents(pipeline, "x", [RED])
    trained = {k: v.clone() for k, v in pipeline.adapters.state_dict().items()}
    assert pipeline.load_lora(tmp_path / "style-v1.safetensors", weight=0.5) == "style_v1"
    assert torch.allclose(latents(pipeline, "x", [RED]), want, atol=1e-4)
    assert not torch.allclose(before, want, atol=1e-2)
    assert pipeline.adapters.state_dict().keys() == trained.keys(), "the other LoRA is not taken for ours"
    assert all(torch.equal(v, trained[k]) for k, v in pipeline.adapters.state_dict().items())
    pipeline.set_loras({"style_v1": 0.0})
    assert torch.allclose(latents(pipeline, "x", [RED]), before, atol=1e-5)
    second = pipeline.load_lora(lora_of(filled(make()), ["to_q"], seed=6), name="second")
    assert pipeline.loras == {"style_v1": 0.0, second: 1.0}
    with pytest.raises(ValueError, match="must be new"):
        pipeline.load_lora(state, name="second")
    with pytest.raises(ValueError, match="must name loaded"):
        pipeline.set_loras({"third": 1.0})


def test_a_lora_that_does_not_fit_changes_nothing(klein, flux, tmp_path):
    pipeline = with_adapter(klein)
    before = latents(pipeline, "x", [RED])
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for source in (lora_of(flux, ["proj_mlp"]), tmp_path / "broken.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match="must fit flux2_klein"):
            pipeline.load_lora(source, name="other")
        assert pipeline.loras == {}
        assert torch.equal(latents(pipeline, "x", [RED]), before)


def test_half_precision_keeps_the_sampler_exact(klein):
    """The model in bfloat16, latents in float32; close to full precision, and finite."""
    want = latents(MultiCrafterPipeline(klein), "one person", [RED], num_steps=4, true_guidance=1.0)
    klein.to(torch.bfloat16)
    got = latents(with_adapter(klein), "one person", [RED], num_steps=4, true_guidance=1.0)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    plain = latents(
        MultiCrafterPipeline(filled(tiny_klein()).to(klein.transformer.dtype)),
        "one person",
        [RED],
        num_steps=4,
        true_guidance=1.0,
    )
    assert (plain - want).norm() / want.norm() < 0.05
