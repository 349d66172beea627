"""``multicrafter export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command, positive, seed, writable


def export(arguments: argparse.Namespace) -> int:
    """A trained adapter for other programs: diffusers, ComfyUI, kohya, peft, or merged into its base."""
    from multicrafter.files import write_json
    from multicrafter.models.adapters import read_adapter
    from multicrafter.models.backbones import get_backbone
    from multicrafter.models.comfyui_workflow import workflow
    from multicrafter.models.export import check_out, names_of, read_plain, write
    from multicrafter.models.loading import get_dtype, load_flux, resolve_adapter

    check_out(arguments.out, arguments.format)
    writable(arguments.out, file=arguments.format not in ("peft", "merged"))
    if arguments.workflow is not None:
        check_workflow(arguments)
    dtype = get_dtype(arguments.dtype)
    folder = resolve_adapter(arguments.adapter)
    config, _, notes = read_adapter(folder)
    if arguments.format in ("comfyui", "kohya"):
        names_of(get_backbone(str(notes.get("backbone", "flux1_dev"))))  # before anything is fitted
    transformer = None
    if config.num_experts:
        lora = _lossy(arguments, folder, arguments.model or notes.get("base_model"))
    elif lossy := [name for name in ("lossy", "rank", "distil") if getattr(arguments, name)]:
        raise UserError(
            f"--{lossy[0]} is for adapters with experts, got {arguments.adapter}, a plain LoRA, which is exported exactly"
        )
    else:
        lora = read_plain(folder)
    if arguments.format == "merged":
        transformer = load_flux(arguments.model or notes.get("base_model"), dtype=dtype).transformer
        check_fits(lora, transformer)
    graph = workflow(lora, arguments.out.name) if arguments.workflow is not None else None
    print(
        write(
            lora if transformer is not None else lora.to(dtype),
            arguments.format,
            arguments.out,
            transformer=transformer,
        )
    )
    if graph is not None:
        write_json(arguments.workflow, graph)
        print(arguments.workflow)
    return 0


def _lossy(arguments: argparse.Namespace, folder: Path, model: str | None) -> Any:
    """The plain LoRA of --lossy, after its loss was said; without --lossy the losses of both ways, and the end."""
    from multicrafter.models.fitting import Way
    from multicrafter.models.loading import get_device, load_flux, load_into
    from multicrafter.scoring.export_loss import LossConfig, plain_loras, table

    ways: list[Way] = [arguments.lossy] if arguments.lossy else ["fit", "best-expert"]
    how = LossConfig(
        fit_cases=arguments.fit_cases, test_cases=arguments.test_cases, distil_steps=arguments.distil, rank=arguments.rank,
        seed=arguments.seed,
    )  # fmt: skip
    pipe = load_flux(model)
    if arguments.device is not None:
        pipe.to(get_device(arguments.device))
    found, losses = plain_loras(pipe, load_into(pipe, folder), ways, how)
    print(f"measured on {how.test_cases} drawn prompts of people that neither was made with:\n{table(losses)}")
    if not arguments.lossy:
        raise UserError(
            "--lossy must say which loss to take, fit or best-expert, for an adapter with experts: which of them a token uses depends on "
            "the token, and no LoRA file can say that; multicrafter.load_into keeps the mixture whole in Python"
        )
    return found[arguments.lossy]


def check_workflow(arguments: argparse.Namespace) -> None:
    """Raises UserError where no workflow can be written."""
    path: Path = arguments.workflow
    if arguments.format != "comfyui":
        raise UserError(f"--workflow is for --format comfyui, got --format {arguments.format}")
    if path.suffix != ".json" or path.exists() or path == arguments.out:
        raise UserError(f"--workflow must be a new file that ends in .json, got {str(path)!r}")
    writable(path, file=True)


def check_fits(lora: Any, transformer: Any) -> None:
    """Raises UserError where the base is another one than the adapter was trained on."""
    from multicrafter.models.adapters import fingerprint

    if (found := fingerprint(transformer)) != lora.notes["base"]:
        raise UserError(f"--model must be the base of the adapter, {lora.notes['base']}, got {found}")


def add_parser(commands: Any) -> None:
    """Adds ``export`` to the command line."""
    sub = add_command(commands, "export", export, model=False)
    sub.add_argument("adapter", help="folder or hub id of an adapter")
    sub.add_argument(
        "--format", required=True, choices=("diffusers", "comfyui", "kohya", "peft", "merged"),
        help="merged: the transformer with the adapter added to its weights, as a folder of diffusers",
    )  # fmt: skip
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a .safetensors file, or for peft and merged a folder; must not be there",
    )
    sub.add_argument("--dtype", default="float32", help="of what is written: float32 (exact), bfloat16 or float16")
    sub.add_argument(
        "--model",
        help="base to merge into, folder or hub id; default: the one that the adapter names, else the tiny one",
    )
    sub.add_argument(
        "--workflow", type=Path, metavar="JSON", help="with --format comfyui: also write a workflow of ComfyUI that draws with it"
    )  # fmt: skip
    sub.add_argument(
        "--lossy", choices=("fit", "best-expert"),
        help="for an adapter with experts: a plain LoRA fitted to the mixture, or the one expert that comes nearest; the loss is said first",
    )  # fmt: skip
    sub.add_argument(
        "--rank", type=positive, help="of a fitted LoRA; default: all experts' together for fit, one's for best-expert"
    )
    sub.add_argument(
        "--distil",
        type=positive,
        default=0,
        metavar="STEPS",
        help="train what was fitted further, towards the mixture's velocity",
    )
    sub.add_argument("--fit-cases", type=positive, default=64, help="drawn prompts to fit to")
    sub.add_argument(
        "--test-cases", type=positive, default=32, help="drawn prompts of other people to measure the loss on"
    )
    sub.add_argument("--seed", type=seed, default=7, help="of the drawn prompts")
    sub.add_argument("--device", help="where to fit: cpu, cuda, ...")
