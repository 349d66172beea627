"""A tiny language model learns two kinds of text with a mixture of LoRAs, under transformers' Trainer and PEFT. Seconds on a CPU.

    python -m moe_lora.examples.trainer

Nothing is downloaded: the model is random, the texts count upwards or downwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch

try:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
except ImportError as error:
    raise ImportError('this example needs peft and transformers: pip install "moe-lora[peft]" transformers') from error

from moe_lora.integrations.peft import PeftMoELoRAConfig
from moe_lora.integrations.transformers import MoELoRATrainer


def texts(count: int, length: int = 12, vocabulary: int = 32) -> list[dict[str, torch.Tensor]]:
    """Half of them count upwards, half downwards, each from another start."""
    start, way = torch.arange(count)[:, None], torch.tensor([1, -1]).repeat(count)[:count, None]
    ids = (start + way * torch.arange(length)) % vocabulary
    return [{"input_ids": row, "labels": row} for row in ids]


def main(steps: int = 60, report: Callable[[str], object] = print) -> tuple[float, float]:
    """Trains, reports the losses and the experts' loads, and returns the first and the last loss."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    adapter = PeftMoELoRAConfig(
        r=8,
        lora_alpha=64,
        num_experts=4,
        target_modules=["q_proj", "v_proj", "mlp", "lm_head"],
        mixture_modules=["mlp"],
    )
    model = get_peft_model(base, adapter)  # mixtures around the FFNs, ordinary LoRAs elsewhere
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=2e-2,
            logging_steps=max(steps // 6, 1), save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = MoELoRATrainer(model=model, args=arguments, train_dataset=texts(256))
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        report(f"step {entry['step']}: loss {float(entry['loss']):.2f}, router_loss {entry['router_loss']:.3f}")
    for name, statistics in trainer.mixtures.stats().items():
        report(f"{name}: share of the tokens per expert {[round(x, 2) for x in statistics.load.tolist()]}")
    return float(logs[0]["loss"]), float(logs[-1]["loss"])


if __name__ == "__main__":
    main()
