"""A trained adapter as a folder or a hub repository: weights, ``adapter.json``, a model card written from the run.

With ``base=True`` the pipeline of diffusers lies beside them, so that the folder loads without anything else.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from multicrafter import UserError, __version__
from multicrafter.files import follow_umask, read_json
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import Backbone

CARD = """
# {title}

Adapter for [MultiCrafter](https://arxiv.org/abs/2509.21953) on `{base}`: several given subjects in one picture, each faithful, nobody
blended. Trained and saved by multicrafter {version}.

```python
from multicrafter.pipeline import MultiCrafterPipeline

pipeline = MultiCrafterPipeline.from_pretrained("{source}")
picture = pipeline("two people in the park", references=[first, second])[0]
```

## What it is

| | |
|---|---|
{facts}

{run}## Limits

It draws at most as many subjects as it was trained for ({references}); with more they blend. The licence of the base
({licence}) binds what is drawn with it. Pictures of real people are personal data: have their consent.
"""


class Publishable(Protocol):
    """What is saved: a `MultiCrafterPipeline`, or what has the same parts."""

    pipe: Any
    adapters: Adapters | None
    notes: dict[str, Any]
    backbone: Backbone
    loras: dict[str, float]

    @property
    def size(self) -> int:
        """Side of its pictures in pixels."""

    @property
    def reference_size(self) -> int:
        """Side of its references in pixels."""

    @property
    def max_references(self) -> int:
        """Subjects it was trained for."""


def base_of(model: str | Path) -> str | None:
    """The base named in a folder or repository of `save_pretrained`; None where ``model`` is a base itself.

    Raises:
        ValueError: The folder holds an adapter that names no base.
    """
    folder = Path(model)
    if not (folder / "adapter.json").is_file():
        return _base_on_hub(model) if not folder.exists() else None
    if (folder / "model_index.json").is_file():
        return str(folder)
    try:
        return str(read_json(folder / "adapter.json")["base_model"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model {folder} must name its base_model in adapter.json, got none: give the base as model and this as adapter"
        ) from error


def _base_on_hub(model: str | Path) -> str | None:
    """Reads adapter.json of a hub repository, if there is one; problems are left to who loads the model."""
    if str(model).count("/") != 1:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        meta = json.loads(Path(hf_hub_download(str(model), "adapter.json")).read_text())
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError):
        return None
    return str(meta["base_model"]) if meta.get("base_model") else None


def save_pretrained(pipeline: Publishable, folder: Path, *, base: bool = False) -> Path:
    """Writes ``adapter.json``, ``adapter.safetensors`` and ``README.md``, with ``base`` also the pipeline of diffusers.

    Everything appears at once, through a temporary folder; files of an earlier call are replaced, others stay.

    Raises:
        ValueError: There is neither an adapter nor ``base``, LoRAs of others are mixed in, or ``folder`` is a file.
    """
    if pipeline.adapters is None and not base:
        raise UserError("pipeline must have an adapter, or be saved with base=True, got neither")
    if pipeline.adapters is not None:
        pipeline.adapters.state_dict()  # raises where it is no longer whole
    if mixed := [*pipeline.loras, *_strangers(pipeline)]:
        raise UserError(
            f"pipeline must be saved without mixed-in LoRAs, which the folder would not hold, got {sorted(mixed)}: "
            "take them off with unload_lora, save, and load them again"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder must be a folder, but {folder} is a file")
    strange = [name for name in ("README.md", "transformer") if (folder / name).exists()]
    if strange and not any((folder / name).exists() for name in ("adapter.json", "model_index.json")):
        raise UserError(f"folder must be new or of an earlier save, but {folder} holds a {strange[0]} of somebody else")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder must be one that can be made, got {folder}: {error.strerror}") from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary)
        if base:
            _save_base(pipeline, staged)
            follow_umask(*staged.rglob("*.safetensors"))
        if pipeline.adapters is not None:
            own = {"format", "config", "base", "backbone", "code", "folder"}  # the commit stays that of the training
            notes = {k: v for k, v in pipeline.notes.items() if k not in own}
            notes["base_model"] = notes.get("base_model") or _source(pipeline)
            pipeline.adapters.save(staged, **notes)
            (staged / "README.md").write_text(adapter_card(pipeline, folder.name))
        folder.mkdir(exist_ok=True)
        for item in staged.iterdir():
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)
    return folder


def _strangers(pipeline: Publishable) -> list[str]:
    """LoRAs that somebody put on the pipeline of diffusers itself."""
    if pipeline.loras:
        return []
    parts = getattr(pipeline.pipe, "components", {}).values()
    names = {n for part in parts for n in getattr(part, "peft_config", None) or {}}
    return sorted(names - ({"default"} if pipeline.adapters is not None else set()))


def _source(pipeline: Publishable) -> str:
    """Where the base came from: diffusers remembers it; else where the backbone's weights are."""
    return str(getattr(pipeline.pipe, "name_or_path", "") or pipeline.backbone.hub_id)


def _save_base(pipeline: Publishable, folder: Path) -> None:
    """The pipeline without adapters: they come off for the moment and go on again."""
    adapters = pipeline.adapters
    if adapters is None:
        pipeline.pipe.save_pretrained(folder)
        return
    state = adapters.state_dict()
    adapters.detach()
    try:
        pipeline.pipe.save_pretrained(folder)
    finally:
        pipeline.adapters = Adapters(pipeline.pipe.transformer, adapters.config, backbone=pipeline.backbone)
        pipeline.adapters.load_state_dict(state)


def adapter_card(pipeline: Publishable, title: str) -> str:
    """The model card (Markdown with the hub's YAML header), from adapter.json and the run beside it."""
    from huggingface_hub import ModelCardData

    adapters, notes, backbone = pipeline.adapters, pipeline.notes, pipeline.backbone
    assert adapters is not None
    base, config = str(notes.get("base_model") or _source(pipeline)), adapters.config
    header = ModelCardData(
        library_name="multicrafter", pipeline_tag="image-to-image", base_model=base if base.count("/") == 1 else None,
        license="apache-2.0" if backbone.licence == "Apache-2.0" else "other",
        license_name=None if backbone.licence == "Apache-2.0" else backbone.licence,
        tags=["multicrafter", "multi-subject", "personalization", "lora", backbone.name],
    )  # fmt: skip
    experts = (
        f"{config.num_experts} experts, top {config.top_k}, {config.gating}" if config.num_experts else "ordinary LoRA"
    )
    parameters = sum(p.numel() for p in adapters.parameters())
    rows = {
        "stage": notes.get("stage"), "steps": notes.get("steps"), "backbone": backbone.name,
        "rank, alpha": f"{config.rank}, {config.alpha:g}", "FFNs": experts, "trained parameters": f"{parameters:,}",
        "picture, reference": f"{pipeline.size} and {pipeline.reference_size} pixels", "subjects": notes.get("num_references"),
        "references of each": notes.get("references_per_subject"),
    }  # fmt: skip
    facts = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)
    return f"---\n{header.to_yaml()}\n---\n" + CARD.format(
        title=title, base=base, version=__version__, source=title, facts=facts, run=_run_section(notes.get("folder")),
        references=pipeline.max_references, licence=backbone.licence,
    )  # fmt: skip


