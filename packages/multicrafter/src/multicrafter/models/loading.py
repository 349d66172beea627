"""Pipelines from a folder or the hub, with one sentence for everything that can be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from multicrafter import UserError
from multicrafter.files import read_json
from multicrafter.models import flux
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import BACKBONES, Backbone
from multicrafter.models.loaded import LoadedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def get_dtype(name: str | torch.dtype) -> torch.dtype:
    """A dtype by name.

    Raises:
        ValueError: Not one that a pipeline can be loaded in.
    """
    found = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if found not in DTYPES.values():
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return found  # type: ignore[return-value]


def get_device(name: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: There is no such device, or none that holds numbers.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        found += ["mps"] if torch.backends.mps.is_available() else []
        raise UserError(f"device must be one of {', '.join(found)}, got {str(name)!r}") from error
    return device


def load_flux(model: str | Path | None = None, **options: Any) -> Any:
    """The pipeline of `load_model`, alone."""
    return load_model(model, **options).pipe


def load_model(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype = torch.float32,
    backbone: Backbone | None = None,
    **options: Any,
) -> LoadedModel:
    """A frozen pipeline with its backbone, from a folder or hub id; the shipped tiny FLUX by default.

    Args:
        model: Folder in diffusers format, or hub id.
        dtype: Of all weights.
        backbone: Yours, if the pipeline is none of `multicrafter.models.backbones.BACKBONES`; one of those must be that of the model.
        options: Go to ``from_pretrained`` of diffusers: ``revision``, ``token``, ``quantization_config``, ...

    Raises:
        ValueError: A part is missing, a file cannot be read, the class is unknown or not the backbone's, or the weights are gated.
    """
    import diffusers
    from diffusers.utils import logging

    dtype = get_dtype(dtype)
    source = Path(model) if model is not None else flux.shipped()
    name: str | Path = source
    cls: Any = diffusers.DiffusionPipeline
    options = {"use_safetensors": True, **options}  # nothing is unpickled
    if source.exists() or model is None:
        _check_folder(source, backbone)
    else:
        name = str(model)
    if backbone is not None and not _is_ours(backbone):
        cls = getattr(diffusers, backbone.pipeline_class)
    logging.disable_progress_bar()
    try:
        pipe = cls.from_pretrained(name, torch_dtype=dtype, **options)
    except Exception as error:
        raise UserError(_reason(name, error)) from error
    finally:
        logging.enable_progress_bar()
    _check_class(name, type(pipe).__name__, backbone)
    loaded = LoadedModel.of(pipe, backbone)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return loaded


def _is_ours(backbone: Backbone) -> bool:
    return any(type(backbone) is type(known) for known in BACKBONES)


def _check_class(source: str | Path, cls: str, backbone: Backbone | None) -> None:
    """A known backbone takes pipelines of its own class alone; what a backbone of somebody's own takes is theirs to say."""
    if backbone is not None and _is_ours(backbone) and cls != backbone.pipeline_class:
        raise UserError(f"model {source} must be a {backbone.pipeline_class} for {backbone.name}, got a {cls}")


def _check_folder(source: Path, backbone: Backbone | None) -> None:
    """Names what a pipeline directory lacks, before anything is loaded."""
    if not source.is_dir():
        raise UserError(f"model {source} must be a pipeline directory of diffusers, got a file")
    index = source / "model_index.json"
    if backbone is None or _is_ours(backbone):
        known = backbone or BACKBONES[0]  # what a folder without an index is told that it lacks
        try:
            cls = read_json(index)["_class_name"] if index.is_file() else known.pipeline_class
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model {source} must have a readable model_index.json, got a broken one") from error
        _check_class(source, cls, backbone)
        found = [b for b in BACKBONES if b.pipeline_class == cls]
        if not found:
            names = ", ".join(b.pipeline_class for b in BACKBONES)
            raise UserError(f"model {source} must be one of {names}, or come with a backbone, got {cls}")
        backbone = backbone or found[0]
    missing = [part for part in backbone.parts if not (source / part).exists()]
    if missing:
        raise UserError(f"model {source} must be a pipeline directory of diffusers, but it lacks {', '.join(missing)}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(name: str | Path, error: Exception, what: str = "model") -> str:
    """One sentence about a model or an adapter."""
    from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError, RepositoryNotFoundError

    causes = list(chain(error))
    text = " ".join(str(error).split())[:200]
    if any(isinstance(e, (GatedRepoError, LocalTokenNotFoundError)) for e in causes) or "gated repo" in text.lower():
        return (
            f"{what} {name} is gated: accept its licence on https://huggingface.co/{name} and log in with "
            "`hf auth login` or HF_TOKEN, got no token that may read it"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in causes):
        return f"{what} {name} must be a folder or a hub id that exists and that you may read, got neither"
    kind = "pipeline directory of diffusers" if what == "model" else "folder"
    return f"{what} {name} must be a readable {kind} or a hub id, got {type(error).__name__}: {text}"


def resolve_adapter(source: str | Path) -> Path:
    """The folder of an adapter: itself, or its download from the hub.

    Raises:
        ValueError: Neither a folder nor a hub id that can be read.
    """
    folder = Path(source)
    if folder.is_dir() or str(source).count("/") != 1 or folder.is_absolute() or str(source).startswith("."):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["adapter.json", "adapter.safetensors", "README.md"]))
    except Exception as error:
        raise UserError(_reason(source, error, "adapter")) from error


def load_into(pipe: Any, adapter: str | Path) -> Adapters:
    """Puts a trained adapter on a pipeline of diffusers, experts included, exactly; every call of the pipeline then uses it.

    >>> # pipe = FluxPipeline.from_pretrained(base); load_into(pipe, "runs/stage1/adapter"); pipe("two people in the park")

    Args:
        pipe: A pipeline of one of `multicrafter.models.backbones.BACKBONES`, without an adapter of this project.
        adapter: Folder or hub id.

    Returns:
        The adapter: ``detach()`` takes it off again, ``disable()`` switches it off for a while, and ``notes["sampling"]`` says how its
        pictures are best drawn.

    Raises:
        UserError: No such adapter, one of another base, or the pipeline has an adapter already.
    """
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise UserError(f"pipe must be a pipeline of diffusers with a transformer, got {type(pipe).__name__}")
    if not isinstance(adapter, (str, Path)):
        raise UserError(f"adapter must be a folder or a hub id, got {type(adapter).__name__}")
    if getattr(pipe.transformer, "peft_config", None):
        raise UserError(
            f"pipe must have no adapter yet, got {sorted(pipe.transformer.peft_config)}: load this one first"
        )
    return Adapters.load(pipe.transformer, resolve_adapter(adapter), backbone=LoadedModel.of(pipe).backbone)[0]
