"""A FLUX whose pictures get easier to compress: GSPO on a diffusers pipeline, with the size of a JPEG as the reward.

    python -m gspo.examples.flux_jpeg --out flux_jpeg.png

makes a tiny FLUX that paints stripes (`gspo.examples.tiny_flux`, some seconds) and takes half a minute on a CPU; ``--model`` names a FLUX
in diffusers format instead. A LoRA on the attention is trained; the reward is minus the kilobytes of the picture as a JPEG of quality 90. Needs
``pip install "gspo[diffusers,plot]"``.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspo.integrations.diffusers import PipelinePolicy
from gspo.loop import OnlineConfig, OnlineTrainer, StepReport
from gspo.rollout import rollout
from gspo.sde import FlowSDE, Kernel
from gspo.step import PolicyConfig
from gspo.window import SlidingWindow

PROMPTS = ("one person in the park", "one person at night")


def load(model: str | None, *, teaching_steps: int = 400) -> Any:
    """A pipeline from a folder or hub id, by default a tiny one that was taught to paint stripes.

    Raises:
        ImportError: diffusers or peft is missing.
    """
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("peft") is None:
        raise ImportError('this example needs diffusers and peft: pip install "gspo[diffusers]"')
    if model is None:
        from gspo.examples.tiny_flux import teach, tiny_flux

        pipe = tiny_flux(PROMPTS)
        teach(pipe, steps=teaching_steps)
        return pipe
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)


def kilobytes(pictures: Sequence[Any]) -> list[float]:
    """Size of each PIL picture as a JPEG of quality 90."""
    sizes = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        sizes.append(len(buffer.getvalue()) / 1000)
    return sizes


@dataclass(frozen=True)
class FluxJpegRun:
    """What a run leaves: reports, and pictures of the same noise before and after."""

    reports: list[StepReport]
    before: list[Any]
    after: list[Any]


def train(
    pipe: Any,
    *,
    iterations: int = 12,
    num_steps: int = 12,
    group_size: int = 6,
    size: int = 64,
    kernel: Kernel | None = None,
    policy: PolicyConfig | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, StepReport], object] = lambda iteration, report: None,
) -> FluxJpegRun:
    """Adds a LoRA to the pipeline's transformer, trains it on the JPEG reward, and takes it off again."""
    from peft import LoraConfig

    torch.manual_seed(seed)  # peft draws the LoRA from the global generator
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    try:
        trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
        config = OnlineConfig(
            window=SlidingWindow(num_steps, size=2, interval=max(1, iterations // 3)),
            kernel=kernel or FlowSDE(),
            group_size=group_size,
            tail_steps=4,
            policy=policy or PolicyConfig(),
            seed=seed,
        )
        trainer = OnlineTrainer(trained, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0), config)
        actor, generator = PipelinePolicy(pipe, PROMPTS, height=size, width=size), torch.Generator().manual_seed(seed)
        sigmas = actor.sigmas(num_steps)
        fixed = actor.noise(torch.Generator().manual_seed(1))

        def sample() -> list[Any]:
            with torch.no_grad():
                drawn = rollout(actor, fixed, sigmas, kernel=FlowSDE(0.01), window=(0,), generator=generator)
            return list(actor.decode(drawn.latents, drawn.index))

        def reward(latents: Tensor, index: Tensor) -> list[float]:
            return [-size for size in kilobytes(actor.decode(latents, index))]

        before, reports = sample(), []
        for iteration in range(iterations):
            reports.append(trainer.step(actor, actor.noise(generator), sigmas, reward))
            progress(iteration, reports[-1])
        return FluxJpegRun(reports, before, sample())
    finally:
        pipe.transformer.delete_adapters("default")


def save(path: str | Path, run: FluxJpegRun) -> None:
    """Pictures before and after, with their sizes, and the reward."""
    from gspo.plot import pyplot

    plt = pyplot()
    columns = len(run.before)
    figure, axes = plt.subplots(2, columns + 1, figsize=(2.4 * columns + 3.6, 4.8), constrained_layout=True)
    for row, (name, pictures) in enumerate((("before", run.before), ("after", run.after))):
        for axis, picture, size in zip(axes[row], pictures, kilobytes(pictures), strict=False):
            axis.imshow(picture)
            axis.set_title(f"{name}: {size:.2f} kB", fontsize=9)
            axis.axis("off")
    grid = axes[0, 0].get_gridspec()
    for axis in axes[:, -1]:
        axis.remove()
    curve = figure.add_subplot(grid[:, -1])
    curve.plot([r.summary()["reward"] for r in run.reports])
    curve.set(xlabel="iteration", ylabel="reward: - kB of the rollouts")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gspo.examples.flux_jpeg", description="A FLUX that learns to compress well."
    )
    parser.add_argument(
        "--model", help="a FLUX folder in diffusers format or a hub id (default: a tiny one, made on the spot)"
    )
    parser.add_argument("--iterations", type=int, default=12, help="rollouts (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", help="a picture to write (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {options.iterations}")
    try:
        pipe = load(options.model)
    except (ImportError, OSError, ValueError) as error:
        parser.error(f"--model {options.model}: {' '.join(str(error).split())}")

    def progress(iteration: int, report: StepReport) -> None:
        line = f"iteration {iteration + 1:3d}/{options.iterations}  {-report.summary()['reward']:.3f} kB"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    size, lr = (32, 1e-2) if options.model is None else (64, 1e-3)
    run = train(pipe, iterations=options.iterations, size=size, lr=lr, seed=options.seed, progress=progress)
    print(file=sys.stderr)
    first, last = (-run.reports[i].summary()["reward"] for i in (0, -1))
    print(f"mean size of the rollouts: {first:.3f} kB at first, {last:.3f} kB at last")
    if options.out:
        try:
            save(options.out, run)
        except (ImportError, OSError, ValueError) as error:
            parser.error(f"--out {options.out}: {error}")
        print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
