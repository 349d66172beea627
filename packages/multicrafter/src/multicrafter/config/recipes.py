"""Named configurations: the ablation at the scale of the tiny world (`tiny`, `ablation`), and runs on real models.

A run (`Stage1`, `Stage2`) is everything that a command needs. Values are marked "paper" (arXiv 2509.21953, section 4.1), "ours, see" the
study in docs/results that they come from, or "ours"; `save` writes them as YAML, which ``--config`` runs again as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from gspo import OnlineConfig, PolicyConfig, SlidingWindow

from multicrafter import UserError
from multicrafter.config import settings
from multicrafter.config.provenance import provenance
from multicrafter.files import write_whole
from multicrafter.models.adapters import AdapterConfig
from multicrafter.models.binding import BindingConfig
from multicrafter.models.checks import check_finite
from multicrafter.scoring.evaluate import EvaluateConfig
from multicrafter.training.align_config import AlignConfig, online_defaults
from multicrafter.training.optimization import ScheduleConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.pretrain_config import IDARConfig, PretrainConfig, SamplingConfig, SeparationConfig
from multicrafter.training.watching import WatchConfig
from multicrafter.world import WorldConfig


class Recipe(NamedTuple):
    """Stage 1, stage 2 (None: left out), evaluation."""

    pretrain: PretrainConfig
    align: AlignConfig | None
    evaluate: EvaluateConfig


def tiny_align(*, seed: int = 0) -> AlignConfig:
    """Stage 2 in the settings that have a gradient (docs/results/stage2.md, docs/adr/0095); the paper's schedule is `online_defaults`.

    The window stays at the first steps, rollouts are bound as pictures are, rewards are normalised one by one, the rate falls, averaged
    weights are kept, and a judge that is not trained on watches.
    """
    return AlignConfig(
        prompts=16,
        online=OnlineConfig(
            window=SlidingWindow(16, size=2, interval=1, strategy="fixed"), tail_steps=5, policy=PolicyConfig(num_inner_epochs=1), seed=seed
        ),
        separation=BindingConfig(mode="draft"),
        guidance=3.5,
        schedule=ScheduleConfig(warmup_steps=2, decay="linear"),
        reward_normalization="each",
        keep="average",
        watch=WatchConfig(action="warn"),
        execution=ExecutionConfig(ema_decay=0.9),
    )  # fmt: skip


def tiny(*, seed: int = 0) -> Recipe:
    """Everything: attention supervised and separated, mixture of LoRA experts, policy optimization; pictures bound by their own draft."""
    drawn = SamplingConfig(num_sampling_steps=16, guidance=3.5)
    return Recipe(
        PretrainConfig(seed=seed, separation=SeparationConfig(), sampling=drawn),
        tiny_align(seed=seed),
        EvaluateConfig(
            num_sampling_steps=drawn.num_sampling_steps,
            guidance=drawn.guidance or 1.0,
            separation=BindingConfig(mode="draft"),
        ),
    )


def ablation(*, seed: int = 0) -> dict[str, Recipe]:
    """The four rows of the paper's ablation, each adding one part, the attention loss as the paper writes it, and separated attention.

    Same data, steps and seed; plain LoRA has the rank at which it trains about as many parameters as one active expert.
    """
    full = Recipe(PretrainConfig(seed=seed), AlignConfig(online=online_defaults(seed=seed)), EvaluateConfig())
    plain = AdapterConfig(num_experts=0)
    stage1 = full.pretrain
    rows = {
        "baseline": replace(stage1, adapters=plain, idar=replace(stage1.idar, coef=0.0)),
        "idar": replace(stage1, adapters=plain),
        "idar_paper": replace(stage1, adapters=plain, idar=IDARConfig.paper()),
        "moe": stage1,
    }
    recipes = {name: Recipe(config, None, full.evaluate) for name, config in rows.items()}
    whole = tiny(seed=seed)
    apart = replace(rows["baseline"], separation=SeparationConfig())
    studied = whole._replace(align=full.align)  # its stage 2 is the paper's, as in "ippo"
    return {**recipes, "ippo": full, "separation": Recipe(apart, None, whole.evaluate), "full": studied}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base of a run.

    Attributes:
        path: Folder or hub id; None is the tiny FLUX that ships.
        backbone: A name of `multicrafter.models.backbones`, or ``module:class`` of your own.
        text_tokens: Length of an encoded prompt (for `multicrafter plan`, which sees no tokenizer).
    """

    path: str | None = None
    backbone: str = "flux1_dev"
    text_tokens: int = 512

    def __post_init__(self) -> None:
        check_finite(self)
        if self.text_tokens < 1:
            raise UserError(f"text_tokens must be at least 1, got {self.text_tokens}")


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """A run of stage 1: the base and what is trained on it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    @property
    def world(self) -> WorldConfig:
        """Sizes and numbers of what is drawn."""
        return self.pretrain.world

    @property
    def execution(self) -> ExecutionConfig:
        """How it is computed."""
        return self.pretrain.execution

    @property
    def adapters(self) -> AdapterConfig:
        """What is trained."""
        return self.pretrain.adapters


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """A run of stage 2: the base, the stage-1 adapter's shape (for `multicrafter plan`), scenes to draw prompts from.

    Attributes:
        model: The base.
        adapters: Shape of the adapter; a real run takes it from the adapter's own file.
        align: What is trained, and how.
        world: Sizes and numbers of the scenes.
        num_scenes: Scenes drawn.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    world: WorldConfig = field(default_factory=lambda: WorldConfig(numbers=(2,), shared_attributes=4))
    num_scenes: int = 512

    @property
    def execution(self) -> ExecutionConfig:
        """How it is computed."""
        return self.align.execution


