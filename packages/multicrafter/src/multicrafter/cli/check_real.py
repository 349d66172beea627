"""``multicrafter check-real``: does everything run with published weights on this machine, and does it take what the plan says?"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multicrafter import UserError, __version__
from multicrafter.cli.options import room, seed, writable

FORMAT = 1
STEPS = 10
REPORT_BYTES = 20e6
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "bitsandbytes", "torchao")


@dataclass(kw_only=True)
class Part:
    """One thing that was tried.

    Attributes:
        name: What.
        ok: Whether it ran to its end.
        seconds: It took; of the training, the median step.
        predicted_seconds: By the plan; None where it says nothing.
        peak_bytes: Of the device at most, as its allocator counts; None on a CPU, where nobody counts.
        predicted_bytes: By the plan.
        facts: What else came out.
        error: What went wrong, without paths.
    """

    name: str
    ok: bool = False
    seconds: float = 0.0
    predicted_seconds: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def check_real(arguments: argparse.Namespace) -> int:
    """Try everything once with real weights, compare memory and time with the plan, and write a report that can be sent back."""
    import torch

    from multicrafter.files import write_json, write_whole
    from multicrafter.models.loading import get_device

    writable(arguments.out, file=False)
    for name in ("report.json", "report.html"):
        if os.path.lexists(arguments.out / name):
            raise UserError(f"--out must be a folder without a report, but {arguments.out} holds {name}")
    device = get_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    one, two = runs(arguments)
    room(arguments.out, REPORT_BYTES, what="the report")
    room(Path(tempfile.gettempdir()), encoded_bytes(one) + encoded_bytes(two), what="encoded texts and pictures")
    with tempfile.TemporaryDirectory(prefix="check_real_") as cache:
        check = Check(one, two, device, Path(cache))
        check.run()
    content = check.content(source(one.model.path))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "report.json", content)
    write_whole(arguments.out / "report.html", page(content, check.pictures))
    failed = [part.name for part in check.parts if not part.ok]
    print(
        f"report: {arguments.out / 'report.html'} and report.json, which can be sent back: they hold no paths and no names"
    )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def runs(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Both stages as they are tried: the recipes of the backbone, cut to ten steps and one iteration.

    Raises:
        UserError: There is no recipe, a change names no stage, or nothing can be trained on the backbone.
    """
    from multicrafter.config import settings
    from multicrafter.config.recipes import RECIPES, get_recipe
    from multicrafter.models.backbones import get_backbone

    name, path = arguments.backbone, arguments.model
    stem = "tiny" if name is None else "flux1_dev" if name == "flux1_kontext" else name
    if f"{stem}_stage1" not in RECIPES:
        known = sorted({n.rpartition("_stage")[0] for n in RECIPES} - {"tiny"} | {"flux1_kontext"})
        raise UserError(f"--backbone must be one that has a recipe, one of {', '.join(known)}, got {name!r}")
    if name is None and path is not None:
        raise UserError("--backbone must be given with --model, got none")
    found = []
    for stage, prefix in ((1, "pretrain."), (2, "align.")):
        run: Any = get_recipe(f"{stem}_stage{stage}", seed=arguments.seed)
        if name is not None:
            backbone = get_backbone(name)
            run = replace(run, model=replace(run.model, backbone=name, path=path or backbone.hub_id))
        others = ("pretrain.",) if stage == 2 else ("align.", "adapters.", "world.", "num_scenes=")
        mine = [change for change in arguments.changes if not change.startswith(others)]
        found.append(settings.override(run, mine))
        if unknown := [
            c for c in arguments.changes if not c.startswith(("pretrain.", "align.", "adapters.", "world.", "model."))
        ]:
            raise UserError(
                f"--set must begin with pretrain., align., adapters., world. or model., got {unknown[0]!r} ({prefix}...)"
            )
    one, two = found
    one = replace(
        one, pretrain=replace(one.pretrain, num_steps=STEPS, num_scenes=max(2, one.pretrain.batch), data=None)
    )
    two = replace(two, adapters=one.adapters, world=one.world, num_scenes=2)
    online = replace(two.align.online, group_size=2, reward_weights={})
    watch = replace(two.align.watch, action="none")  # brightness needs no judge beside it, and is the total
    align = replace(two.align, num_steps=1, prompts=1, online=online, watch=watch, reward_normalization="sum")
    return one, replace(two, align=align)


