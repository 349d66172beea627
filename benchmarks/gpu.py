"""What a card is worth to each part: timings and peak memory, each against a baseline of the same run; recorded with the card's name.

make bench-gpu                                     # full-width slices, into runs/bench/gpu.json
python -m benchmarks.gpu --device cpu --size smoke # narrow, to see that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import ROOT, circumstances

SIZES = {"smoke": {"rounds": 2, "tokens": 64, "rank": 8}, "full": {"rounds": 20, "tokens": 2336, "rank": 128}}


def measure(function: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Median and quartiles in milliseconds after one round to warm up, and the peak in bytes (0 where nobody counts)."""
    on_card = device.startswith("cuda")
    function()
    if on_card:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        if on_card:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4) if rounds > 1 else [times[0]] * 3
    peak = torch.cuda.max_memory_allocated() if on_card else 0
    return {"median_ms": statistics.median(times), "low_ms": low, "high_ms": high, "peak_bytes": float(peak)}


def experts(device: str, size: dict[str, int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward of four experts on every token: loops (the baseline), one grouped product."""
    from moe_lora import experts as apply

    width, rank = 24 * size["rank"], size["rank"]
    h, a, b = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((size["tokens"], width), (4, rank, width), (4, width, rank))
    )
    weight = torch.rand(size["tokens"], 1, device=device, dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(0, 4, (size["tokens"], 1), device=device)

    def step(dispatch: Any) -> None:
        apply(h, a, b, weight, index, dispatch).float().sum().backward()

    for dispatch in ("loop", "grouped", "dense"):
        yield dispatch, lambda dispatch=dispatch: step(dispatch)


def capture(device: str, size: dict[str, int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A pass of one slice of FLUX.1-dev in bf16: as it is (the baseline), captured, separated, compiled."""
    from idar import SubjectLayout
    from idar.integrations.diffusers import capture_subject_attention, separate_subjects
    from multicrafter.models.backbones import get_backbone

    backbone, full = get_backbone("flux1_dev"), size["tokens"] > 64
    grid, small = ((32, 32), (20, 20)) if full else ((4, 4), (2, 2))
    config = {"num_layers": 1, "num_single_layers": 1}
    config |= {} if full else {"num_attention_heads": 2, "joint_attention_dim": 64}
    model = backbone.build_transformer(**config).to(device, torch.bfloat16).requires_grad_(False)
    channels, image = model.config.in_channels, grid[0] * grid[1]
    tokens = torch.randn(1, image, channels, device=device, dtype=torch.bfloat16)
    references = [torch.randn(1, small[0] * small[1], channels, device=device, dtype=torch.bfloat16) for _ in range(2)]
    text = backbone.empty_text(model, 1, 64).to(torch.device(device), torch.bfloat16)
    layout = SubjectLayout.in_order(64, image, [small[0] * small[1]] * 2)
    masks = torch.zeros(1, 2, image, device=device)
    masks[:, 0, : image // 2], masks[:, 1, image // 2 :] = 1, 1

    def run(around: Any) -> None:
        with torch.no_grad(), around:
            backbone.velocity(
                model, tokens, torch.full((1,), 0.5, device=device), text, image_grid=grid, references=references,
                reference_grids=[small] * 2,
            )  # fmt: skip

    yield "plain", lambda: run(nullcontext())
    yield "captured", lambda: run(capture_subject_attention(model, layout))
    yield "separated", lambda: run(separate_subjects(model, layout, masks))
    if full:
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.compile()
        yield "compiled", lambda: run(nullcontext())
        yield "compiled, captured", lambda: run(capture_subject_attention(model, layout))


def training(device: str, size: dict[str, int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One row of stage 1 on a slice of each base: float32 of FLUX.1-dev (the baseline), then bf16 as the recipes compute."""
    from dataclasses import replace

    from multicrafter.config.recipes import get_recipe
    from multicrafter.models.adapters import AdapterConfig
    from multicrafter.models.backbones import get_backbone
    from multicrafter.plan.steps import PlannedPretrain, Shape, build

    full = size["tokens"] > 64
    shape = Shape(512, (32, 32), (20, 20), 2) if full else Shape(16, (4, 4), (2, 2), 2)
    names = ["flux1_dev", "flux2_klein", "qwen_image_edit", "qwen_image_21"]
    for name, dtype in [("flux1_dev", "float32"), *((name, "bfloat16") for name in names)]:
        run, backbone = get_recipe(f"{name}_stage1"), get_backbone(name)
        config = {"num_layers": 1} | ({} if full else {"num_attention_heads": 2, backbone.text_width_name: 64})
        config |= {"num_single_layers": 1} if "num_single_layers" in backbone.full_config else {}
        execution = replace(run.execution, dtype=dtype)  # type: ignore[arg-type]
        adapters = AdapterConfig(rank=size["rank"], alpha=float(size["rank"]))
        transformer, attached = build(backbone, config, execution, adapters)
        transformer.to(device)
        stage = PlannedPretrain(attached, replace(run.pretrain, execution=execution), shape, rows=1)  # type: ignore[union-attr]
        yield f"{name}, {dtype}", stage.once
        del transformer, attached, stage


GROUPS = {"experts": experts, "attention": capture, "training": training}


def figures(device: str, size: str) -> dict[str, dict[str, dict[str, float]]]:
    """Every group's cases; the first case of a group is what the others are compared with."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group, cases in GROUPS.items():
        torch.manual_seed(0)
        rows: dict[str, dict[str, float]] = {}
        for name, function in cases(device, SIZES[size]):
            rows[name] = measure(function, device, SIZES[size]["rounds"])
            rows[name]["ratio"] = rows[name]["median_ms"] / next(iter(rows.values()))["median_ms"]
        found[group] = rows
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "gpu.json")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("device: got cuda, but there is no card here; --device cpu --size smoke shows that it runs")
    os.environ["BENCH_SIZE"] = arguments.size
    content = {
        "circumstances": circumstances(),
        "device": arguments.device,
        "figures": figures(arguments.device, arguments.size),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arguments.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, arguments.out)
    for group, rows in content["figures"].items():  # type: ignore[union-attr]
        for name, row in rows.items():
            print(
                f"{group:10} {name:28} {row['median_ms']:10.3f} ms  x {row['ratio']:.2f}  {row['peak_bytes'] / 1e9:.2f} GB"
            )
    print(f"figures: {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
