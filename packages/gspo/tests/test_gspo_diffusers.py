"""FLUX, SD3 and Qwen-Image pipelines with tiny, randomly initialised parts, against the pipelines' own sampling."""

from __future__ import annotations

import pytest
import torch
from gspo import FlowODE, FlowSDE, PolicyConfig, PolicyTrainer, group_advantages, rescore, rollout
from gspo.integrations.diffusers import PipelinePolicy

diffusers = pytest.importorskip("diffusers", reason="needs gspo[diffusers]")
transformers = pytest.importorskip("transformers", reason="needs gspo[diffusers]")
PROMPTS = ["a red fox in the snow", "blue", "a bird"]


def tokenizer(length: int) -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", *sorted({w for p in PROMPTS for w in p.split()})]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>", model_max_length=length
    )


def clip(cls: type) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, eos_token_id=1,
    )  # fmt: skip
    return cls(config)


def t5() -> torch.nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def vae(channels: int) -> torch.nn.Module:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, shift_factor=0.1,
        scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def scheduler(**options: object) -> object:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flux() -> tuple[object, dict]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler(use_dynamic_shifting=True), vae(4), clip(transformers.CLIPTextModel), tokenizer(16), t5(), tokenizer(8),
        transformer,
    )  # fmt: skip
    return pipe, {"height": 16, "width": 16, "guidance_scale": 2.0, "max_sequence_length": 8}


def sd3() -> tuple[object, dict]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    with_projection = transformers.CLIPTextModelWithProjection
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, scheduler(shift=3.0), vae(4), clip(with_projection), tokenizer(16), clip(with_projection), tokenizer(16),
        t5(), tokenizer(8),
    )  # fmt: skip
    return pipe, {"height": 16, "width": 16, "guidance_scale": 3.0, "negative_prompt": "blue", "max_sequence_length": 8}


def qwen() -> tuple[object, dict]:
    if not hasattr(diffusers, "QwenImagePipeline"):
        pytest.skip("needs diffusers>=0.35")
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    decoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip
    text = transformers.Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        scheduler(use_dynamic_shifting=True), decoder, transformers.Qwen2ForCausalLM(text), tokenizer(256), transformer
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "red red {}", 2
    return pipe, {"height": 16, "width": 16, "true_cfg_scale": 2.0, "negative_prompt": "blue"}


@pytest.fixture(params=[flux, sd3, qwen], ids=["flux", "sd3", "qwen"])
def made(request: pytest.FixtureRequest) -> tuple[object, dict]:
    torch.manual_seed(0)
    pipe, call = request.param()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 drops out in training
    # heads that start at zero would make every velocity zero
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return pipe, call


def test_deterministic_steps_and_decoding_are_the_pipelines_own(made: tuple) -> None:
    pipe, call = made
    policy = PipelinePolicy(pipe, PROMPTS, **call)
    noise = policy.noise(torch.Generator().manual_seed(1))
    sigmas = policy.sigmas(3)
    assert sigmas.shape == (4,) and sigmas[-1] == 0 and bool((sigmas[1:] < sigmas[:-1]).all())
    options = {**call, "negative_prompt": [call["negative_prompt"]] * 3} if "negative_prompt" in call else call
    own = pipe(PROMPTS, num_inference_steps=3, generator=torch.Generator().manual_seed(1), output_type="pt", **options)
    x = noise
    with torch.no_grad():
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x = FlowODE().step(x, policy(x, torch.full((3,), a), torch.arange(3)), a, b).next_latents
    pictures = policy.decode(x, torch.arange(3), output_type="pt")
    torch.testing.assert_close(pictures, own.images, atol=1e-4, rtol=1e-4)
    assert pictures.std() > 0.01


def test_rollout_and_update(made: tuple) -> None:
    pytest.importorskip("peft", reason="needs gspo[diffusers]")
    from peft import LoraConfig

    pipe, call = made
    before = dict(vars(pipe))
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    policy = PipelinePolicy(pipe, PROMPTS, **call)
    drawn = rollout(
        policy, policy.noise(), policy.sigmas(4), kernel=FlowSDE(), window=(1, 2), group_size=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert drawn.num_function_evaluations == 3 * 1 + 6 * 3
    with torch.no_grad():
        again = rescore(policy, drawn, FlowSDE())
        with policy.reference():
            base = rescore(policy, drawn, FlowSDE())
    assert torch.equal(again.log_prob_mean, drawn.log_prob_mean)
    assert not torch.equal(base.log_prob_mean, drawn.log_prob_mean)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    trainer = PolicyTrainer(trained, torch.optim.SGD(trained, lr=1.0), PolicyConfig(kl_coef=0.1))
    rewards = policy.decode(drawn.latents, drawn.index, output_type="pt").flatten(1).mean(1)
    statistics = trainer.update(
        policy, drawn, group_advantages(rewards, drawn.index), FlowSDE(), reference=policy.reference
    )
    assert not statistics.skipped and statistics.grad_norm > 0 and statistics.kl > 0
    after = {k: v for k, v in vars(pipe).items() if k not in ("_joint_attention_kwargs",)}
    assert "encode_prompt" not in after and all(after[k] is v for k, v in before.items() if not k.startswith("_"))


def test_rows_follow_their_prompt(made: tuple) -> None:
    pipe, call = made
    policy = PipelinePolicy(pipe, PROMPTS, **call)
    x, sigma = policy.noise(torch.Generator().manual_seed(0)), torch.full((3,), 0.7)
    with torch.no_grad():
        straight = policy(x, sigma, torch.arange(3))
        turned = policy(x.flip(0), sigma, torch.tensor([2, 1, 0]))
        other = policy(x, sigma, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(turned.flip(0), straight, atol=1e-5, rtol=1e-4)
    assert (other[0] - straight[0]).abs().max() > 1e-4


def test_wrong_arguments_are_named(made: tuple) -> None:
    pipe, call = made
    for options, word in (
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a"], "nonsense": 1}, "nonsense"),
        ({"prompts": ["a"], "latents": 1}, "latents"),
        ({"prompts": ["a"], "per_prompt": {"negative_prompt": ["x", "y"]}}, "negative_prompt"),
    ):
        with pytest.raises(ValueError, match=word):
            PipelinePolicy(pipe, **options)
    policy = PipelinePolicy(pipe, PROMPTS, **call)
    with pytest.raises(ValueError, match="num_steps"):
        policy.sigmas(0)
    with pytest.raises(ValueError, match="sigma"):
        policy(policy.noise(), torch.tensor([0.5, 0.4, 0.5]), torch.arange(3))
    with pytest.raises(ValueError, match="adapter"), policy.reference():
        pass