def encoded_bytes(run: Any) -> float:
    """What the encoded data of a run take at most: twice its texts in float32, which are by far the larger part."""
    from multicrafter.models.backbones import get_backbone

    backbone = get_backbone(run.model.backbone)
    scenes = run.pretrain.num_scenes if hasattr(run, "pretrain") else run.num_scenes
    return float(2 * 4 * scenes * run.model.text_tokens * backbone.full_config[backbone.text_width_name])


class Check:
    """The parts, in order. One that fails is noted, and those that need it are left out."""

    def __init__(self, one: Any, two: Any, device: Any, cache: Path) -> None:
        """Takes both runs, where to compute, and a folder for encoded data that goes away."""
        self.one, self.two, self.device, self.cache = one, two, device, str(cache)
        self.parts: list[Part] = []
        self.pictures: list[tuple[str, Any]] = []
        self.model: Any = None
        self.adapters: Any = None
        self.prompts: Any = None

    def run(self) -> None:
        """Everything."""
        self._try("load", self._load)
        if self.model is None:
            return
        self._try("draw with two references", self._draw)
        self._try("capture attention", self._attention)
        self._try(f"stage 1, {STEPS} steps", self._stage1)
        if self.adapters is not None:
            self._try("stage 2, one iteration", self._stage2)

    def _try(self, name: str, function: Callable[[Part], None]) -> None:
        import torch

        part = Part(name=name)
        self.parts.append(part)
        on_card = self.device.type == "cuda"
        if on_card:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            function(part)
            part.ok = True
        except Exception as error:
            if self.model is None and isinstance(error, UserError):
                raise  # what was given cannot be loaded, and nothing was tried
            part.error = without_paths("".join(traceback.format_exception(error)))
        part.seconds = part.seconds or time.perf_counter() - start
        if on_card:
            part.peak_bytes = int(torch.cuda.max_memory_allocated(self.device))

    def _load(self, part: Part) -> None:
        from multicrafter.models.backbones import get_backbone
        from multicrafter.models.loading import load_model

        base = self.one.model
        model = load_model(base.path, dtype=self.one.execution.torch_dtype, backbone=get_backbone(base.backbone))
        if self.device.type != "cpu":
            model.to(self.device, quantization=self.one.execution.quantization)
        side, world = model.picture_size, self.one.world
        if side < world.size:  # a small stand-in for the published weights
            world = replace(world, size=side, reference_size=side // 2)
            self.one = replace(self.one, pretrain=replace(self.one.pretrain, world=world))
            self.two = replace(self.two, world=world)
        part.facts = {
            "transformer parameters": sum(p.numel() for p in model.transformer.parameters()),
            "picture pixels": world.size,
            "reference pixels": world.reference_size,
        }
        self.model = model

    def _draw(self, part: Part) -> None:
        from PIL import Image

        from multicrafter.pipeline import MultiCrafterPipeline, to_image
        from multicrafter.training.scenes import draw_scenes

        world = self.one.world
        scenes, _ = next(draw_scenes(world, 1, seed=1))
        references = [to_image(r) for r in scenes.references[0]]
        pipeline = MultiCrafterPipeline(self.model.pipe)
        picture: Image.Image = pipeline(
            "two people in the park", references, size=world.size, reference_size=world.reference_size
        )[0]
        part.facts = {"steps": pipeline.num_steps, "passes": pipeline.bindings[0].num_function_evaluations}
        self.pictures += [*((f"reference {i + 1}", r) for i, r in enumerate(references)), ("drawn", picture)]

    def _attention(self, part: Part) -> None:
        import torch
        from idar import leakage

        from multicrafter.pipeline import to_image
        from multicrafter.training.attention import attention_shares, watch_attention
        from multicrafter.training.previews import heat
        from multicrafter.training.scenes import encode_scenes

        model, dtype = self.model, self.model.transformer.dtype
        scenes = encode_scenes(model, self.one.world, 1, seed=2)
        with torch.no_grad():
            text = scenes.encode_text(model, slice(0, 1)).to(self.device, dtype)

        def predict(tokens: Any, sigma: Any, text: Any, **context: Any) -> Any:
            references = [r.to(dtype) for r in context.pop("references")]
            return model.velocity(tokens.to(dtype), sigma, text, references=references, **context)

        captured = watch_attention(
            model.transformer, model.backbone, scenes, slice(0, 1), text, sigma=0.6, generator=torch.Generator().manual_seed(0),
            predict=predict, device=self.device,
        )  # fmt: skip
        maps = captured.maps.float().cpu()
        part.facts = {"leakage of the base (1/2 is blind)": round(float(leakage(maps, scenes.masks[:1]).nanmean()), 3)}
        share = attention_shares(maps, scenes.grid)[0]
        self.pictures.append(("scene", to_image(scenes.images[0])))
        self.pictures += [(f"attention on reference {i + 1}", to_image(m)) for i, m in enumerate(heat(share))]

    def _stage1(self, part: Part) -> None:
        from multicrafter.training.encoding_cache import CachedText
        from multicrafter.training.pretrain import Pretrain
        from multicrafter.training.runs import with_execution
        from multicrafter.training.scenes import encode_scenes

        config = with_execution(self.one.pretrain, cache=self.cache)
        scenes = encode_scenes(self.model, self.one.world, config.num_scenes, seed=config.data_seed, cache=self.cache)
        self.prompts = encode_scenes(self.model, self.two.world, self.two.num_scenes, seed=3, cache=self.cache)
        if self.prompts.text is None:  # encoded now, while the encoders are there
            CachedText(self.model, self.prompts.captions, self.cache)
        stage = Pretrain(self.model, config, scenes)
        self.adapters = stage.adapters
        self._away("text_encoder", "text_encoder_2", "vae")
        seconds, losses = [], []
        for index in range(config.num_steps):
            start = time.perf_counter()
            losses.append(stage.step(index))
            self._wait()
            seconds.append(time.perf_counter() - start)
        part.seconds = sorted(seconds)[len(seconds) // 2]
        part.facts = {
            "trained parameters": sum(p.numel() for p in stage.adapters.parameters()),
            "loss, first and last": [losses[0]["loss"], losses[-1]["loss"]],
            "skipped steps": sum(x["skipped"] for x in losses),
            "first step, seconds": seconds[0],
        }
        self._compare(part, self.one)

    def _stage2(self, part: Part) -> None:
        import torch
        from id_reward import CompositeReward

        from multicrafter.training.align import Align
        from multicrafter.training.runs import with_execution

        def brightness(images: Any, prompts: Any, references: Any) -> Any:
            return torch.stack([torch.as_tensor(image).float().mean().cpu() for image in images]).double().numpy()

        self.model.pipe.vae.to(self.device)
        config = with_execution(self.two.align, cache=self.cache)
        stage = Align(
            self.model, self.adapters, config, self.prompts, CompositeReward({"brightness": (brightness, 1.0)})
        )
        part.facts = {name: value for name, value in stage.step(0).items() if isinstance(value, (int, float))}
        self._wait()
        self._compare(part, self.two)

    def _away(self, *names: str) -> None:
        """Parts that a stage does not need, from the card to the machine's memory."""
        import torch

        for name in names:
            if self.device.type != "cpu" and (module := getattr(self.model.pipe, name, None)) is not None:
                module.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _wait(self) -> None:
        """Until the card has done what it was told."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _compare(self, part: Part, run: Any) -> None:
        """What the plan says of this run; its seconds are of cards, and say nothing of a CPU."""
        import torch

        from multicrafter.plan import card_for, predict
        from multicrafter.plan.estimate import with_cache

        on_card = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory / 1e9 if on_card else 24.0
        plan = predict(with_cache(run), card_for(memory))
        part.predicted_bytes = int(plan.peak)
        part.predicted_seconds = plan.seconds if on_card else None

    def content(self, model: str) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "format": FORMAT,
            "multicrafter": __version__,
            "backbone": self.one.model.backbone,
            "model": model,
            "machine": machine(self.device),
            "parts": [vars(part) for part in self.parts],
        }


def source(path: str | None) -> str:
    """Which weights, without saying where they are."""
    if path is None:
        return "the tiny checkpoint that ships"
    return "a local folder" if Path(path).exists() else path


def machine(device: Any) -> dict[str, Any]:
    """What was computed on: the card, never the machine's name."""
    import importlib.metadata as metadata

    import torch

    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["device"] = device.type
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory_bytes": properties.total_memory, "CUDA": torch.version.cuda}
    return found


def without_paths(text: str) -> str:
    """A text in which of every absolute path only the last name is left, and nothing of the machine's own name.

    >>> without_paths('File "/home/ada/my work/x.py", line 3: no /data/w/model, see https://hf.co/a/b')
    'File ".../x.py", line 3: no .../model, see https://hf.co/a/b'
    """
    text = re.sub(r"""(["'])(?:[A-Za-z]:)?[\\/][^"'\n]*[\\/]([^"'\\/\n]+)\1""", r"\1.../\2\1", text)
    text = re.sub(r"(?<![\w:/.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/\"':,;()]+)+[\\/]([^\s\\/\"':,;()]+)", r".../\1", text)
    name = platform.node()
    return text.replace(name, "...") if len(name) > 3 else text


def page(content: dict[str, Any], pictures: list[tuple[str, Any]]) -> str:
    """The report as HTML, its pictures inside."""
    import io

    from multicrafter.pages import Cell, embedded, render

    def png(picture: Any) -> str:
        drawn = io.BytesIO()
        picture.save(drawn, format="png")
        return embedded(drawn.getvalue())

    rows = []
    for part in content["parts"]:
        measured, planned = part["peak_bytes"], part["predicted_bytes"]
        rows.append(
            [
                Cell(part["name"], "", "text"), Cell("yes" if part["ok"] else "no", "", "sure" if part["ok"] else "worse"),
                shown(part["seconds"], 1, "s"), shown(part["predicted_seconds"], 1, "s"), shown(measured, 1e9, "GB"),
                shown(planned, 1e9, "GB"), shown(measured / planned if measured and planned else None, 1, ""),
            ]
        )  # fmt: skip
    facts = [
        (part["name"], ", ".join(f"{k}: {brief(v)}" for k, v in part["facts"].items()))
        for part in content["parts"]
        if part["facts"]
    ]
    return render(
        Path(__file__).parent, "check_real.html", title="multicrafter check-real", content=content, rows=rows, facts=facts,
        machine=[[k, str(v)] for k, v in content["machine"].items()], pictures=[(text, png(p)) for text, p in pictures],
        errors=[(part["name"], part["error"]) for part in content["parts"] if part["error"]],
    )  # fmt: skip


def brief(value: Any) -> str:
    """A fact; of a number that is not whole three digits are shown.

    >>> brief([1.57779163, 0.0]), brief(9.795e-08), brief(9472)
    ('1.58, 0', '9.8e-08', '9472')
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(brief, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() else f"{value:.3g}"


def shown(value: float | None, unit: float, name: str) -> str:
    """A number with its unit, or a dash.

    >>> shown(2.5e9, 1e9, "GB"), shown(None, 1, "s")
    ('2.50 GB', '–')
    """
    return "–" if value is None else f"{value / unit:.2f} {name}".strip()


def add_parser(commands: Any) -> None:
    """Adds ``check-real`` to the command line."""
    text = check_real.__doc__
    sub: argparse.ArgumentParser = commands.add_parser("check-real", help=text, description=text)
    sub.set_defaults(function=check_real)
    sub.add_argument(
        "--backbone", help="whose recipe is tried: flux1_dev, qwen_image_edit, ...; default: the tiny one that ships"
    )
    sub.add_argument("--model", help="folder of its weights, or hub id; default: where the backbone says they are")
    sub.add_argument("--out", type=Path, required=True, help="folder for report.html and report.json")
    sub.add_argument("--device", help="default: the first card, else cpu")
    sub.add_argument("--seed", type=seed, default=0)
    sub.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="NAME=VALUE",
        help="change a value of the recipes, such as pretrain.execution.quantization=nf4 or align.execution.quantization=nf4",
    )  # fmt: skip
