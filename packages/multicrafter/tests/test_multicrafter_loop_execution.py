"""Precision and memory: what changes rounding only, what stays fp32, what is saved."""

from __future__ import annotations

import sys

import multicrafter_workers as workers
import pytest
import torch
from gspo import rescore, rollout, sequence_importance_ratio
from multicrafter.models.adapters import Adapters
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import (
    ExecutionConfig,
    make_optimizer,
    offload_groups,
    quantize,
    set_attention_backend,
)
from multicrafter.training.pretrain import IDARConfig, Noised
from multicrafter.training.trainee import optimizer_tensors, restore_optimizer


def trained(stage, steps=3):
    metrics = [stage.step(i) for i in range(steps)]
    return {n: p.detach().clone() for n, p in stage.adapters.named_parameters()}, metrics


def test_bf16_keeps_adapters_and_optimizer_in_fp32_and_learns_the_same():
    want, exact = trained(workers.make_stage(1))
    stage = workers.make_stage(1, execution={"dtype": "bfloat16"})
    got, rough = trained(stage)
    frozen = [p for p in stage.transformer.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen if p.dim() == 2} == {torch.bfloat16}
    assert {p.dtype for p in stage.adapters.parameters()} == {torch.float32}
    states = optimizer_tensors(stage.optimizer)
    assert {t.dtype for k, t in states.items() if k.endswith(("exp_avg", "exp_avg_sq"))} == {torch.float32}
    assert rough[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.03)
    assert all(torch.isfinite(t).all() for t in got.values()) and want.keys() == got.keys()


def test_bf16_scores_in_fp32_and_its_ratio_is_one_before_the_first_update():
    stage = workers.make_stage(2)
    rough = workers.make_stage(2, execution={"dtype": "bfloat16"})
    rough.adapters.transformer.to(torch.bfloat16)
    for parameter in rough.adapters.parameters():
        parameter.data = parameter.data.float()
    rows = torch.tensor([0, 5, 7, 2])
    online, noise = rough.online, torch.randn(4, *rough.scenes.tokens.shape[1:], generator=rough.generator)
    with torch.no_grad():
        drawn = rollout(
            rough.velocity(rows), noise, rough.sigmas, kernel=online.kernel, window=online.window.at(0),
            group_size=4, generator=rough.generator,
        )  # fmt: skip
    assert drawn.latents.dtype == drawn.log_prob_mean.dtype == torch.float32
    with torch.no_grad():
        again = rescore(rough.velocity(rows), drawn, online.kernel)
        exact = rescore(stage.velocity(rows), drawn, online.kernel)
    assert torch.equal(sequence_importance_ratio(again.log_prob_mean, drawn.log_prob_mean), torch.ones(16))
    assert torch.allclose(exact.log_prob_mean, drawn.log_prob_mean, atol=1e-2)


@pytest.mark.parametrize("number", [1, 2])
def test_gradient_checkpointing_changes_no_adapter(number):
    want, _ = trained(workers.make_stage(number))
    got, _ = trained(workers.make_stage(number, execution={"gradient_checkpointing": True}))
    for name in want:
        assert torch.allclose(want[name], got[name], atol=1e-6), name


@pytest.mark.slow  # compiles
def test_compiled_blocks_train_the_same_adapter():
    want, _ = trained(workers.make_stage(1))
    compiled = workers.make_stage(1, execution={"compile_blocks": True})
    block = compiled.transformer.transformer_blocks[0]
    assert block._compiled_call_impl is not None
    got, _ = trained(compiled)
    for name in want:
        assert torch.allclose(want[name], got[name], atol=1e-5), name


