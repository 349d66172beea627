"""What a mixture costs beside one LoRA of the same rank: time in ratios of one run, memory in bytes kept for backward.

    python packages/moe_lora/benchmarks/study_moe_lora_speed.py adapter --out benchmarks/results/moe_lora_adapter.json
    python packages/moe_lora/benchmarks/study_moe_lora_speed.py ffn --out benchmarks/results/moe_lora_ffn.json
    python packages/moe_lora/benchmarks/study_moe_lora_speed.py memory --out benchmarks/results/moe_lora_memory.json
    python packages/moe_lora/benchmarks/study_moe_lora_speed.py adapter --clock cpu --threads 1 --allocator keep --out ...

Every round times all variants one after the other, in turning order; a ratio is taken within a round, and the figure is the median over
rounds with its quartiles. ``--allocator keep`` restarts itself with glibc told to keep freed memory, as CUDA's caching allocator does; by
default glibc gives every block over 32 MB back to the system, and a third of a second of page faults per GB is timed too.
``--clock cpu`` counts the processor time of the process instead of the time that passes: on a machine that others use too, it repeats to 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moe_lora import MoELoRAConfig, MoELoRALayer
from moe_lora.layer import Mixture
from torch import Tensor, nn

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
TOKENS, WIDTH, RANK = 2336, 3072, 512
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PlainLoRA(nn.Module):
    """``scaling * B A h`` with the scale on the narrow middle: the leanest LoRA we know how to write. PEFT scales the wide output."""

    def __init__(self, width: int, rank: int, *, scale_output: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.scale_output = (
            nn.Linear(width, rank, bias=False),
            nn.Linear(rank, width, bias=False),
            scale_output,
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.b(self.a(h)) * 1.5 if self.scale_output else self.b(self.a(h) * 1.5)


class Beside(nn.Module):
    """A base and an adapter."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h) + self.adapter(h)


def mixture(width: int, rank: int, dtype: torch.dtype, **changes: object) -> Mixture:
    config = MoELoRAConfig(rank=rank, alpha=1.5 * rank, **changes)  # type: ignore[arg-type]
    made = Mixture(config, width, width).to(dtype)
    nn.init.normal_(made.lora_b, 0, 0.02)
    return made


