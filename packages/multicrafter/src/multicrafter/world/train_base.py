"""Recipe of the tiny base: text to image plus ONE subject in context: ``python -m multicrafter.world.train_base --vae DIR --out DIR``.

The paper starts from a single-subject model; several references are never shown here, so that bleeding is left to stage 1.

Like FLUX.1-dev the base takes its guidance as an input (distilled guidance, arXiv 2210.03142): at guidance 1 it predicts the velocity of the
data, at g > 1 that velocity pushed away from what the caption alone would give, in one forward pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from multicrafter import UserError, renamed
from multicrafter.models.checks import check_finite
from multicrafter.models.flux.model import add_noise, encode_images, encode_prompts, predict_velocity
from multicrafter.models.flux.packing import pack_latents
from multicrafter.world import FAMILIES, WorldConfig, make_scenes
from multicrafter.world.precision import fast_autocast, has_bfloat16
from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline

renamed(__name__, {"Batch": "BaseBatch"})


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """How the base is trained.

    Attributes:
        minutes: Time spent training; the learning rate decays to zero over it. Of a step that takes longer than ten seconds (the first one
            compiles, a laptop sleeps) only ten count.
        batch: Samples a step.
        lr: Peak learning rate (AdamW).
        lr_matrix: Peak learning rate of the hidden matrices (Muon, scaled to AdamW's RMS); 0 trains them with AdamW.
        ema: Decay of the averaged weights that are written.
        reference_share: Share of steps with a reference; the others are text to image.
        companion_share: Share of the scenes with a reference that show one more person than the reference does.
        num_heads: Attention heads of 32 channels each, where it does not start from another base.
        subject_weight: A token covered by a subject weighs ``1 + subject_weight`` times one of the background: few tokens carry the identity.
        top_weight: Added where the upper half of a subject is: hat, hair and glasses, five of its eight attributes, share these few tokens.
        guidance_max: Half of the samples with a reference train at a guidance drawn uniformly from [1, this]; 1 trains without guidance.
        pool: Samples kept in memory; every step draws from them and replaces a quarter of a batch.
        autocast: Whether the forward pass runs in bfloat16 (faster on processors that have it).
        compile_blocks: Whether the blocks are compiled (a minute at the start, then half as fast again and more).
        seed: Seed of weights and data.
    """

    family: str = "people"
    minutes: float = 60.0
    batch: int = 48
    lr: float = 1e-3
    lr_matrix: float = 1e-3
    ema: float = 0.999
    reference_share: float = 0.75
    companion_share: float = 0.3
    num_heads: int = 4
    subject_weight: float = 3.0
    top_weight: float = 3.0
    guidance_max: float = 4.0
    pool: int = 24_000
    autocast: bool = False
    compile_blocks: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        if self.family not in FAMILIES:
            raise UserError(f"family must be one of {tuple(FAMILIES)}, got {self.family!r}")
        if self.minutes <= 0 or self.batch < 1 or self.lr <= 0 or self.pool < self.batch:
            raise UserError(f"minutes, batch, lr must be positive and pool at least batch, got {self}")
        if self.subject_weight < 0 or self.top_weight < 0 or self.guidance_max < 1:
            raise UserError(f"weights must not be negative and guidance_max at least 1, got {self}")


class BaseBatch(NamedTuple):
    """images (b, 64, d) and references (b, 16, d) as tokens, coverage (b, 64, 2) by subjects and by their upper halves in [0, 1], captions."""

    images: Tensor
    references: Tensor | None
    coverage: Tensor
    captions: list[str]


def upper_half(masks: Float[Tensor, "b m H W"]) -> Float[Tensor, "b m H W"]:
    """Each mask cut off below the middle of its extent.

    >>> upper_half(torch.ones(1, 1, 4, 1)).flatten().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    rows = torch.arange(masks.shape[2])
    inside = masks.amax(3) > 0.5
    first = torch.where(inside, rows, masks.shape[2]).amin(2, keepdim=True)
    last = torch.where(inside, rows, -1).amax(2, keepdim=True)
    return masks * (rows <= (first + last) / 2)[..., None]


class LatentPool:
    """A rolling pool of encoded samples: packed image tokens, packed reference tokens, captions."""

    def __init__(self, vae: AutoencoderKL, config: WorldConfig, capacity: int, generator: torch.Generator) -> None:
        self.vae, self.config, self.capacity, self.generator = vae, config, capacity, generator
        self.images: list[Tensor] = []
        self.references: list[Tensor] = []
        self.coverage: list[Tensor] = []
        self.captions: list[str] = []
        self.cursor = 0

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Draws and encodes ``count`` new samples; the oldest give way."""
        scenes = make_scenes(count, self.config, self.generator)
        with fast_autocast():
            images = pack_latents(encode_images(self.vae, scenes.images)).to(torch.bfloat16)
            references = pack_latents(encode_images(self.vae, scenes.references[:, 0])).to(torch.bfloat16)
        covers = torch.stack([scenes.masks, upper_half(scenes.masks)], 2).sum(1).clamp(0, 1)
        coverage = torch.nn.functional.adaptive_avg_pool2d(covers, 8).flatten(2).transpose(1, 2)
        captions = scenes.captions(FAMILIES[self.config.family])
        for image, reference, cover, text in zip(images, references, coverage, captions, strict=True):
            if len(self.images) < self.capacity:
                self.images.append(image)
                self.references.append(reference)
                self.coverage.append(cover)
                self.captions.append(text)
            else:
                at = self.cursor
                self.images[at], self.references[at], self.coverage[at], self.captions[at] = (
                    image,
                    reference,
                    cover,
                    text,
                )
                self.cursor = (at + 1) % self.capacity

    def draw(self, count: int) -> BaseBatch:
        """A random batch."""
        rows = torch.randint(len(self.images), (count,), generator=self.generator).tolist()
        images, references, coverage = (
            torch.stack([part[i] for i in rows]).float() for part in (self.images, self.references, self.coverage)
        )
        return BaseBatch(images, references, coverage, [self.captions[i] for i in rows])


def _optimizers(pipe: FluxPipeline, config: BaseConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    named = [
        (name, p)
        for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
        for name, p in module.named_parameters()
    ]
    hidden = [p for n, p in named if config.lr_matrix and p.ndim == 2 and "transformer_blocks" in n]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    found: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True), config.lr)
    ]
    if hidden:
        if not has_bfloat16():
            warnings.warn(
                "torch's Muon computes in bfloat16, which this processor emulates: expect a quarter of the steps in the same time",
                stacklevel=2,
            )
        muon = torch.optim.Muon(
            hidden, lr=config.lr_matrix, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
        )
        found.append((muon, config.lr_matrix))
    return found


def _batches(
    pools: list[tuple[LatentPool, float]], config: BaseConfig, generator: torch.Generator
) -> Iterator[BaseBatch]:
    shares = torch.tensor([share for _, share in pools])
    while True:
        index = int(torch.multinomial(shares, 1, generator=generator))
        pool = pools[index][0]
        pool.add(config.batch if len(pool.images) < pool.capacity // 4 else config.batch // 4)
        batch = pool.draw(config.batch)
        yield batch._replace(references=None) if index == 0 else batch


def with_guidance(pipe: FluxPipeline, config: BaseConfig) -> FluxPipeline:
    """The pipeline, its transformer with a guidance embedding where the configuration needs one: zero at first, so that no output changes."""
    from diffusers import FluxTransformer2DModel

    if config.guidance_max == 1 or pipe.transformer.config.guidance_embeds:
        return pipe
    transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, "guidance_embeds": True})
    transformer.load_state_dict(pipe.transformer.state_dict(), strict=False)
    last = transformer.time_text_embed.guidance_embedder.linear_2
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    pipe.register_modules(transformer=transformer)
    return pipe


@torch.no_grad()
def guided_target(
    teacher: Callable[..., Tensor], velocity: Tensor, guidance: Float[Tensor, " b"], given: dict[str, Any]
) -> Tensor:
    """``target(g) = velocity + (g - 1) * (v(reference) - v(caption alone))`` (model guidance, arXiv 2502.12154).

    Args:
        teacher: The averaged model at guidance 1, without gradients.
        velocity: ``noise - latents`` (b, n, d).
        guidance: g of each row.
        given: ``references`` and ``reference_grids`` of the rows.
    """
    push = teacher(**given) - teacher(references=(), reference_grids=())
    return velocity + (guidance - 1)[:, None, None] * push


def _loss(
    pipe: FluxPipeline, teacher: torch.nn.Module, batch: BaseBatch, config: BaseConfig, generator: torch.Generator
) -> Tensor:
    """Flow matching with weight on the subjects; half of the rows with a reference aim at a guided velocity."""
    images, references, coverage, captions = batch
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.sigmoid(torch.randn(len(images), generator=generator))
    guidance = 1 + (config.guidance_max - 1) * torch.rand(len(images), generator=generator)
    half = len(images) // 2
    guidance[half:] = 1.0
    noisy, text, target = add_noise(images, noise, sigma), encode_prompts(pipe, captions), noise - images
    given: dict[str, Any] = {}
    if references is not None:
        given = {"references": (references,), "reference_grids": ((4, 4),)}
        if config.guidance_max > 1:
            fixed = partial(
                predict_velocity, teacher, noisy[:half], sigma[:half], text.rows(slice(half)), image_grid=(8, 8)
            )
            rows = {"references": (references[:half],), "reference_grids": ((4, 4),)}
            target = torch.cat([guided_target(fixed, target[:half], guidance[:half], rows), target[half:]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.autocast):
        velocity = predict_velocity(pipe.transformer, noisy, sigma, text, image_grid=(8, 8), guidance=guidance, **given)
    weight = 1 + coverage @ torch.tensor([config.subject_weight, config.top_weight])
    return ((velocity.float() - target).square().mean(2) * weight / weight.mean()).mean()


def train(
    vae_folder: Path, out: Path, config: BaseConfig, *, start: Path | None = None, save_minutes: float = 10.0
) -> dict[str, Any]:
    """Trains the base on a VAE, from scratch or from ``start``; writes a diffusers directory of averaged weights now and then."""
    from diffusers import AutoencoderKL, FluxPipeline

    pipe = build_pipeline(
        TinyFluxConfig(num_heads=config.num_heads, guidance_embeds=config.guidance_max > 1), seed=config.seed
    )
    if start is not None:
        pipe = with_guidance(FluxPipeline.from_pretrained(start, torch_dtype=torch.float32), config)
    pipe.register_modules(vae=AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False))
    generator = torch.Generator().manual_seed(config.seed)
    text_only = LatentPool(
        pipe.vae,
        WorldConfig(numbers=(1, 2, 3, 4), weights=(2, 4, 1, 1), family=config.family),
        config.pool // 4,
        generator,
    )
    numbers = WorldConfig(
        numbers=(1, 2), weights=(1 - config.companion_share, config.companion_share), family=config.family
    )
    pools = [
        (text_only, 1 - config.reference_share),
        (LatentPool(pipe.vae, numbers, config.pool, generator), config.reference_share),
    ]
    optimizers = _optimizers(pipe, config)
    trained = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    averaged = [copy.deepcopy(m).requires_grad_(False) for m in trained]
    if config.compile_blocks:
        torch._dynamo.config.automatic_dynamic_shapes = False
        for module in (pipe.transformer, averaged[0]):
            for block in (*module.transformer_blocks, *module.single_transformer_blocks):
                block.compile()
    seconds, last, saved = 0.0, time.monotonic(), 0.0
    history: list[dict[str, float]] = []
    running = 0.0
    bar = tqdm(total=100, unit="%", desc="base")
    for step, batch in enumerate(_batches(pools, config, generator), start=1):
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 10.0), now
        progress = seconds / (60 * config.minutes)
        if progress >= 1:
            break
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, step / 100) * min(1.0, (1 - progress) / 0.6)
        loss = _loss(pipe, averaged[0], batch, config, generator)
        for optimizer, _ in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for m in trained for p in m.parameters()], 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, module in zip(averaged, trained, strict=True):
                torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in module.parameters()], 1 - decay)
        running += (loss.item() - running) * max(0.01, 1 / step)
        if step % 50 == 0:
            history.append({"step": step, "seconds": round(seconds, 1), "loss": round(running, 5)})
            bar.update(int(100 * progress) - bar.n)
            bar.set_postfix(step=step, loss=f"{running:.4f}")
        if seconds - saved > 60 * save_minutes:
            _save(pipe, averaged, out, config, history)
            saved = seconds
    bar.close()
    return _save(pipe, averaged, out, config, history)


def _save(
    pipe: FluxPipeline, averaged: list[torch.nn.Module], out: Path, config: BaseConfig, history: list[dict[str, float]]
) -> dict[str, Any]:
    halves = [copy.deepcopy(m).half() for m in averaged]
    names = ("transformer", "text_encoder", "text_encoder_2")
    original = {name: getattr(pipe, name) for name in names}
    vae = pipe.vae
    pipe.register_modules(**dict(zip(names, halves, strict=True)), vae=copy.deepcopy(vae).half())
    pipe.save_pretrained(out)
    pipe.register_modules(**original, vae=vae)
    report = {
        "config": asdict(config),
        "samples": history[-1]["step"] * config.batch if history else 0,
        "history": history[:: max(1, len(history) // 60)],
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="directory of a base to go on from")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--compile-blocks", action="store_true")
    for name, kind in (
        ("minutes", float),
        ("lr", float),
        ("lr-matrix", float),
        ("seed", int),
        ("pool", int),
        ("batch", int),
        ("ema", float),
        ("reference-share", float),
        ("top-weight", float),
        ("guidance-max", float),
        ("num-heads", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(BaseConfig, name.replace("-", "_")))
    parser.add_argument("--family", default="people", choices=tuple(FAMILIES))
    options = vars(parser.parse_args())
    vae, out, start = options.pop("vae"), options.pop("out"), options.pop("start")
    train(vae, out, BaseConfig(**options), start=start)


if __name__ == "__main__":
    main()
