"""The command line: ``multicrafter demo | data | pretrain | align | generate | evaluate | report``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROWS = (
    "baseline",
    "idar",
    "idar_paper",
    "moe",
    "ippo",
)  # keys of `recipes.ablation`, which is not imported for --help alone


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for name in (
        "bitsandbytes",
        "torch.utils._pytree",
        "torch.utils.cpp_extension",
    ):  # what diffusers imports where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)


def _writable(path: Path) -> None:
    """Fails before the work, not after it."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {path} must be writable, but {folder} is not a folder that can be written to")
    if path.is_dir() and path.suffix:
        raise ValueError(f"--out {path} must be a file, but it is a folder")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _number(given: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--lora must be FILE or FILE=WEIGHT, got {given!r}") from None


def generate(arguments: argparse.Namespace) -> int:
    """Pictures from references."""
    from id_reward.images import open_image
    from tqdm import tqdm

    from multicrafter.models.backbones import get_backbone
    from multicrafter.pipeline import MultiCrafterPipeline

    if not arguments.reference:
        raise ValueError("--reference must be given at least once, got none")
    if not arguments.prompt.strip():
        raise ValueError("--prompt must not be empty")
    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out must end in .png, .jpg or .webp, got {str(arguments.out)!r}")
    _writable(arguments.out)
    references = [open_image(path) for path in arguments.reference]
    if arguments.model is not None:
        from multicrafter.models.loading import get_dtype
        from multicrafter.plan import require_weights

        require_weights(arguments.model, get_dtype(arguments.dtype), device=arguments.device)
    pipeline = MultiCrafterPipeline.from_pretrained(
        arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, device=arguments.device,
        backbone=get_backbone(arguments.backbone) if arguments.backbone else None,
    )  # fmt: skip
    for given in arguments.lora:
        path, _, weight = given.rpartition("=")
        pipeline.load_lora(path or weight, weight=_number(given, weight) if path else 1.0)
    if len(references) > pipeline.max_references:
        what = "the adapter was" if arguments.adapter else "a base without adapter is"
        print(
            f"warning: {len(references)} references, but {what} trained for {pipeline.max_references}; expect blending",
            file=sys.stderr,
        )
    with tqdm(total=arguments.steps, desc="generate", disable=not sys.stderr.isatty()) as bar:
        pictures = pipeline(
            arguments.prompt, references, num_images=arguments.num_images, num_steps=arguments.steps, seed=arguments.seed,
            guidance=arguments.guidance, negative_prompt=arguments.negative_prompt, true_guidance=arguments.true_guidance,
            size=arguments.size, reference_size=arguments.reference_size, progress=lambda _: bar.update(),
        )  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        path = arguments.out if len(pictures) == 1 else arguments.out.with_stem(f"{arguments.out.stem}_{index}")
        temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
        picture.save(temporary)
        os.replace(temporary, path)
        print(path)
    return 0


def _load(run: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The base of a run, after a look at whether it fits into memory, and its backbone."""
    from multicrafter.models.backbones import backbone_of, get_backbone
    from multicrafter.pipeline import load_flux
    from multicrafter.plan import require_memory
    from multicrafter.training.distributed import world_size

    own = get_backbone(run.model.backbone) if ":" in run.model.backbone else None
    if run.model.path is not None:
        require_memory(run, device=arguments.device, gpus=world_size())
    pipe = load_flux(run.model.path, dtype=run.execution.torch_dtype, backbone=own)
    if arguments.device is not None:
        pipe.to(arguments.device)
    return pipe, own or backbone_of(pipe)


def _tracker(arguments: argparse.Namespace, run: Any) -> Any:
    """The tracker that --tracker names, said before the work if its package is missing; TensorBoard where it is installed."""
    from dataclasses import asdict
    from importlib.util import find_spec

    from multicrafter.training.trackers import make_tracker

    kind = arguments.tracker or ("tensorboard" if find_spec("tensorboard") else "none")
    return make_tracker(kind, arguments.out, config=asdict(run))


def _together(arguments: argparse.Namespace, function: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command as one of the processes that torchrun started, on this process's GPU where there is one."""
    from multicrafter.training.distributed import session

    with session() as device:
        if device.type != "cpu" and arguments.device is None:
            arguments.device = str(device)
        return function(arguments)


def pretrain(arguments: argparse.Namespace) -> int:
    """Stage 1, on one process or, under torchrun, on several."""
    return _together(arguments, _pretrain)


def _pretrain(arguments: argparse.Namespace) -> int:
    from multicrafter.config import recipes
    from multicrafter.config.recipes import ModelConfig, Stage1, ablation
    from multicrafter.config.run_options import annotate, chosen
    from multicrafter.training.distributed import is_main
    from multicrafter.training.runs import run_pretrain

    _writable(arguments.out)
    config = ablation(seed=arguments.seed)[arguments.row].pretrain
    flags = {
        "pretrain.num_steps": arguments.steps,
        "pretrain.batch": arguments.batch,
        "pretrain.num_scenes": arguments.scenes,
        "pretrain.idar.coef": arguments.idar_coef,
        "pretrain.world.numbers": None if arguments.references is None else [arguments.references],
    }
    run = chosen(arguments, Stage1(model=ModelConfig(path=arguments.model, text_tokens=16), pretrain=config), flags)
    assert isinstance(run, Stage1)
    if arguments.data is not None:
        run = replace(run, pretrain=_with_photos(run.pretrain, arguments))
    pipe, _ = _load(run, arguments)
    if is_main():
        recipes.save(arguments.out / "recipe.yaml", run)
    run_pretrain(pipe, run.pretrain, arguments.out, resume=arguments.resume, tracker=_tracker(arguments, run))
    if is_main():
        world = run.world
        annotate(arguments.out, size=world.size, reference_size=world.reference_size, base_model=run.model.path)
        print(f"adapter: {arguments.out / 'adapter'}")
    return 0


def _with_photos(config: Any, arguments: argparse.Namespace) -> Any:
    """The configuration on the photos of --data: every record once, or --scenes samples."""
    from multicrafter.training.photo_scenes import training_records

    if arguments.references is not None:
        raise ValueError(
            "--references is for drawn scenes, but --data is given: each photo says how many people are on it"
        )
    count = len(training_records(arguments.data))
    return replace(config, data=str(arguments.data.absolute()), num_scenes=arguments.scenes or count)


def align(arguments: argparse.Namespace) -> int:
    """Stage 2, on one process or, under torchrun, on several."""
    return _together(arguments, _align)


def _align(arguments: argparse.Namespace) -> int:
    from multicrafter.config import recipes
    from multicrafter.config.recipes import ModelConfig, Stage2, tiny
    from multicrafter.config.run_options import annotate, chosen
    from multicrafter.models.adapters import Adapters
    from multicrafter.training.distributed import is_main
    from multicrafter.training.runs import run_align
    from multicrafter.training.scenes import encode_scenes

    _writable(arguments.out)
    config = tiny(seed=arguments.seed).align
    assert config is not None
    flags = {
        "align.num_steps": arguments.steps,
        "align.prompts": arguments.prompts,
        "align.group_size": arguments.group_size,
    }
    run = chosen(arguments, Stage2(model=ModelConfig(path=arguments.model, text_tokens=16), align=config), flags)
    assert isinstance(run, Stage2)
    pipe, backbone = _load(run, arguments)
    adapters, notes = Adapters.load(pipe.transformer, arguments.adapter, backbone=backbone)
    number = int(notes.get("num_references", 1))
    world = replace(run.world, numbers=(number,))
    run = replace(run, world=world, adapters=adapters.config)
    if is_main():
        recipes.save(arguments.out / "recipe.yaml", run)
    scenes = encode_scenes(pipe, world, run.num_scenes, seed=run.align.seed + 10_000, cache=run.execution.cache)
    run_align(
        pipe, adapters, run.align, arguments.out, num_references=number, scenes=scenes, resume=arguments.resume,
        tracker=_tracker(arguments, run),
    )  # fmt: skip
    if is_main():
        annotate(arguments.out, size=world.size, reference_size=world.reference_size, base_model=run.model.path)
        print(f"adapter: {arguments.out / 'adapter'}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Metrics on unseen identities; with --pictures, of any model's pictures."""
    if arguments.pictures is not None:
        from multicrafter.cli.compare import score

        return score(arguments)
    from multicrafter.pipeline import MultiCrafterPipeline
    from multicrafter.scoring.evaluate import METRICS, EvaluateConfig, Judges, cases, summarise, table, write_json
    from multicrafter.scoring.evaluate import evaluate as run
    from multicrafter.world import judges

    if arguments.out is not None:
        _writable(arguments.out)
    loaded = MultiCrafterPipeline.from_pretrained(arguments.model, adapter=arguments.adapter)
    config = EvaluateConfig(
        num_cases=arguments.cases, num_references=arguments.references or loaded.max_references, seed=arguments.seed
    )
    metrics, _ = run(loaded.pipe, cases(loaded.pipe, config), Judges.load(), config)
    summary = summarise(metrics)
    print(table({str(arguments.adapter or "base"): summary}))
    for judge, measured in judges.accuracy().items():
        print(f"judge {judge}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
    if arguments.out is not None:
        write_json(
            arguments.out, {"summary": summary, "what": METRICS, "cases": {k: v.tolist() for k, v in metrics.items()}}
        )
        print(f"written to {arguments.out}")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    """Both stages, evaluation, report."""
    from multicrafter.demo.both_stages import DemoConfig, run

    _writable(arguments.out)
    config = DemoConfig(seed=arguments.seed)
    for name in ("stage1_steps", "stage2_steps", "scenes", "cases"):
        value = getattr(arguments, name)
        config = config if value is None else replace(config, **{name: value})
    run(arguments.out, config, model=arguments.model, resume=arguments.resume)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """The HTML report of a finished demo, written anew."""
    from multicrafter.demo.report import write_report

    if not (arguments.run / "results.json").is_file():
        raise ValueError(f"run must be a folder of a finished demo, but {arguments.run} has no results.json")
    print(write_report(arguments.run))
    return 0


def _training_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--resume", nargs="?", const="auto", default=False, metavar="auto|CHECKPOINT",
        help="go on from the newest good checkpoint in --out (auto, also without a value), or from this one",
    )  # fmt: skip
    sub.add_argument(
        "--tracker", choices=("tensorboard", "wandb", "trackio", "none"), help="default: tensorboard, into --out"
    )


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    from multicrafter.cli.plan import add_parser as add_plan
    from multicrafter.config.run_options import add_options

    top = argparse.ArgumentParser(
        prog="multicrafter", description="Several given subjects in one picture, nobody blended."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Any, *, model: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        if model:
            sub.add_argument(
                "--model", help="FLUX directory in diffusers format, or hub id; default: the tiny one that ships"
            )
            sub.add_argument("--seed", type=int, default=0)
        return sub

    sub = command("generate", generate)
    sub.add_argument(
        "--reference",
        type=Path,
        action="append",
        default=[],
        metavar="PICTURE",
        help="once per subject; PNG, JPEG or WebP",
    )
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--adapter", type=Path, help="folder written by pretrain, align or demo")
    sub.add_argument("--num-images", type=_positive, default=1)
    sub.add_argument("--steps", type=_positive, default=20)
    sub.add_argument("--guidance", type=float, help="embedded guidance; default: the backbone's")
    sub.add_argument("--negative-prompt", default="", help="used with --true-guidance")
    sub.add_argument("--true-guidance", type=float, help="scale of a second, negative pass; default: the backbone's")
    sub.add_argument("--size", type=_positive, help="side of the picture in pixels")
    sub.add_argument("--reference-size", type=_positive, help="side of the references in pixels")
    sub.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="a plain LoRA to mix in; may be repeated"
    )
    sub.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--backbone", metavar="NAME", help="module:class of a backbone of your own")

    sub = command("pretrain", pretrain)
    add_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument(
        "--row", default="moe", choices=("baseline", "idar", "idar_paper", "moe"), help="row of the ablation"
    )
    sub.add_argument("--steps", type=_positive)
    sub.add_argument("--batch", type=_positive)
    sub.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="photos of multicrafter data build to train on; default: drawn scenes",
    )
    sub.add_argument(
        "--scenes",
        type=_positive,
        help="training scenes drawn; with --data samples of the photos, default: each photo once",
    )
    sub.add_argument("--references", type=int, choices=(2, 3, 4), help="subjects of a drawn scene")
    sub.add_argument("--idar-coef", type=float)
    _training_options(sub)

    sub = command("align", align)
    add_options(sub)
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    sub.add_argument("--adapter", type=Path, required=True, help="stage-1 adapter")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--steps", type=_positive)
    sub.add_argument("--prompts", type=_positive)
    sub.add_argument("--group-size", type=_positive)
    _training_options(sub)

    sub = command("evaluate", evaluate)
    sub.set_defaults(seed=1000)
    sub.add_argument("--adapter", type=Path)
    sub.add_argument("--cases", type=_positive, default=128)
    sub.add_argument("--references", type=int, choices=(1, 2, 3, 4))
    sub.add_argument("--out", type=Path, help="JSON")

    sub = command("demo", demo)
    sub.add_argument("--out", type=Path, default=Path("runs/demo"))
    sub.add_argument("--stage1-steps", type=_positive)
    sub.add_argument("--stage2-steps", type=_positive)
    sub.add_argument("--scenes", type=_positive, help="training scenes drawn")
    sub.add_argument("--cases", type=_positive)
    sub.add_argument("--resume", action="store_true")

    from multicrafter.cli.compare import add_options as add_scoring
    from multicrafter.cli.compare import add_parser as add_comparing
    from multicrafter.cli.data import add_parser as add_data

    add_data(commands)
    add_scoring(commands.choices["evaluate"])
    add_comparing(commands)
    sub = command("report", report, model=False)
    sub.add_argument("run", type=Path)

    add_plan(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input, 130 when stopped."""
    _quiet()
    arguments = parser().parse_args(argv)
    from multicrafter.training.loop import Interrupted

    try:
        return int(arguments.function(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
