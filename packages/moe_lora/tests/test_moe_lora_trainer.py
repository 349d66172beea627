"""transformers' Trainer trains what a loop by hand trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_lora import MoELoRA, MoELoRAConfig, inject, inject_saved
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("accelerate", reason="needs the extra transformers (accelerate)")

from moe_lora.integrations.transformers import AuxLossMixin, MoELoRATrainer, mixtures_in  # noqa: E402

CONFIG = MoELoRAConfig(rank=2, alpha=4.0, num_experts=3, balance_coef=0.5, z_coef=0.25)
IDS = torch.randint(32, (12, 7), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config).requires_grad_(False)


class Regression(nn.Module):
    """Its forward takes no loss keywords, so the Trainer divides its loss for gradient accumulation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.head = nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 7)), nn.Linear(7, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.head(self.mlp(input_ids.float() / 32))
        return {"loss": (out - labels.float().mean(-1, keepdim=True) / 32).square().mean(), "logits": out}


def injected(model: nn.Module) -> MoELoRA:
    handle = inject(model, CONFIG, r"(.*\.)?mlp", generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return handle


# transformers 4 counts the first label, 5 does not
LABELS = torch.cat([torch.full((12, 1), -100), IDS[:, 1:]], 1)
DATA = [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS)]


def arguments(folder: Path, **changes: Any) -> Any:
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [],
        "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "seed": 0, "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**(options | changes))


class Ordered:
    """Takes the data in order, so that a loop by hand sees the same batches."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(DATA)


class InOrder(Ordered, MoELoRATrainer):
    pass


@pytest.mark.parametrize("make", [llama, Regression])
def test_the_trainer_takes_the_steps_of_a_loop_by_hand(tmp_path: Path, make: Any) -> None:
    model, twin = make().requires_grad_(False), make().requires_grad_(False)
    handle, theirs = injected(model), injected(twin)
    trainer = InOrder(model=model, args=arguments(tmp_path), train_dataset=DATA, mixtures=handle)
    trainer.train()
    optimizer, logged = torch.optim.SGD(theirs.parameters(), lr=0.1), []
    twin.train()
    for step in range(2):
        optimizer.zero_grad()
        for part in range(2):
            ids, labels = (t[6 * step + 3 * part :][:3] for t in (IDS, LABELS))
            # every row has as many tokens, so a mean over all is the mean of the means
            loss = twin(input_ids=ids, labels=labels)["loss"] / 2
            aux = theirs.aux_loss()
            logged.append(float(aux.detach()))
            (loss + aux / 2).backward()
        optimizer.step()
    moved = 0.0
    start = injected(make())
    for (name, got), want, before in zip(
        handle.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4, msg=name)
        moved += float((want - before).detach().abs().sum()) if "router" in name else 0.0
    assert moved > 1e-3
    seen = [entry["router_loss"] for entry in trainer.state.log_history if "router_loss" in entry]
    assert seen == pytest.approx([sum(logged[:2]) / 2, sum(logged[2:]) / 2], rel=1e-4)


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    handle = injected(model)
    trainer = MoELoRATrainer(model=model, args=arguments(tmp_path), eval_dataset=DATA, mixtures=handle)
    with torch.no_grad():
        want = float(model.eval()(input_ids=IDS, labels=LABELS).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)
    assert handle.aux_loss() == 0


def test_checkpoints_hold_the_adapter_and_training_goes_on_from_them(tmp_path: Path) -> None:
    straight, broken = llama(), llama()
    whole, parts = injected(straight), injected(broken)
    InOrder(model=straight, args=arguments(tmp_path / "a"), train_dataset=DATA, mixtures=whole).train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    InOrder(
        model=broken, args=arguments(tmp_path / "b", max_steps=1, **saving), train_dataset=DATA, mixtures=parts
    ).train()
    checkpoint = tmp_path / "b" / "checkpoint-1"
    assert {"moe_lora.json", "moe_lora.safetensors"} <= {p.name for p in checkpoint.iterdir()}
    assert not list(checkpoint.glob("model*"))
    again = llama()
    resumed = injected(again)
    InOrder(model=again, args=arguments(tmp_path / "b", **saving), train_dataset=DATA, mixtures=resumed).train(
        resume_from_checkpoint=str(checkpoint)
    )
    for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    loaded = llama()
    inject_saved(loaded, tmp_path / "b" / "checkpoint-2")
    assert torch.equal(loaded.eval()(IDS).logits, again.eval()(IDS).logits)


@pytest.mark.parametrize("best", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_adapter_of_peft_is_found_saved_and_resumed(tmp_path: Path, best: bool) -> None:
    peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    from moe_lora.integrations.peft import PeftMoELoRAConfig

    def made() -> Any:
        options = {"r": 2, "lora_alpha": 4, "num_experts": 3, "balance_coef": 0.5}
        config = PeftMoELoRAConfig(**options, target_modules=["q_proj", "mlp"], mixture_modules=["mlp"])
        torch.manual_seed(1)
        return peft.get_peft_model(llama(), config)

    saving = {"save_strategy": "steps", "save_steps": 1}
    if best:
        saving |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    model, twin = made(), made()
    data = {"train_dataset": DATA, "eval_dataset": DATA}
    trainer = InOrder(model=model, args=arguments(tmp_path / "a", **saving), **data)
    trainer.train()
    assert all("router_loss" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert (tmp_path / "a" / "checkpoint-1" / "adapter_model.safetensors").exists()
    again = InOrder(model=twin, args=arguments(tmp_path / "b", **saving), **data)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for got, want in zip(mixtures_in(twin).parameters(), mixtures_in(model).parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    base = peft.PeftModel.from_pretrained(llama(), tmp_path / "b" / "checkpoint-2")
    torch.testing.assert_close(base.eval()(IDS).logits, twin.eval()(IDS).logits)


def test_without_mixtures_or_with_a_trained_base_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixtures must be the handle.*LlamaForCausalLM has no active PEFT adapter"):
        MoELoRATrainer(model=llama(), args=arguments(tmp_path))
    model = Regression()
    handle = injected(model)
    with pytest.raises(ValueError, match=r"must train nothing but its mixtures.*'mlp\.base\.0\.weight'"):
        MoELoRATrainer(model=model, args=arguments(tmp_path), mixtures=handle)


def test_the_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Doubling(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            return (found[0] * 2, *found[1:]) if isinstance(found, tuple) else found * 2

    class Mine(AuxLossMixin, Doubling):
        pass

    model = llama()
    handle = injected(model)
    trainer = Mine(model=model, args=arguments(tmp_path), train_dataset=DATA, mixtures=handle)
    inputs = {"input_ids": IDS[:3], "labels": LABELS[:3]}
    model.train()
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        want = 2 * plain(**inputs).loss
    aux = loss - 2 * outputs["loss"]
    torch.testing.assert_close(2 * outputs["loss"], want)
    assert float(aux) == pytest.approx(float(trainer._router_losses[-1]), rel=1e-4)


def test_the_example_learns() -> None:
    pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    from moe_lora.examples.trainer import main

    lines: list[str] = []
    first, last = main(steps=12, report=lines.append)
    assert (
        last < 0.9 * first and any("router_loss" in line for line in lines) and any("expert" in line for line in lines)
    )