Run = Stage1 | Stage2
PAPER_ADAPTERS = AdapterConfig(rank=512, alpha=512.0, num_experts=4, top_k=1)
PAPER_WORLD = WorldConfig(numbers=(2,), shared_attributes=4, size=512, reference_size=320)
LEAN = ExecutionConfig(dtype="bfloat16", gradient_checkpointing=True, micro_batch=1, parallel="fsdp")


def flux1_dev_stage1(*, seed: int = 0) -> Stage1:
    """FLUX.1-dev with the paper's sizes: 512-pixel pictures, 320-pixel references, rank 512, 4 experts, one a token."""
    return Stage1(
        model=ModelConfig(path="black-forest-labs/FLUX.1-dev"),
        pretrain=PretrainConfig(
            num_steps=10_000,
            batch=8,
            lr=1e-4,
            num_scenes=20_000,
            seed=seed,
            adapters=PAPER_ADAPTERS,
            separation=SeparationConfig(),
            world=PAPER_WORLD,
            execution=LEAN,
        ),
    )


def flux1_dev_stage2(*, seed: int = 0) -> Stage2:
    """FLUX.1-dev with the paper's rollouts: 16 steps, a window of 2 that moves every 50 iterations."""
    return Stage2(
        model=ModelConfig(path="black-forest-labs/FLUX.1-dev"),
        adapters=PAPER_ADAPTERS,
        align=AlignConfig(
            num_steps=700, prompts=8, lr=1e-5, execution=LEAN,
            online=OnlineConfig(
                window=SlidingWindow(16, size=2, interval=50), group_size=12, policy=PolicyConfig(micro_batch_size=1), seed=seed
            ),
        ),
        world=PAPER_WORLD,
    )  # fmt: skip


ONE_CARD = replace(LEAN, parallel="ddp")
QUANTIZED = replace(ONE_CARD, quantization="nf4", optimizer="adamw8bit")
FLUX2_KLEIN = ModelConfig(path="black-forest-labs/FLUX.2-klein-base-4B", backbone="flux2_klein")
FLUX2_DEV = ModelConfig(path="black-forest-labs/FLUX.2-dev", backbone="flux2_dev")
QWEN_IMAGE_21 = ModelConfig(path="Qwen/Qwen-Image-2.1", backbone="qwen_image_21")
QWEN_IMAGE_EDIT = ModelConfig(path="Qwen/Qwen-Image-Edit-2511", backbone="qwen_image_edit")


def _stage1_on(model: ModelConfig, *, rank: int, execution: ExecutionConfig, seed: int) -> Stage1:
    """FLUX.1-dev's stage 1 on another base."""
    stage, adapters = flux1_dev_stage1(seed=seed), replace(PAPER_ADAPTERS, rank=rank, alpha=float(rank))
    return replace(stage, model=model, pretrain=replace(stage.pretrain, adapters=adapters, execution=execution))


def _stage2_on(
    model: ModelConfig, *, rank: int, execution: ExecutionConfig, seed: int, guidance: float | None = None
) -> Stage2:
    """FLUX.1-dev's stage 2 on another base."""
    stage, adapters = flux1_dev_stage2(seed=seed), replace(PAPER_ADAPTERS, rank=rank, alpha=float(rank))
    align = replace(stage.align, execution=execution, guidance=stage.align.guidance if guidance is None else guidance)
    return replace(stage, model=model, adapters=adapters, align=align)