def _run_section(folder: Any) -> str:
    """Configuration and last metrics of the run that the adapter came from, if it lies beside it."""
    if folder is None:
        return ""
    run = Path(folder).parent
    text = ""
    try:
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = metrics[-max(1, len(metrics) // 10) :]
        names = [k for k, v in last[-1].items() if isinstance(v, float) and k != "step"]
        means = {k: sum(m[k] for m in last if k in m) / len(last) for k in names}
        text += (
            f"## The run\n\nMeans over the last {len(last)} of {len(metrics)} steps:\n\n| metric | mean |\n|---|---|\n"
        )
        text += "".join(f"| {k} | {v:.4g} |\n" for k, v in means.items()) + "\n"
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        config = json.dumps(json.loads((run / "config.json").read_text()), indent=2)
        text += f"<details><summary>Configuration</summary>\n\n```json\n{config}\n```\n\n</details>\n\n"
    except (OSError, ValueError):
        pass
    return text


def push_to_hub(
    pipeline: Publishable,
    repo_id: str,
    *,
    base: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload MultiCrafter adapter",
    create_pr: bool = False,
) -> str:
    """Saves into a temporary folder and uploads it; returns the address of the commit.

    Raises:
        ValueError: The hub cannot be reached, or does not let you write there.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(pipeline, Path(temporary) / repo_id.rsplit("/", 1)[-1], base=base)
        card = folder / "README.md"
        if card.exists():
            card.write_text(
                card.read_text().replace(f'from_pretrained("{folder.name}")', f'from_pretrained("{repo_id}")')
            )
        api = HfApi(token=token)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, create_pr=create_pr)
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"repo_id {repo_id} must be writable on the hub, got {type(error).__name__}: {reason}"
            ) from error
