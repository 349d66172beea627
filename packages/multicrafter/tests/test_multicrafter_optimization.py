"""Learning rate, optimizer and noise levels are what the configuration says."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multicrafter import UserError
from multicrafter.training.align import AlignConfig
from multicrafter.training.loop import LoopConfig
from multicrafter.training.optimization import (
    AdamWConfig,
    ScheduleConfig,
    SigmaSamplingConfig,
    learning_rate,
    sample_sigma,
)
from multicrafter.training.precision import ExecutionConfig, make_optimizer
from multicrafter.training.pretrain import PretrainConfig
from multicrafter.training.runs import _check_resume


@given(st.integers(0, 99), st.sampled_from(["linear", "cosine", "constant"]), st.integers(0, 50))
def test_learning_rate_rises_then_falls_and_never_leaves_its_range(index, decay, warmup):
    config = ScheduleConfig(warmup_steps=warmup, decay=decay)
    now, then = (learning_rate(config, 2.0, i, 101) for i in (index, index + 1))
    assert 0 < now <= 2
    if index + 1 >= warmup:
        assert then <= now
    if decay == "constant":
        assert now == 2 * min(1, (index + 1) / warmup if warmup else 1)


def test_learning_rates_by_hand():
    cosine = ScheduleConfig(warmup_steps=0, decay="cosine")
    assert [learning_rate(cosine, 1.0, i, 4) for i in (0, 2)] == [1.0, pytest.approx(0.5)]
    assert learning_rate(ScheduleConfig(), 2e-3, 9, 100) == 2e-3 * 0.5 * 0.91


def test_defaults_are_what_the_golden_traces_were_trained_with():
    stage1, stage2 = PretrainConfig(), AlignConfig()
    assert stage1.schedule == ScheduleConfig(warmup_steps=20, decay="linear") and stage1.adamw.betas == (0.9, 0.98)
    assert stage2.schedule == ScheduleConfig(warmup_steps=5, decay="constant") and stage2.adamw.betas == (0.9, 0.99)
    assert (stage1.max_grad_norm, stage1.sigma_sampling) == (1.0, SigmaSamplingConfig())
    assert stage1.loop == LoopConfig(save_every=200, best="loss", best_is="lowest", picture_every=50)
    assert stage2.loop == LoopConfig(save_every=10, best="reward", best_is="highest", picture_every=10)


def test_the_optimizer_is_the_one_of_the_configuration():
    parameter = torch.nn.Parameter(torch.ones(3))
    adamw = AdamWConfig(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)
    group = make_optimizer([parameter], ExecutionConfig(), lr=0.1, adamw=adamw).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 1e-3, 0.2, 0.1)


def test_noise_levels_have_the_logits_of_the_configuration():
    config = SigmaSamplingConfig(mean=0.7, std=0.5, shift=3.0)
    sigma = sample_sigma(config, 20_000, torch.Generator().manual_seed(0)).double()
    logit = torch.logit(sigma)  # the shift adds its logarithm to the logit
    assert float(logit.mean()) == pytest.approx(0.7 + math.log(3), abs=0.02)
    assert float(logit.std()) == pytest.approx(0.5, abs=0.02)
    plain = sample_sigma(SigmaSamplingConfig(), 8, torch.Generator().manual_seed(1))
    assert torch.equal(plain, torch.sigmoid(torch.randn(8, generator=torch.Generator().manual_seed(1))))


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (AdamWConfig, {"betas": (0.9, 1.0)}),
        (AdamWConfig, {"eps": 0.0}),
        (AdamWConfig, {"weight_decay": math.nan}),
        (ScheduleConfig, {"warmup_steps": -1}),
        (ScheduleConfig, {"decay": "steps"}),
        (SigmaSamplingConfig, {"std": 0.0}),
        (SigmaSamplingConfig, {"shift": math.nan}),
        (SigmaSamplingConfig, {"mean": math.inf}),
        (PretrainConfig, {"max_grad_norm": math.nan}),
    ],
)
def test_wrong_knobs_are_refused(cls, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        cls(**wrong)


def test_a_run_of_before_goes_on_and_one_of_another_schedule_does_not(tmp_path):
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    run = PretrainConfig()
    written = {k: v for k, v in json.loads(json.dumps(asdict(run))).items() if k not in ("schedule", "adamw", "loop")}
    (tmp_path / "config.json").write_text(json.dumps(written))
    _check_resume(tmp_path, replace(run, loop=LoopConfig(save_every=3)), True)
    with pytest.raises(UserError, match=r"but schedule\.warmup_steps changed"):
        _check_resume(tmp_path, replace(run, schedule=ScheduleConfig(warmup_steps=3)), True)
