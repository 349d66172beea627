"""On a card: full-width slices in bf16, both stages, planned memory, quantised bases, the demo. Bodies run on the CPU as well, smaller.

``make test-gpu`` runs these wherever there is a card. Bounds were set before any card was at hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import multicrafter_workers as workers
import pytest
import torch
from multicrafter.cli import main
from multicrafter.config.recipes import get_recipe
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import backbone_of, get_backbone
from multicrafter.models.flux.model import Text
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.plan.estimate import measure
from multicrafter.plan.steps import PlannedPolicy, PlannedPretrain, Shape, build
from multicrafter.scoring.evaluate import EvaluateConfig, cases, draw_cases
from multicrafter.training.align import Align
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import ExecutionConfig, prepare_transformer
from multicrafter.training.pretrain import Pretrain, measure_leakage
from multicrafter.training.runs import with_execution
from multicrafter.training.scenes import encode_scenes
from multicrafter.training.trainee import Trainee
from multicrafter.world import WorldConfig
from multicrafter.world.tiny_backbones import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel

NO_CARD = "needs a CUDA device, and there is none here"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]
ON_CARD = pytest.param("cuda", marks=GPU)
SLICED = ["flux1_dev", "flux2_klein", "flux2_dev", "qwen_image_edit", "qwen_image_21"]
WORLD = WorldConfig(numbers=(2,), shared_attributes=4)


def sliced(name, *, full):
    """Configuration of one block of each kind, at full width or narrow."""
    config = {"num_layers": 1}
    if "num_single_layers" in get_backbone(name).full_config:
        config["num_single_layers"] = 1
    return config if full else {**config, "num_attention_heads": 2, get_backbone(name).text_width_name: 64}


def slice_step(name, device, dtype, *, full):
    """Velocity and gradients of all adapters of a slice: one pass of two rows with two references.

    The noise level, and 1000 times it, are numbers of bf16: diffusers' transformers round what they are told, and 0.6 would be another level.
    """
    backbone, generator = get_backbone(name), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    transformer = backbone.build_transformer(**sliced(name, full=full))
    execution = ExecutionConfig(dtype=dtype)
    prepare_transformer(transformer.to(device), execution)
    adapters = Adapters(transformer, AdapterConfig(rank=8, alpha=8.0, num_experts=2), backbone=backbone)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainee = Trainee(adapters, execution, lr=1e-4, adamw=AdamWConfig(), seed=0)
    side, small = ((32, 32), (20, 20)) if full else ((8, 8), (4, 4))
    config = transformer.config

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    tokens, target = (drawn(2, side[0] * side[1], config.in_channels) for _ in range(2))
    references = [drawn(2, small[0] * small[1], config.in_channels) for _ in range(2)]
    empty = backbone.empty_text(transformer, 2, 64)
    text = Text(drawn(*empty.embeds.shape), None if empty.pooled is None else drawn(*empty.pooled.shape))
    velocity = trainee.predict(
        tokens, torch.full((2,), 0.5, device=device), text, image_grid=side, references=references, reference_grids=[small] * 2
    )  # fmt: skip
    (velocity - target).square().mean().backward()
    gradients = {n: p.grad.flatten().float().cpu() for n, p in adapters.named_parameters() if "router" not in n}
    return velocity.detach().float().cpu(), torch.cat([gradients[n] for n in sorted(gradients)])


def bf16_follows_fp32(name, device, *, full):
    """Relative error of the velocity at most 2 %; cosine of the gradients at least .995, since a token at the border changes its expert.

    On the CPU they are .5 % and .9996. With its table of frequencies in bf16, Qwen-Image 2.1 had a cosine of .988.
    """
    want, want_gradient = slice_step(name, device, "float32", full=full)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        got, gradient = slice_step(name, device, "bfloat16", full=full)
    assert (got - want).norm() / want.norm() < 0.02
    assert torch.nn.functional.cosine_similarity(gradient, want_gradient, dim=0) > 0.995
    assert float(gradient.norm() / want_gradient.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize(("device", "full"), [pytest.param("cuda", True, marks=GPU), ("cpu", False)])
def test_a_slice_in_bf16_under_flash_attention_follows_float32(name, device, full):
    bf16_follows_fp32(name, device, full=full)


def stage_on(device, number, **execution):
    """The small stage of `multicrafter_workers`, on a device."""
    pipe = workers.small_pipe().to(device)
    scenes = encode_scenes(pipe, WORLD, 12, seed=3)
    assert scenes.tokens.device.type == "cpu", "all scenes wait in the machine's memory"
    if number == 1:
        return Pretrain(pipe, with_execution(workers.STAGE1, **execution), scenes)
    prepare_transformer(pipe.transformer, ExecutionConfig(**execution))
    adapters, generator = Adapters(pipe.transformer, workers.SMALL), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    return Align(pipe, adapters, with_execution(workers.STAGE2, **execution), scenes, workers.Brightness())


def ratio_is_one(device):
    stage = stage_on(device, 2, dtype="bfloat16")
    metrics = stage.step(0)
    assert metrics["skipped"] == 0 and metrics["initial_log_ratio"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("device", [ON_CARD, "cpu"])
def test_rollout_and_update_on_one_device_start_at_ratio_one_in_bf16(device):
    ratio_is_one(device)


def resumed(number, device):
    """Two steps on the CPU, then the third there and here: the same numbers to rounding."""
    here = stage_on("cpu", number)
    for index in range(2):
        here.step(index)
    state = {name: tensor.clone() for name, tensor in here.tensors().items()}
    there = stage_on(device, number)
    there.restore(state)
    want, got = here.step(2), there.step(2)
    for name in ("loss", "reward", "grad_norm"):
        if name in want:
            assert got[name] == pytest.approx(want[name], rel=2e-2, abs=1e-4), name
    moved = {n: p.detach().cpu() for n, p in there.adapters.named_parameters()}
    for name, parameter in here.adapters.named_parameters():
        assert torch.allclose(moved[name], parameter, atol=2e-3), name


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("device", [ON_CARD, "cpu"])
def test_a_checkpoint_of_the_cpu_goes_on_elsewhere(device, number):
    resumed(number, device)


def quantised_trains(device, kind, error):
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao", reason="needs multicrafter[quantize]")
    plain, stage = stage_on(device, 1), stage_on(device, 1, quantization=kind)
    want, got = plain.step(0), stage.step(0)
    assert got["loss"] == pytest.approx(want["loss"], rel=error)
    assert got["skipped"] == 0 and 0 < got["grad_norm"] < float("inf")


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.1), ("nf4", 0.25)])
@pytest.mark.parametrize("device", [ON_CARD, pytest.param("cpu", marks=pytest.mark.slow)])
def test_a_quantised_base_trains(device, kind, error):
    quantised_trains(device, kind, error)


def planned_and_measured(recipe, device, *, full):
    """Peak bytes of one row's pass: by the plan, and by the device's allocator (on the CPU by counting every tensor)."""
    run = get_recipe(recipe)
    if full:
        config = sliced(run.model.backbone, full=True)
        config = {name: 2 for name in config}  # two blocks of each kind
        shape = Shape(512, (32, 32), (20, 20), 2)
    else:
        config, shape = sliced(run.model.backbone, full=False), Shape(16, (4, 4), (2, 2), 2)
        field = "pretrain" if hasattr(run, "pretrain") else None
        small = replace(run.adapters, rank=4, alpha=4.0)
        run = replace(run, pretrain=replace(run.pretrain, adapters=small)) if field else replace(run, adapters=small)
    predicted = measure(run, rows=1, device=device, config=config, shape=shape).peak
    if device == "cpu":
        return predicted, measure(run, rows=1, device="cpu", fake=False, config=config, shape=shape).peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    transformer, attached = build(get_backbone(run.model.backbone), config, run.execution, run.adapters)
    transformer.to(device)
    stage = (
        PlannedPretrain(attached, run.pretrain, shape, rows=1)
        if hasattr(run, "pretrain")
        else PlannedPolicy(attached, run.execution, shape, rows=1, lr=run.align.lr, adamw=run.align.adamw)
    )
    stage.once()  # the libraries' own workspaces
    torch.cuda.reset_peak_memory_stats()
    stage.once()
    return predicted, torch.cuda.max_memory_allocated() - before


RECIPES = [
    "flux1_dev_stage1",
    "flux1_dev_stage2",
    "flux2_klein_stage1",
    "qwen_image_edit_stage1",
    "qwen_image_21_stage1",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("device", "full"), [pytest.param("cuda", True, marks=GPU), pytest.param("cpu", False, marks=pytest.mark.slow)]
)
def test_the_plan_is_within_ten_per_cent_of_the_allocator(recipe, device, full):
    predicted, measured = planned_and_measured(recipe, device, full=full)
    assert predicted == pytest.approx(measured, rel=0.1)


def draws_the_same(name, device):
    """The same latents as on the CPU, to rounding, guided and bound by attention alone."""
    found = []
    for where in ("cpu", device):
        pipe = TINY[name]()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        pipeline = MultiCrafterPipeline(pipe.to(where))
        references = list(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
        (latents,) = pipeline(
            "two people", references, size=64, reference_size=32, num_steps=2, output_type="latent", separation="draft"
        )
        found.append(latents.cpu())
    assert (found[0] - found[1]).abs().max() < 2e-2 * found[0].abs().max()


@pytest.mark.filterwarnings("ignore:prompt 0")
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("device", [ON_CARD, "cpu"])
def test_pictures_are_those_of_the_cpu(device, name):
    draws_the_same(name, device)


def looked_at(device):
    """Cases drawn and leakage measured: on the CPU in the end, as the judges want them, and the same."""
    found = []
    for where in ("cpu", device):
        pipe = workers.small_pipe().to(where)
        config = EvaluateConfig(num_cases=2, num_sampling_steps=2)
        scenes = cases(pipe, config)
        drawn = draw_cases(pipe, scenes, config)
        assert drawn.pictures.device.type == drawn.complete.device.type == "cpu"
        found.append((drawn.pictures, measure_leakage(pipe, scenes, direction="image_to_reference")))
    torch.testing.assert_close(found[0][1], found[1][1], atol=5e-3, rtol=5e-3)
    assert (found[0][0] - found[1][0]).abs().mean() < 5e-3


@pytest.mark.parametrize("device", [ON_CARD, "cpu"])
def test_evaluation_follows_the_model_to_its_device(device):
    looked_at(device)


def sharded(tmp_path, device, processes):
    """Stage 1 under torchrun with parameters sharded, against one process without: the losses of four steps."""
    losses = {}
    options = [
        "--row",
        "idar",
        "--steps",
        "4",
        "--batch",
        "4",
        "--scenes",
        "8",
        "--device",
        device,
        "--tracker",
        "none",
    ]
    for name, command, more in (
        ("one", [sys.executable], []),
        (
            "sharded",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)],
            ["fsdp"],
        ),
    ):
        sets = [x for parallel in more for x in ("--set", f"pretrain.execution.parallel={parallel}")]
        if processes > 1 and more:
            options = [o for o in options if o not in ("--device", device)]  # each process takes its own card
        out = tmp_path / name
        done = subprocess.run(
            [*command, "-m", "multicrafter", "pretrain", "--out", str(out), *options, *sets],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        losses[name] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses["sharded"] == pytest.approx(losses["one"], rel=2e-3)


@pytest.mark.parametrize(
    ("device", "processes"),
    [
        pytest.param("cuda", 1, marks=GPU),
        pytest.param(
            "cuda", 2, marks=[*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")]
        ),
        pytest.param("cpu", 1, marks=pytest.mark.slow),
    ],
)
def test_sharded_parameters_train_the_same(device, processes, tmp_path):
    sharded(tmp_path, device, processes)


@pytest.mark.parametrize("device", [ON_CARD])
def test_the_whole_demo_on_a_card(device, tmp_path):
    """Its twin on the CPU is ``tests/test_science.py`` and `multicrafter demo` itself."""
    words = ["demo", "--device", device, "--out", str(tmp_path), "--stage1-steps", "6", "--stage2-steps", "2"]
    assert main([*words, "--scenes", "64", "--cases", "4"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["summary"].keys() == {"baseline", "stage 1", "stage 2"}
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("device", [ON_CARD])
def test_check_real_counts_what_the_card_holds(device, tmp_path):
    """Its twin on the CPU is ``test_multicrafter_check_real.py``."""
    assert main(["check-real", "--device", device, "--out", str(tmp_path), "--set", "pretrain.adapters.rank=2"]) == 0
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert all(part["peak_bytes"] > 0 for part in parts)
    assert all(part["predicted_seconds"] > 0 for part in parts[3:])


def test_the_backbone_of_every_tiny_pipeline_is_tested_here():
    assert {backbone_of(TINY[name]()).name for name in TINY} == set(TINY)
