"""What a ``trl.GRPOConfig`` says, in gspo's terms: every field is mapped, handed back to the loop, or refused; none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gspo.checks import check_real, check_seed
from gspo.inputs import one_by_one
from gspo.step import PolicyConfig

RATIOS = {"sequence": "sequence", "sequence_token": "sequence", "token": "step"}
SCALES = {"group": "group", "batch": "global", "none": "none", "True": "group", "False": "none"}


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


MAPPED = _names(
    "importance_sampling_level epsilon epsilon_high beta num_iterations max_grad_norm per_device_train_batch_size num_generations "
    "scale_rewards loss_type reward_weights multi_objective_aggregation learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "seed gradient_accumulation_steps steps_per_generation generation_batch_size use_bias_correction_kl"
)
"""Fields that decide something in what `from_grpo_config` returns."""

NO_TOKENS = "it is about text, and a flow has no tokens"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "delta": ((None,), "there is no second upper bound; give epsilon_high"),
    "label_smoothing_factor": ((0.0,), NO_TOKENS),
    "neftune_noise_alpha": ((None,), "it disturbs token embeddings"),
    "use_liger_kernel": ((False,), "that kernel computes the loss on logits"),
    "liger_kernel_config": ((None,), "that kernel computes the loss on logits"),
    "router_aux_loss_coef": ((None, 0.0), "add such a loss through the policy's own backward"),
    "cast_lm_head_to_fp32": ((False,), NO_TOKENS),
    "max_completion_length": ((None, 256, 512), NO_TOKENS),
    "pad_to_multiple_of": ((None, "auto"), NO_TOKENS),
    "temperature": ((1.0,), "the spread of the draws is the kernel's noise_level"),
    "top_p": ((1.0,), NO_TOKENS),
    "top_k": ((None, 0), NO_TOKENS),
    "min_p": ((None,), NO_TOKENS),
    "generation_kwargs": ((None, {}), NO_TOKENS),
    "chat_template_kwargs": ((None, {}), NO_TOKENS),
    "repetition_penalty": ((1.0,), NO_TOKENS),
    "cache_implementation": ((None,), NO_TOKENS),
    "use_vllm": ((False,), "gspo draws by its own rollout"),
    "use_transformers_continuous_batching": ((False,), "gspo draws by its own rollout"),
    "use_transformers_paged": ((False,), "gspo draws by its own rollout"),
    "max_tool_calling_iterations": ((None,), NO_TOKENS),
    "mask_truncated_completions": ((False,), "no trajectory is truncated"),
    "sync_ref_model": ((False,), "the reference is what your context manager makes it: move it there"),
    "top_entropy_quantile": ((1.0,), "no step is left out by its entropy, which the kernel fixes"),
    "entropy_coef": ((0.0,), "the entropy of a step is the kernel's, not the policy's"),
    "use_adaptive_entropy": ((False,), "the entropy of a step is the kernel's, not the policy's"),
    "per_gpu_train_batch_size": ((None,), "give per_device_train_batch_size"),
    "off_policy_mask_threshold": ((None,), "for masks by divergence there is gspo.FlowDPPO"),
}
"""Fields that ask for what gspo does not do: the values that do not ask for it, and what there is instead."""

INERT = {
    **dict.fromkeys(
        _names(
            "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host "
            "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
            "vllm_tensor_parallel_size vllm_importance_sampling_correction vllm_importance_sampling_mode "
            "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap"
        ),
        "use_vllm",
    ),
    **dict.fromkeys(
        _names("sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"),
        "loss_type",
    ),
    **dict.fromkeys(_names("ref_model_mixup_alpha ref_model_sync_steps"), "sync_ref_model"),
    **dict.fromkeys(
        _names("entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"), "use_adaptive_entropy"
    ),
    "transformers_continuous_batching_config": "use_transformers_continuous_batching",
}
"""Fields that mean nothing unless another, which is refused, is switched on."""

LOOP = _names(
    # length and schedule
    "num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules "
    # model, precision, memory
    "model_init_kwargs trust_remote_code disable_dropout bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend "
    "torch_compile_mode use_cache torch_empty_cache_steps auto_find_batch_size "
    # logs
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo debug skip_memory_metrics "
    # evaluation
    "eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics do_eval do_predict num_generations_eval "
    # checkpoints
    "output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token "
    "hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model "
    "greater_is_better ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint "
    # data
    "shuffle_dataset data_seed dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names "
    "train_sampling_strategy length_column_name "
    # where it runs
    "full_determinism use_cpu accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed do_train local_rank average_tokens_across_devices "
    "ds3_gather_for_generation "
    # what only transformers 4 has
    "adafactor fp16_backend fp16_opt_level fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap group_by_length half_precision_backend "
    "include_inputs_for_metrics include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index "
    "per_gpu_eval_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope save_safetensors torchdynamo "
    "tpu_metrics_debug tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device warmup_ratio"
)
"""Fields that a loop, a data loader or a launcher honours, and no policy update."""


class GRPOSettings(NamedTuple):
    """What a ``trl.GRPOConfig`` says.

    Attributes:
        online: Keyword arguments of `gspo.OnlineConfig`, all but window and kernel, which TRL does not know.
        optimizer: Keyword arguments of ``torch.optim.AdamW``.
        num_prompts: Rows of noise a step, over all ranks; None where the configuration gives no batch size.
        loop: The fields that are the loop's business (length, logs, checkpoints, precision), with their values: honour them there.
    """

    online: dict[str, Any]
    optimizer: dict[str, Any]
    num_prompts: int | None
    loop: dict[str, Any]


def translate(config: Any, reward_names: Sequence[str]) -> GRPOSettings:
    """See `gspo.integrations.trl.from_grpo_config`."""
    fields = _fields(config)
    for name in ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"):
        if name in fields and fields[name] is None:
            raise ValueError(f"{name} must be a number, got None")
        check_real(name, fields.get(name), least=0.0)
    for name in ("num_generations", "generation_batch_size", "gradient_accumulation_steps", "steps_per_generation"):
        value = fields.get(name)
        optional = value is None and name in ("generation_batch_size", "steps_per_generation")
        least = 2 if name == "num_generations" else 1
        if name in fields and not optional and (type(value) is not int or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    for name, value in fields.items():
        if name in REFUSED:
            neutral, why = REFUSED[name]
            if not any(value == ok for ok in neutral) and not _is_default(config, name):
                raise ValueError(f"{name} must be {' or '.join(map(repr, neutral))} ({why}), got {value!r}")
        elif name not in MAPPED and name not in INERT and name not in LOOP and not _is_default(config, name):
            raise ValueError(f"{name} must be left out (gspo does not know what it means), got {value!r}")
    return GRPOSettings(
        online=_online(fields, one_by_one("reward_names", reward_names)),
        optimizer={
            "lr": fields.get("learning_rate", 1e-6),
            "betas": (fields.get("adam_beta1", 0.9), fields.get("adam_beta2", 0.999)),
            "eps": fields.get("adam_epsilon", 1e-8),
            "weight_decay": fields.get("weight_decay", 0.0),
        },
        num_prompts=_num_prompts(fields),
        loop={name: value for name, value in fields.items() if name in LOOP},
    )


def _fields(config: Any) -> dict[str, Any]:
    """Names and values of what the configuration says."""
    if isinstance(config, type) or not (isinstance(config, Mapping) or hasattr(config, "__dict__")):
        raise ValueError(f"config must be a trl.GRPOConfig, or its fields in a dictionary, got {config!r}"[:300])
    if isinstance(config, Mapping):
        return {str(name): value for name, value in config.items()}
    if dataclasses.is_dataclass(config):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.name.startswith("_")}
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _is_default(config: Any, name: str) -> bool:
    """Whether a dataclass's field has the value that it has if nobody asks for anything."""
    if not dataclasses.is_dataclass(config):
        return False
    (field,) = [f for f in dataclasses.fields(config) if f.name == name]
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return bool(getattr(config, name) == default)


