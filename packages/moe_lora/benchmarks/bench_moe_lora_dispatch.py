"""Forward and backward of the adapter alone; the named baseline is "lora", one LoRA of the same rank.

Recorded figures come from `study_moe_lora_speed.py`, which pairs the variants within rounds.
"""

from __future__ import annotations

import os

import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALayer
from moe_lora.layer import Mixture

FULL = os.environ.get("BENCH_SIZE") == "full"
TOKENS, WIDTH, RANK = (2336, 3072, 512) if FULL else (128, 64, 8)
ROUNDS = 7 if FULL else 2
VARIANTS = ["lora", "grouped-4", "grouped-32", "loop-4", "loop-32", "dense-4"]


class LoRA(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(WIDTH, RANK, bias=False), torch.nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, h):
        return self.b(self.a(h) * 1.5)


def adapter(variant):
    if variant == "lora":
        return LoRA()
    dispatch, experts = variant.split("-")
    made = Mixture(
        MoELoRAConfig(rank=RANK, alpha=1.5 * RANK, num_experts=int(experts), dispatch=dispatch), WIDTH, WIDTH
    )
    torch.nn.init.normal_(made.lora_b, 0, 0.02)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter(benchmark, variant):
    torch.manual_seed(0)
    module, h, grad = adapter(variant), torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)

    def fresh():
        h.grad = None
        module.zero_grad()

    benchmark.pedantic(lambda: module(h).backward(grad), setup=fresh, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("adapted", ["plain", "mixture"])
def test_ffn(benchmark, adapted):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH))
    base.requires_grad_(False)
    lora, h, grad = LoRA(), torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    layer = MoELoRALayer(base, MoELoRAConfig(rank=RANK, alpha=1.5 * RANK))

    def fresh():
        h.grad = None
        lora.zero_grad()
        layer.zero_grad()

    def step():
        (layer(h) if adapted == "mixture" else base(h) + lora(h)).backward(grad)

    benchmark.pedantic(step, setup=fresh, rounds=ROUNDS, warmup_rounds=1)