def saved_for_backward(stage):
    """Bytes of activations that the forward keeps for the backward; weights are there anyway."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in stage.transformer.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    scenes, rows = stage.buckets.buckets[0], torch.arange(8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        text = stage.text([scenes.captions[r] for r in range(8)])
        noise = torch.randn(8, *scenes.tokens.shape[1:])
        batch = Noised(scenes, rows, noise, torch.full((8,), 0.5), text)
        stage.objective._losses(batch, stage.objective._pass(batch, watched=False), None)
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less():
    plain, less = (
        saved_for_backward(
            workers.make_stage(1, execution={"gradient_checkpointing": on}, changes={"idar": IDARConfig(coef=0.0)})
        )
        for on in (False, True)
    )
    assert less < 0.7 * plain


def test_micro_batches_add_up():
    """Without router losses, which belong to a micro-batch, the gradient is that of the whole batch."""
    from dataclasses import replace

    changes = {"adapters": replace(workers.SMALL, num_experts=0), "batch": 7}
    want, a = trained(workers.make_stage(1, changes=changes))
    got, b = trained(workers.make_stage(1, execution={"micro_batch": 3}, changes=changes))
    assert a[-1]["loss"] == pytest.approx(b[-1]["loss"], abs=1e-6)
    for name in want:
        assert torch.allclose(want[name], got[name], atol=1e-6), name


def test_the_moving_average_is_one(tmp_path):
    stage = workers.make_stage(1, execution={"ema_decay": 0.5})
    name, parameter = next((n, p) for n, p in stage.adapters.named_parameters() if "lora_B" in n)
    expected = parameter.detach().clone()
    for index in range(3):
        stage.step(index)
        expected = 0.5 * expected + 0.5 * parameter.detach()
    assert torch.allclose(stage.trainee.ema[name], expected, atol=1e-7)
    stage.trainee.save(tmp_path, num_references=2)
    fresh = workers.small_pipe()
    loaded, _ = Adapters.load(fresh.transformer, tmp_path / "adapter_ema")
    assert torch.equal(dict(loaded.named_parameters())[name], stage.trainee.ema[name])
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    ("kind", "module", "error"), [("int8", "torchao", 0.02), ("fp8", "torchao", 0.1), ("nf4", "bitsandbytes", 0.25)]
)
def test_a_quantised_base_still_trains_adapters(kind, module, error):
    pytest.importorskip(module, reason="needs multicrafter[quantize]")
    pipe = workers.small_pipe()
    stage = workers.make_stage(1, execution={"quantization": kind})
    weight = stage.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype == torch.uint8
    got, metrics = trained(stage)
    want, exact = trained(workers.make_stage(1))
    assert metrics[0]["loss"] == pytest.approx(exact[0]["loss"], rel=error)
    assert all(metrics[i]["skipped"] == 0 for i in range(3))
    before = dict(Adapters(pipe.transformer, workers.SMALL).named_parameters())
    assert want.keys() == got.keys()
    assert all(not torch.equal(got[n], before[n]) for n in got if "router" not in n)


def test_the_8_bit_optimizer_learns_and_survives_the_disk():
    pytest.importorskip("bitsandbytes", reason="needs multicrafter[quantize]")
    config = ExecutionConfig(optimizer="adamw8bit")

    def make():
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(8192))
        return parameter, make_optimizer([parameter], config, lr=1e-2, adamw=AdamWConfig(betas=(0.9, 0.99)))

    def steps(parameter, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()

    parameter, optimizer = make()
    start = parameter.square().sum().item()
    steps(parameter, optimizer, 4)
    assert parameter.square().sum().item() < start
    assert (
        sum(t.numel() * t.element_size() for k, t in optimizer_tensors(optimizer).items() if "state" in k) == 2 * 8192
    )
    kept, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer_tensors(optimizer).items()}
    steps(parameter, optimizer, 3)
    other, fresh = make()
    with torch.no_grad():
        other.copy_(kept)
    restore_optimizer(fresh, state)
    steps(other, fresh, 3)
    assert torch.equal(other, parameter)


def test_groups_of_blocks_come_and_go_and_the_picture_stays(pipe, scenes):
    from multicrafter.models.backbones import backbone_of

    def picture():
        with torch.no_grad():
            text = backbone_of(pipe).encode_prompts(pipe, scenes.captions[:2])
            return backbone_of(pipe).velocity(
                pipe.transformer, scenes.tokens[:2], torch.full((2,), 0.5), text, **scenes.context(slice(0, 2))
            )

    Adapters(pipe.transformer, workers.SMALL)
    want = picture()
    offload_groups(pipe.transformer, "cpu")
    assert torch.equal(picture(), want)
    assert any("group" in name for name in pipe.transformer.transformer_blocks[0]._diffusers_hook.hooks)


def test_attention_backends(pipe, scenes):
    set_attention_backend(pipe.transformer, "native")
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend is not None
    with pytest.raises(ValueError, match="attention_backend must be one that diffusers has"):
        set_attention_backend(pipe.transformer, "telepathy")


def test_missing_packages_name_their_pip_line(monkeypatch, pipe):
    for module in ("torchao", "torchao.quantization", "bitsandbytes", "bitsandbytes.nn", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    for kind in ("int8", "nf4"):
        with pytest.raises(ImportError, match=r"pip install 'multicrafter\[quantize\]'"):
            quantize(pipe.transformer, kind)
    with pytest.raises(ImportError, match="pip install"):
        make_optimizer(
            [torch.nn.Parameter(torch.ones(1))], ExecutionConfig(optimizer="adamw8bit"), lr=1.0, adamw=AdamWConfig()
        )


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "float16"}, {"quantization": "int3"}, {"micro_batch": 0}, {"ema_decay": 1.0}, {"parallel": "pipeline"},
     {"optimizer": "sgd"}, {"quantization": "nf4", "parallel": "fsdp"}],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        ExecutionConfig(**wrong)