def _choice(fields: dict[str, Any], name: str, default: Any, choices: Mapping[str, str], why: str = "") -> str:
    value = str(fields.get(name, default))
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}{why}, got {fields[name]!r}")
    return choices[value]


def _online(fields: dict[str, Any], reward_names: list[str]) -> dict[str, Any]:
    """Keyword arguments of `gspo.OnlineConfig`."""
    same = " (the same where all trajectories are equally long)"
    _choice(fields, "loss_type", "dapo", {name: name for name in ("grpo", "dapo", "bnpo")}, same)
    aggregations = {"sum_then_normalize": "sum_then_normalize"}
    why = " (GDPO whitens the batch too: call gspo.gdpo_advantages and PolicyTrainer.update)"
    aggregation = _choice(fields, "multi_objective_aggregation", "sum_then_normalize", aggregations, why)
    low, high, beta = fields.get("epsilon", 0.2), fields.get("epsilon_high"), fields.get("beta", 0.0)
    if beta and fields.get("use_bias_correction_kl", False):
        raise ValueError(
            "use_bias_correction_kl must be False with beta > 0 (the KL here is exact, not an estimate to correct), got True"
        )
    weights = fields.get("reward_weights")
    for weight in one_by_one("reward_weights", weights) if weights is not None else ():
        check_real("reward_weights", weight)
    check_seed(fields.get("seed", 42))
    if weights is not None and len(weights) != len(reward_names):
        raise ValueError(f"reward_names must name the rewards of reward_weights {weights}, got {reward_names}")
    policy = PolicyConfig(
        ratio=_choice(fields, "importance_sampling_level", "token", RATIOS),  # type: ignore[arg-type]
        clip_range=low if high is None or high == low else (low, high),
        kl_coef=beta,
        num_inner_epochs=fields.get("num_iterations", 1),
        max_grad_norm=fields.get("max_grad_norm", 1.0),
        micro_batch_size=fields.get("per_device_train_batch_size", 8),
    )
    return {
        "group_size": fields.get("num_generations", 8),
        "advantage_scale": _choice(fields, "scale_rewards", "group", SCALES),
        "advantage_ddof": 1,
        "reward_weights": {} if weights is None else dict(zip(reward_names, weights, strict=True)),
        "reward_aggregation": aggregation,
        "policy": policy,
        "seed": fields.get("seed", 42),
    }


def _num_prompts(fields: dict[str, Any]) -> int | None:
    """Groups a step; one optimizer step per batch and inner epoch is what gspo takes."""
    generation, accumulation = fields.get("steps_per_generation"), fields.get("gradient_accumulation_steps", 1)
    if generation is not None and generation != accumulation:
        raise ValueError(
            f"steps_per_generation must equal gradient_accumulation_steps (a rollout is one optimizer step an inner epoch), got {generation} "
            f"and {accumulation}"
        )
    batch, group = fields.get("generation_batch_size"), fields.get("num_generations", 8)
    if batch is not None and batch % group:
        raise ValueError(f"generation_batch_size must be a multiple of num_generations {group}, got {batch}")
    return None if batch is None else batch // group
