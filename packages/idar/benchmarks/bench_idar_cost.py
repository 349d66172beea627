"""What attention supervision costs: in time and bytes, against blocks without it, and against materialised maps.

    make bench                                                          # smoke size
    python packages/idar/benchmarks/bench_idar_cost.py PART --out benchmarks/results/idar_cost.json   # full size, one part at a time

Parts: blocks, maps, references. Timed runs alternate with their baseline, so that a ratio compares neighbours; calling a part again adds
pairs to those in the file. Two threads, fp32, frozen weights with gradients to the tokens (as when adapters train).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import idar
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from idar import reference
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

DIRECTIONS = ("reference_to_image", "image_to_reference")
FULL = {"heads": 24, "head_dim": 128, "text": 512, "image": 1024, "reference": 400}
SMOKE = {"heads": 2, "head_dim": 32, "text": 16, "image": 64, "reference": 16}


class Blocks(nn.Module):
    """One double and two single blocks of FLUX, run as FluxTransformer2DModel runs them."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.double_block = FluxTransformerBlock(width, heads, head_dim)
        self.singles = nn.ModuleList(FluxSingleTransformerBlock(width, heads, head_dim) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        text, image = self.double_block(image, text, condition, rotary)
        for block in self.singles:
            text, image = block(image, text, condition, rotary)
        return image


def layout_of(size: dict[str, int], references: int = 2) -> idar.SubjectLayout:
    return idar.SubjectLayout.in_order(size["text"], size["image"], [size["reference"]] * references)


def block_step(size: dict[str, int]) -> Callable[[str | None], None]:
    """A forward and backward of the blocks, with the maps of a direction (and their loss) or without."""
    torch.manual_seed(0)
    width, layout = size["heads"] * size["head_dim"], layout_of(size)
    blocks = Blocks(size["heads"], size["head_dim"])
    text, image = torch.randn(1, size["text"], width), torch.randn(1, layout.stop - size["text"], width)
    condition, angles = torch.randn(1, width), torch.rand(layout.stop, size["head_dim"])
    masks = torch.zeros(1, 2, size["image"])
    masks[:, 0, : size["image"] // 3], masks[:, 1, -size["image"] // 3 :] = 1, 1

    def step(direction: str | None) -> None:
        given = image.clone().requires_grad_()
        capture = (
            idar.capture_attention(blocks, {"double": blocks.double_block.attn}, layout, direction=direction)  # type: ignore[arg-type]
            if direction
            else nullcontext()
        )
        with capture as captured:
            loss = blocks(given, text, condition, (angles.cos(), angles.sin())).square().mean()
            if captured is not None:
                kind = "dice" if direction == DIRECTIONS[0] else "share_cross_entropy"
                maps = idar.normalize_maps(captured.maps, "max" if kind == "dice" else "none")
                loss = loss + idar.idar_loss(maps, masks, kind=kind).loss
            loss.backward()

    return step


def map_step(size: dict[str, int], references: int = 2) -> Callable[[str, bool], None]:
    """Maps and their gradients, streaming or materialised."""
    g = torch.Generator().manual_seed(0)
    layout = layout_of(size, references)
    query, key = (
        torch.randn(1, layout.stop, size["heads"], size["head_dim"], generator=g).transpose(1, 2).requires_grad_()
        for _ in range(2)
    )

    def step(direction: str, streaming: bool) -> None:
        function = idar.subject_attention if streaming else reference.subject_attention
        maps = function(query, key, layout.subject_spans, layout.image_span, direction=direction)  # type: ignore[operator]
        torch.autograd.grad(maps.square().sum(), (query, key))

    return step


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_bytes(function: Callable[[], None]) -> int:
    """Most bytes that the CPU allocator handed out at a time, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def measure_blocks(
    size: dict[str, int], found: dict[str, Any], pairs: int, directions: list[str], memory: bool
) -> None:
    step = block_step(size)
    if memory:
        with torch.device("meta"):
            shapes = Blocks(size["heads"], size["head_dim"])
        weights = sum(p.numel() * p.element_size() for p in shapes.parameters())
        found["weight_bytes"] = weights
        found["peak_bytes"] = {str(d): peak_bytes(lambda d=d: step(d)) for d in (None, *DIRECTIONS)}
        base = found["peak_bytes"]["None"]
        for d in DIRECTIONS:
            extra = found["peak_bytes"][d] - base
            found[f"memory_ratio_{d}"] = 1 + extra / (base + weights)
            found[f"activation_memory_ratio_{d}"] = 1 + extra / base
    if pairs:
        step(None)
    for _ in range(pairs):
        for direction in directions:
            record = found.setdefault("pairs", {}).setdefault(direction, [])
            record.append([seconds(lambda: step(None)), seconds(lambda d=direction: step(d))])
    for direction, rows in found.get("pairs", {}).items():
        found[f"time_ratio_{direction}"] = summary([b / a for a, b in rows])


def measure_maps(size: dict[str, int], found: dict[str, Any], pairs: int, directions: list[str], memory: bool) -> None:
    step = map_step(size)
    gradients = 2 * layout_of(size).stop * size["heads"] * size["head_dim"] * 4
    for direction in directions:
        if memory:
            extra = {
                name: peak_bytes(lambda d=direction, s=streaming: step(d, s)) - gradients
                for name, streaming in (("materialised", False), ("streaming", True))
            }
            found[f"extra_bytes_{direction}"] = extra
            found[f"memory_ratio_{direction}"] = extra["materialised"] / extra["streaming"]
        if pairs:
            step(direction, True), step(direction, False)
        record = found.setdefault("pairs", {}).setdefault(direction, [])
        for _ in range(pairs):
            record.append([seconds(lambda d=direction, s=s: step(d, s)) for s in (False, True)])
        if record:
            found[f"speedup_{direction}"] = summary([a / b for a, b in record])


def measure_references(
    size: dict[str, int], found: dict[str, Any], pairs: int, directions: list[str], memory: bool
) -> None:
    counts = list(range(1, 9))
    steps = {n: map_step(size, n) for n in counts}
    for direction in directions:
        times: dict[int, list[float]] = found.setdefault("seconds", {}).setdefault(
            direction, {str(n): [] for n in counts}
        )
        steps[8](direction, True)
        for _ in range(pairs):
            for n in counts:
                times[str(n)].append(seconds(lambda n=n, d=direction: steps[n](d, True)))  # type: ignore[index]
        # the least disturbed run of each number: others only ever add time
        least = torch.tensor([min(times[str(n)]) for n in counts], dtype=torch.float64)  # type: ignore[index]
        x = torch.tensor(counts, dtype=torch.float64)
        slope = ((x - x.mean()) * (least - least.mean())).sum() / (x - x.mean()).square().sum()
        line = least.mean() + slope * (x - x.mean())
        found[f"fit_{direction}"] = {
            "seconds_per_reference": slope.item(),
            "seconds_without": (least.mean() - slope * x.mean()).item(),
            "r_squared": 1 - ((least - line).square().sum() / (least - least.mean()).square().sum()).item(),
        }


MEASURES = {"blocks": measure_blocks, "maps": measure_maps, "references": measure_references}


@pytest.mark.parametrize("part", MEASURES)
def test_cost(benchmark, part):
    size, found = (FULL if os.environ.get("BENCH_SIZE") == "full" else SMOKE), {}
    benchmark.pedantic(lambda: MEASURES[part](size, found, 2, list(DIRECTIONS), True), rounds=1)
    benchmark.extra_info.update(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=MEASURES)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--direction", choices=DIRECTIONS, action="append")
    parser.add_argument("--memory", action="store_true", help="count bytes too")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(2)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    found = report.setdefault(options.part, {})
    MEASURES[options.part](FULL, found, options.pairs, options.direction or list(DIRECTIONS), options.memory)
    root = Path(__file__).resolve().parents[3]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    report["circumstances"] = {
        "commit": commit.stdout.strip(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "idar")},
        "python": platform.python_version(),
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "size": FULL,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, options.out)


if __name__ == "__main__":
    main()