def flux2_klein_stage1(*, seed: int = 0) -> Stage1:
    """FLUX.2-klein-base 4B (Apache-2.0): the same method with rank 128, for one card of 24 GB."""
    return _stage1_on(FLUX2_KLEIN, rank=128, execution=ONE_CARD, seed=seed)


def flux2_klein_stage2(*, seed: int = 0) -> Stage2:
    """FLUX.2-klein-base 4B, stage 2."""
    return _stage2_on(FLUX2_KLEIN, rank=128, execution=ONE_CARD, seed=seed)


def flux2_dev_stage1(*, seed: int = 0) -> Stage1:
    """FLUX.2-dev (32B, non-commercial): the same method with rank 64 on NF4 weights, for one card of 80 GB.

    Its text encoder takes 48 GB. A card of 40 GB trains it from texts that another machine has encoded (``execution.cache``).
    """
    return _stage1_on(FLUX2_DEV, rank=64, execution=QUANTIZED, seed=seed)


def flux2_dev_stage2(*, seed: int = 0) -> Stage2:
    """FLUX.2-dev, stage 2, sampled at the guidance that is embedded in it."""
    return _stage2_on(FLUX2_DEV, rank=64, execution=QUANTIZED, seed=seed, guidance=4.0)


def qwen_image_edit_stage1(*, seed: int = 0) -> Stage1:
    """Qwen-Image-Edit-2511 (20B, Apache-2.0): the same method with rank 128, in bf16, for one card of 80 GB."""
    return _stage1_on(QWEN_IMAGE_EDIT, rank=128, execution=ONE_CARD, seed=seed)


def qwen_image_edit_stage2(*, seed: int = 0) -> Stage2:
    """Qwen-Image-Edit-2511, stage 2; rollouts are not guided."""
    return _stage2_on(QWEN_IMAGE_EDIT, rank=128, execution=ONE_CARD, seed=seed, guidance=1.0)


def qwen_image_21_stage1(*, seed: int = 0) -> Stage1:
    """Qwen-Image 2.1 (7B, research licence): the same method with rank 128, in bf16, for one card of 24 GB.

    Its text encoder takes 17.5 GB, and leaves the card before the transformer comes.
    """
    return _stage1_on(QWEN_IMAGE_21, rank=128, execution=ONE_CARD, seed=seed)


def qwen_image_21_stage2(*, seed: int = 0) -> Stage2:
    """Qwen-Image 2.1, stage 2; its guidance is distilled in, and no input."""
    return _stage2_on(QWEN_IMAGE_21, rank=128, execution=ONE_CARD, seed=seed, guidance=1.0)


def tiny_stage1(*, seed: int = 0) -> Stage1:
    """Stage 1 of `tiny`."""
    return Stage1(model=ModelConfig(text_tokens=16), pretrain=tiny(seed=seed).pretrain)


def tiny_stage2(*, seed: int = 0) -> Stage2:
    """Stage 2 of `tiny`."""
    return Stage2(model=ModelConfig(text_tokens=16), align=tiny_align(seed=seed))


RECIPES: dict[str, Callable[..., Run]] = {
    f.__name__: f
    for f in (
        tiny_stage1,
        tiny_stage2,
        flux1_dev_stage1,
        flux1_dev_stage2,
        flux2_klein_stage1,
        flux2_klein_stage2,
        flux2_dev_stage1,
        flux2_dev_stage2,
        qwen_image_edit_stage1,
        qwen_image_edit_stage2,
        qwen_image_21_stage1,
        qwen_image_21_stage2,
    )
}


def get_recipe(name: str, *, seed: int = 0) -> Run:
    """A run by its recipe's name.

    Raises:
        ValueError: No such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name](seed=seed)


def resolve(
    *, recipe: str | None = None, config: str | Path | None = None, changes: Sequence[str] = (), seed: int = 0
) -> Run:
    """A run from a recipe or a file that `save` wrote, with overrides.

    Raises:
        ValueError: Neither or both are given, or something in them is wrong.
    """
    if (recipe is None) == (config is None):
        raise UserError("a recipe or a configuration must be given, got " + ("both" if recipe else "neither"))
    if recipe is not None:
        return settings.override(get_recipe(recipe, seed=seed), changes)
    content = settings.read(str(config))
    cls: type[Run] = Stage2 if "align" in content else Stage1
    try:
        run = settings.from_dict(cls, content)
    except ValueError as error:
        raise UserError(f"{config}: {error}") from error
    return settings.override(run, changes)


def save(path: Path, run: Run) -> Path:
    """Writes a run as YAML, every value with its mark; `resolve` reads it back as it was."""
    write_whole(path, settings.as_yaml(settings.to_dict(run), provenance(run)))
    return path
