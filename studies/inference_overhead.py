"""What MoE-LoRA and references cost at inference: forward only, one double and one single block of FLUX.1-dev at full width.

    python -m studies.inference_overhead [--smoke] [--page]

Against plain LoRA of the same rank and against the base; variants alternate within a round, a ratio is the median over rounds of the ratios inside a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from multicrafter.files import write_json, write_whole
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import get_backbone
from multicrafter.models.flux.model import Text
from multicrafter.plan.steps import build
from multicrafter.training.precision import ExecutionConfig

from benchmarks.run import ROOT, circumstances
from studies.lab import results_index
from studies.lab.report import markdown_table, save_plot

NAME = "inference_overhead"
RESULTS = ROOT / "benchmarks" / "results" / f"{NAME}.json"
REFERENCES = (0, 1, 2, 4)
VARIANTS = ("base", "plain LoRA", "MoE-LoRA")


def alternate(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant, in turn and in alternating order."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for index in range(rounds):
        for name in list(work)[:: 1 if index % 2 == 0 else -1]:
            start = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def models(*, rank: int, smoke: bool) -> dict[str, tuple[Any, Adapters]]:
    """The same slice with plain LoRA and with experts."""
    found: dict[str, tuple[Any, Adapters]] = {}
    size: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1}
    if smoke:
        size |= {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    for name, experts in (("plain LoRA", 0), ("MoE-LoRA", 4)):
        torch.manual_seed(0)
        adapters = AdapterConfig(rank=rank, alpha=float(rank), num_experts=experts)
        found[name] = build(get_backbone("flux1_dev"), size, ExecutionConfig(dtype="bfloat16"), adapters)
    return found


@torch.no_grad()
def measure(*, rounds: int, smoke: bool = False) -> dict[str, Any]:
    """Seconds by number of references and variant."""
    backbone = get_backbone("flux1_dev")
    side, reference_side, text_tokens, rank = (4, 2, 8, 4) if smoke else (32, 20, 512, 512)
    made = models(rank=rank, smoke=smoke)
    seconds: dict[str, dict[str, list[float]]] = {}
    for number in REFERENCES:
        transformer = made["plain LoRA"][0]
        d = transformer.config.in_channels
        empty = backbone.empty_text(transformer, 1, text_tokens)
        text = Text(
            torch.randn_like(empty.embeds).bfloat16(), None if empty.pooled is None else empty.pooled.bfloat16()
        )
        given = {
            "image_grid": (side, side),
            "references": [torch.randn(1, reference_side**2, d, dtype=torch.bfloat16) for _ in range(number)],
            "reference_grids": [(reference_side, reference_side)] * number,
        }
        tokens = torch.randn(1, side**2, d, dtype=torch.bfloat16)

        def once(name: str, text: Text = text, tokens: torch.Tensor = tokens, given: dict[str, Any] = given) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                backbone.velocity(made[name][0], tokens, torch.full((1,), 0.5), text, **given)

        def base(once: Callable[[str], None] = once) -> None:
            with made["MoE-LoRA"][1].disable():
                once("MoE-LoRA")

        work = {"base": base, **{name: (lambda name=name, once=once: once(name)) for name in made}}
        seconds[str(number)] = alternate(work, rounds)
        print(
            f"{number} references: "
            + ", ".join(f"{k} {statistics.median(v):.3f} s" for k, v in seconds[str(number)].items()),
            flush=True,
        )
    return {"study": NAME, "rounds": rounds, "rank": rank, "tokens": {"text": text_tokens, "picture": side**2, "a reference": reference_side**2}, "seconds": seconds, **circumstances()}  # fmt: skip


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Median of the ratios inside rounds, and their range."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"


def page(content: dict[str, Any], folder: Path) -> str:
    """Tables and a plot."""
    from matplotlib.figure import Figure

    seconds = content["seconds"]
    rows = [
        [
            number,
            f"{statistics.median(by['base']):.2f}",
            ratio(by["plain LoRA"], by["base"]),
            ratio(by["MoE-LoRA"], by["base"]),
            ratio(by["MoE-LoRA"], by["plain LoRA"]),
            f"{statistics.median(by['MoE-LoRA']) / statistics.median(seconds['0']['MoE-LoRA']):.2f}",
        ]
        for number, by in seconds.items()
    ]
    figure = Figure(figsize=(5.5, 3), layout="constrained")
    axis = figure.subplots()
    for name in VARIANTS:
        axis.plot([int(n) for n in seconds], [statistics.median(by[name]) for by in seconds.values()], "o-", label=name)
    axis.set_xticks([int(n) for n in seconds])
    axis.set_xlabel("references")
    axis.set_ylabel("seconds a forward pass")
    axis.set_ylim(bottom=0)
    axis.legend()
    save_plot(figure, folder / f"{NAME}.png")
    tokens = ", ".join(f"{k} {v}" for k, v in content["tokens"].items())
    head = [
        "references",
        "base, s",
        "plain LoRA / base",
        "MoE-LoRA / base",
        "MoE-LoRA / plain LoRA",
        "MoE-LoRA, against no reference",
    ]
    return f"""# What experts and references cost at inference

Generated by `python -m studies.{NAME}` from `benchmarks/results/{NAME}.json`: commit {content["commit"][:10]}, torch {content["versions"]["torch"]}, {content["device"]}, {content["threads"]} threads, {content["rounds"]} rounds.

One double and one single block of FLUX.1-dev at full width, bf16, forward only; adapters of rank {content["rank"]}, 4 experts, top 1, not merged. Tokens: {tokens}. Median over rounds of the ratio inside a round, and its range.

{markdown_table(head, rows)}

![seconds over the number of references]({NAME}.png)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="in miniature, into runs/science-smoke")
    parser.add_argument("--page", action="store_true", help="only the page")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    smoke = ROOT / "runs" / "science-smoke"
    path = smoke / f"{NAME}.json" if options.smoke else RESULTS
    folder = smoke / "pages" if options.smoke else ROOT / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.page:
        write_json(path, measure(rounds=1 if options.smoke else options.rounds, smoke=options.smoke))
    write_whole(folder / f"{NAME}.md", page(json.loads(path.read_text()), folder))
    results_index.write(folder)
    print(f"page: {folder / f'{NAME}.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