def timed(
    variants: dict[str, Callable[[], object]], clear: Callable[[], None], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds per round of each variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for done in range(-1, rounds):
        random.Random(done).shuffle(order)
        for name in order:
            clear()
            start = clock()
            variants[name]()
            if done >= 0:
                seconds[name].append(clock() - start)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def compare(seconds: dict[str, list[float]], pairs: dict[str, tuple[str, str]]) -> dict[str, object]:
    """Each named ratio, within rounds; and from the fastest round of each, which other processes disturb least."""
    return {
        title: quartiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
        | {"of_fastest": round(min(seconds[a]) / min(seconds[b]), 4)}
        for title, (a, b) in pairs.items()
    }


def step(module: nn.Module, h: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: module(h).backward(grad)


def adapter(args: argparse.Namespace) -> dict[str, object]:
    dtype = DTYPES[args.dtype]
    h = torch.randn(args.tokens, args.width, dtype=dtype, requires_grad=True)
    grad = torch.randn(args.tokens, args.width, dtype=dtype)
    modules: dict[str, nn.Module] = {
        "lora": PlainLoRA(args.width, args.rank).to(dtype),
        "lora_as_peft": PlainLoRA(args.width, args.rank, scale_output=True).to(dtype),
        "grouped_4": mixture(args.width, args.rank, dtype),
        "grouped_32": mixture(args.width, args.rank, dtype, num_experts=32),
    }
    if args.twins:
        modules = {
            "grouped_4": modules["grouped_4"],
            "grouped_32": modules["grouped_32"],
            "loop_4": mixture(args.width, args.rank, dtype, dispatch="loop"),
            "loop_32": mixture(args.width, args.rank, dtype, num_experts=32, dispatch="loop"),
            "dense_4": mixture(args.width, args.rank, dtype, dispatch="dense"),
        }

    def clear() -> None:
        h.grad = None
        for m in modules.values():
            m.zero_grad()
            if isinstance(m, Mixture):
                m.state.last = None

    seconds = timed({name: step(m, h, grad) for name, m in modules.items()}, clear, args.rounds, CLOCKS[args.clock])
    pairs = {
        "grouped, 4 experts / lora": ("grouped_4", "lora"),
        "grouped, 4 experts / lora scaled as in peft": ("grouped_4", "lora_as_peft"),
        "grouped, 32 experts / 4 experts": ("grouped_32", "grouped_4"),
    }
    if args.twins:
        pairs = {
            "dense / grouped, 4 experts": ("dense_4", "grouped_4"),
            "loop / grouped, 4 experts": ("loop_4", "grouped_4"),
            "loop / grouped, 32 experts": ("loop_32", "grouped_32"),
        }
    return {"pairs": pairs, "seconds": seconds}


def ffn(args: argparse.Namespace) -> dict[str, object]:
    dtype = DTYPES[args.dtype]
    base = nn.Sequential(
        nn.Linear(args.width, 4 * args.width), nn.GELU(approximate="tanh"), nn.Linear(4 * args.width, args.width)
    ).to(dtype)
    base.requires_grad_(False)
    h = torch.randn(args.tokens, args.width, dtype=dtype, requires_grad=True)
    grad = torch.randn(args.tokens, args.width, dtype=dtype)
    layer = MoELoRALayer(base, MoELoRAConfig(rank=args.rank, alpha=1.5 * args.rank))
    nn.init.normal_(layer.lora_b, 0, 0.02)
    layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.to(dtype), layer.lora_b.data.to(dtype)
    plain = Beside(base, PlainLoRA(args.width, args.rank).to(dtype))

    def clear() -> None:
        h.grad = None
        plain.zero_grad()
        layer.zero_grad()
        layer.state.last = None

    def forward_only(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                module(h)

        return run

    if args.forward_only:
        variants = {"plain": forward_only(plain), "mixture": forward_only(layer), "base": forward_only(base)}
        pairs = {
            "mixture / plain LoRA, forward": ("mixture", "plain"),
            "mixture / bare FFN, forward": ("mixture", "base"),
        }
    else:
        variants = {"plain": step(plain, h, grad), "mixture": step(layer, h, grad)}
        pairs = {"mixture / plain LoRA, forward and backward": ("mixture", "plain")}
    seconds = timed(variants, clear, args.rounds, CLOCKS[args.clock])
    return {"pairs": pairs, "seconds": seconds}


def kept_bytes(module: nn.Module, h: Tensor, autocast: bool) -> int:
    """Bytes of distinct storages that the graph keeps for backward, parameters left out."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = module(h)
    for p in module.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
        if autocast and p.ndim > 1:  # autocast's copies of parameters are no activations
            for pointer in [q for q, size in storages.items() if size == p.numel() * 2]:
                storages.pop(pointer)
    del out
    return sum(storages.values())


def memory(args: argparse.Namespace) -> dict[str, object]:
    ratios: dict[str, dict[str, float]] = {}
    for name, dtype, autocast in (
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("autocast", torch.float32, True),
    ):
        h = torch.randn(args.tokens, args.width, dtype=dtype, requires_grad=True)
        plain = kept_bytes(PlainLoRA(args.width, args.rank).to(dtype), h, autocast)
        for experts, k in ((4, 1), (4, 2), (32, 1)):
            own = kept_bytes(mixture(args.width, args.rank, dtype, num_experts=experts, top_k=k), h, autocast)
            ratios[f"{name}, {experts} experts, top {k}"] = {
                "ratio": round(own / plain, 4),
                "bytes": own,
                "lora_bytes": plain,
            }
    return {"ratios": ratios}


def circumstances(args: argparse.Namespace) -> dict[str, object]:
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    model = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no", "--", "packages/moe_lora")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{model[0] if model else platform.processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "allocator": args.allocator,
        "clock": args.clock,
        "load": [round(x, 1) for x in os.getloadavg()],
        "sizes": {"tokens": args.tokens, "width": args.width, "rank": args.rank},
        "dtype": args.dtype,
        "rounds": args.rounds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("adapter", "ffn", "memory"))
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; a figure of the same study in it is replaced"
    )
    parser.add_argument("--key", help="name of the figure in the file; default: made of the options")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--allocator", choices=("default", "keep"), default="default")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--twins", action="store_true", help="grouped against loop and dense instead of against a LoRA")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--pool", action="store_true", help="add the rounds to those in the file")
    for name, value in (("tokens", TOKENS), ("width", WIDTH), ("rank", RANK)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.allocator == "keep" and os.environ.get("MALLOC_MMAP_THRESHOLD_") != KEEP["MALLOC_MMAP_THRESHOLD_"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = {"adapter": adapter, "ffn": ffn, "memory": memory}[args.study](args)
    options = [args.dtype, args.allocator, *["twins"] * args.twins, *["forward"] * args.forward_only]
    options += ["processor time"] * (args.clock == "cpu") + [f"{args.threads} thread"] * (args.threads == 1)
    key = args.key or ("memory" if args.study == "memory" else ", ".join(options))
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    if "seconds" in found:
        if args.pool and key in figures:
            earlier = figures[key]["seconds"]
            found["seconds"] = {name: earlier[name] + values for name, values in found["seconds"].items()}  # type: ignore[attr-defined]
        found["ratios"] = compare(found["seconds"], found.pop("pairs"))  # type: ignore[arg-type]
    figures[key] = found | {"circumstances": circumstances(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(figures, indent=1) + "\n")
    os.replace(unfinished, args.out)
    for title, values in found["ratios"].items():  # type: ignore[attr-defined]
        print(f"{key}: {title}: {values}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
