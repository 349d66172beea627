"""What keeping subjects apart costs, per evaluation of a FLUX transformer: masked against unmasked, in one run.

    make bench                                                                    # smoke size
    python packages/idar/benchmarks/bench_idar_separation.py --rounds 9 --out benchmarks/results/idar_separation.json

Every round times each case once, in an order drawn anew, and divides by the unmasked evaluation of the same round: what others do to
the machine hits neighbours alike. The load before and after is written beside the figures.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from idar import SubjectLayout
from idar.integrations.diffusers import separate_subjects

FULL = {"heads": 8, "head_dim": 64, "double": 2, "single": 4, "text": 128, "image": 1024, "reference": 256}
SMALL = {"heads": 4, "head_dim": 32, "double": 2, "single": 4, "text": 32, "image": 256, "reference": 64}
SMOKE = {"heads": 2, "head_dim": 16, "double": 1, "single": 1, "text": 4, "image": 16, "reference": 4}


def evaluation(size: dict[str, int]) -> tuple[torch.nn.Module, Callable[[], None], SubjectLayout]:
    """A transformer, one evaluation of it with two references, and the layout."""
    torch.manual_seed(0)
    d = size["head_dim"]
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=size["double"], num_single_layers=size["single"], attention_head_dim=d,
        num_attention_heads=size["heads"], joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False,
        axes_dims_rope=(d // 4 // 2 * 2, *[(d - d // 4 // 2 * 2) // 2] * 2),
    )  # fmt: skip
    layout = SubjectLayout.in_order(size["text"], size["image"], [size["reference"]] * 2)
    pictures = layout.stop - size["text"]
    given = {
        "hidden_states": torch.randn(1, pictures, 64),
        "encoder_hidden_states": torch.randn(1, size["text"], 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(pictures, 3),
        "txt_ids": torch.zeros(size["text"], 3),
    }

    def evaluate() -> None:
        with torch.no_grad():
            model(**given, return_dict=False)

    return model.eval(), evaluate, layout


def masks_of(size: dict[str, int], inside: float) -> torch.Tensor:
    """Each subject has a third of the picture; the middle is nobody's."""
    masks = torch.zeros(1, 2, size["image"])
    masks[:, 0, : size["image"] // 3], masks[:, 1, -size["image"] // 3 :] = inside, inside
    return masks


def cases(size: dict[str, int], model: torch.nn.Module, layout: SubjectLayout) -> dict[str, Callable[[], Any]]:
    """Contexts to evaluate in, by name."""

    @contextmanager
    def again(masks: torch.Tensor) -> Iterator[None]:
        """Masks that change before every evaluation, as in flight: the bias is made anew."""
        with separate_subjects(model, layout, masks) as separation:
            separation.masks = masks.clone()
            yield

    hard, soft = masks_of(size, 1.0), masks_of(size, 0.7)
    return {
        "unmasked": nullcontext,
        "unmasked again": nullcontext,  # how far two equal things are apart under this load
        "nothing to separate": lambda: separate_subjects(model, layout, None),
        "hard masks": lambda: separate_subjects(model, layout, hard),
        "soft masks": lambda: separate_subjects(model, layout, soft),
        "masks that change": lambda: again(hard),
        "one head": lambda: separate_subjects(model, layout, hard, heads=[0]),
    }


def measure(size: dict[str, int], rounds: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of every case in every round, and their ratios to the unmasked one of the same round."""
    model, evaluate, layout = evaluation(size)
    contexts, order = cases(size, model, layout), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for context in contexts.values():  # once, unmeasured
        with context():
            evaluate()
    for _ in range(rounds):
        for name in order.sample(list(contexts), len(contexts)):
            with contexts[name]():
                if name != "masks that change":
                    evaluate()  # the first pass makes the bias, which later ones keep
                started = time.perf_counter()
                evaluate()
                seconds[name].append(time.perf_counter() - started)
    ratios = {n: [a / b for a, b in zip(row, seconds["unmasked"], strict=True)] for n, row in seconds.items()}
    return {
        "seconds": {name: summary(row) for name, row in seconds.items()},
        "ratio_to_unmasked": {name: summary(row) for name, row in ratios.items() if name != "unmasked"},
        "tokens": layout.stop,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": statistics.median(values), "lower_quartile": low, "upper_quartile": high,
        "min": min(values), "max": max(values), "runs": len(values),
    }  # fmt: skip


def test_separation_cost(benchmark: Any) -> None:
    size = FULL if os.environ.get("BENCH_SIZE") == "full" else SMOKE
    found: dict[str, Any] = {}
    benchmark.pedantic(lambda: found.update(measure(size, 2)), rounds=1)
    assert set(found["ratio_to_unmasked"]) >= {"hard masks", "nothing to separate"}
    benchmark.extra_info.update(found)


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = os.getloadavg()
    size = FULL if options.size == "full" else SMALL
    found = measure(size, options.rounds)
    found["circumstances"] = {
        "size": size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
        "python": platform.python_version(),
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load_before": before,
        "load_after": os.getloadavg(),
    }
    text = json.dumps(found, indent=1) + "\n"
    if options.out is None:
        print(text)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, options.out)


if __name__ == "__main__":
    main()
