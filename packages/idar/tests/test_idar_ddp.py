"""Two processes (gloo): gradients of maps and outputs are the mean of what each process would find alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs idar[diffusers]")

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from idar import SubjectLayout, idar_loss
from idar.integrations.diffusers import capture_subject_attention

def built():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )

def given(rank):
    g = torch.Generator().manual_seed(10 + rank)
    return dict(
        hidden_states=torch.randn(1, 24, 8, generator=g), encoder_hidden_states=torch.randn(1, 5, 12, generator=g),
        pooled_projections=torch.randn(1, 12, generator=g), timestep=torch.rand(1, generator=g),
        img_ids=torch.arange(72).reshape(24, 3).float() % 5, txt_ids=torch.zeros(5, 3),
    )

def step(model, rank):
    masks = torch.zeros(1, 2, 16)
    masks[:, 0, :8], masks[:, 1, 8:] = 1, 1
    layout = SubjectLayout.in_order(5, 16, [4, 4])
    with capture_subject_attention(model, layout, direction="image_to_reference") as captured:
        output = model(**given(rank), return_dict=False)[0]
        loss = output.square().mean() + idar_loss(captured.maps, masks, kind="share_cross_entropy").loss
        loss.backward()

if __name__ == "__main__":
    checkpointing = sys.argv[2] == "1"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = built().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        step(wrapped, rank)
    torch.save({n: p.grad for n, p in model.named_parameters()}, f"{sys.argv[1]}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow  # two minutes beside other tests; multicrafter's runs in two processes hold the same
def test_gradients_are_the_mean_over_processes(tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    for checkpointing in ("0", "1"):
        out = tmp_path / checkpointing
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        done = subprocess.run(
            [*command, str(out), checkpointing], capture_output=True, text=True, check=False, timeout=300
        )
        assert {p.name for p in out.iterdir()} == {"0.pt", "1.pt"}, (
            done.stderr
        )  # ranks may abort at exit after finishing
        found = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
        scope: dict = {"__name__": "alone"}
        exec(SCRIPT, scope)
        alone = []
        for rank in range(2):
            model = scope["built"]()
            scope["step"](model, rank)
            alone.append({n: p.grad for n, p in model.named_parameters()})
        for name in alone[0]:
            want = alone[0][name] if alone[0][name] is None else (alone[0][name] + alone[1][name]) / 2
            for rank in range(2):
                torch.testing.assert_close(found[rank][name], want, atol=1e-6, rtol=1e-4)
