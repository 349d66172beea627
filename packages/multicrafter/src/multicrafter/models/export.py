"""A trained adapter as files that other programs read: one LoRA per linear layer, under the names of diffusers, ComfyUI, kohya and peft.

ComfyUI and kohya name the layers as Black Forest Labs' own code does. There query, key and value of a block are one linear layer, in
FLUX.1's single blocks the FFN's first layer too. The adapter has a LoRA of its own for each. `fuse` writes them as one LoRA of the summed
rank: the down matrices one above the other, the up matrices on the diagonal of a block matrix. The product is the same.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from moe_lora.export import LowRank
from torch import Tensor, nn

from multicrafter import UserError, __version__
from multicrafter.files import appearing, follow_umask, source_commit, write_json
from multicrafter.models.adapters import AdapterConfig, adapted, fingerprint, read_adapter
from multicrafter.models.backbones import Backbone, backbone_of, get_backbone
from multicrafter.models.backbones.base import on_meta
from multicrafter.models.flux import shipped

FORMATS = ("diffusers", "comfyui", "kohya", "peft", "merged")
FORMAT_VERSION = 1
HEADER = "multicrafter"
"""Key of the header of a safetensors file under which all that is known of the adapter stands as JSON."""

# name of a linear layer in diffusers -> name of the layer in Black Forest Labs' code, and which part of its rows it is (None: all of them)
Names = tuple[tuple[str, str, int | None], ...]
_ATTENTION: Names = (
    (r"transformer_blocks\.(\d+)\.attn\.to_q", r"double_blocks.\1.img_attn.qkv", 0),
    (r"transformer_blocks\.(\d+)\.attn\.to_k", r"double_blocks.\1.img_attn.qkv", 1),
    (r"transformer_blocks\.(\d+)\.attn\.to_v", r"double_blocks.\1.img_attn.qkv", 2),
    (r"transformer_blocks\.(\d+)\.attn\.add_q_proj", r"double_blocks.\1.txt_attn.qkv", 0),
    (r"transformer_blocks\.(\d+)\.attn\.add_k_proj", r"double_blocks.\1.txt_attn.qkv", 1),
    (r"transformer_blocks\.(\d+)\.attn\.add_v_proj", r"double_blocks.\1.txt_attn.qkv", 2),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", None),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", None),
)
ORIGINAL_NAMES: Mapping[str, Names] = {
    "FluxTransformer2DModel": (
        *_ATTENTION,
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0", None),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2", None),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0", None),
        (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2", None),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_q", r"single_blocks.\1.linear1", 0),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_k", r"single_blocks.\1.linear1", 1),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_v", r"single_blocks.\1.linear1", 2),
        (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1", 3),
    ),
    "Flux2Transformer2DModel": (
        *_ATTENTION,
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0", None),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2", None),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", None),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", None),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", None),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2", None),
    ),
}


@dataclass(frozen=True, kw_only=True)
class PlainLoRA:
    """An adapter as one LoRA per linear layer of the transformer.

    Attributes:
        layers: ``W x + lora_b (lora_a x)`` by the layer's name in diffusers, lora_a (r, d_in), lora_b (d_out, r); the scale alpha / rank is
            already in lora_b.
        backbone: What it belongs to.
        notes: Its adapter.json.
        exactness: How far it is the adapter, for the header; "exact" where it is.
    """

    layers: Mapping[str, LowRank]
    backbone: Backbone
    notes: Mapping[str, Any]
    exactness: Mapping[str, Any] = field(default_factory=lambda: {"way": "exact"})

    def __post_init__(self) -> None:
        for name, (a, b) in self.layers.items():
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise ValueError(
                    f"layers[{name!r}] must be (r, d) and (o, r), got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        if not self.layers:
            raise ValueError("layers must hold at least one LoRA, got none")

    def to(self, dtype: torch.dtype) -> PlainLoRA:
        """The same in another type."""
        return replace(self, layers={n: LowRank(a.to(dtype), b.to(dtype)) for n, (a, b) in self.layers.items()})


def ordinary_layers(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, LowRank]:
    """The ordinary LoRAs among an adapter's tensors, by layer; the scale alpha / rank goes into lora_b, and float32 keeps it.

    >>> key = "transformer_blocks.0.attn.to_q.lora_{}.default.weight"
    >>> state = {key.format("A"): torch.ones(2, 3), key.format("B"): torch.ones(4, 2)}
    >>> ordinary_layers(state, AdapterConfig(rank=2, alpha=1.0))["transformer_blocks.0.attn.to_q"].lora_b[0].tolist()
    [0.5, 0.5]
    """
    found = {}
    for key, a in state.items():
        if match := re.fullmatch(r"(.+)\.lora_A\.default\.weight", key):
            b = state[f"{match[1]}.lora_B.default.weight"]
            found[match[1]] = LowRank(a.float(), b.float() * (config.alpha / config.rank))
    return found


def read_plain(folder: str | Path) -> PlainLoRA:
    """A plain adapter, exactly; no base is loaded.

    Raises:
        UserError: It is no adapter, a part of it is missing, or it has experts, which no LoRA file can hold.
    """
    config, state, notes = read_adapter(folder)
    if config.num_experts:
        raise UserError(
            f"adapter {folder} must be a plain LoRA to be exported exactly, got {config.num_experts} experts: which of them a token uses "
            "depends on the token, and no LoRA file can say that; choose a loss with --lossy, or keep the mixture with multicrafter.load_into"
        )
    backbone = get_backbone(str(notes.get("backbone", "flux1_dev")))
    layers = ordinary_layers(state, config)
    wanted = linears(backbone, notes)
    for name in sorted(wanted.keys() | layers.keys()):
        got = (layers[name].lora_a.shape[1], layers[name].lora_b.shape[0]) if name in layers else "nothing"
        if got != (want := wanted.get(name, "no such layer")):
            raise UserError(f"adapter {folder} must fit {backbone.name} at {name!r}, {want}, got {got}")
    return PlainLoRA(layers=layers, backbone=backbone, notes=notes)


def linears(backbone: Backbone, notes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Input and output width of every linear layer that a plain adapter sits on, from the sizes in its adapter.json, without memory."""
    base = notes.get("base")
    if not isinstance(base, Mapping) or not all(isinstance(v, int) for v in base.values()):
        raise UserError(f"adapter.json must say the sizes of its base, got {base!r}")
    model: nn.Module = on_meta(
        lambda: backbone.build_transformer(**{k: v for k, v in base.items() if k in backbone.full_config})
    )
    wanted = re.compile(adapted(backbone, model, AdapterConfig(num_experts=0))[0])
    return {n: (m.in_features, m.out_features) for n, m in model.named_modules() if wanted.fullmatch(n)}  # type: ignore[misc]


def fuse(parts: Sequence[LowRank]) -> LowRank:
    """The LoRA of one linear layer whose rows are several layers': A stacked, B block-diagonal, rank the sum.

    ``[B_1 A_1; B_2 A_2] = diag(B_1, B_2) [A_1; A_2]``, exactly.

    >>> one, two = LowRank(torch.ones(1, 3), torch.ones(2, 1)), LowRank(torch.ones(2, 3), torch.ones(4, 2))
    >>> a, b = fuse([one, two])
    >>> tuple(a.shape), tuple(b.shape), (b @ a)[:, 0].tolist()
    ((3, 3), (6, 3), [1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    """
    return LowRank(torch.cat([p.lora_a for p in parts]), torch.block_diag(*(p.lora_b for p in parts)))


def names_of(backbone: Backbone) -> Names:
    """What Black Forest Labs' code calls the layers of a backbone.

    Raises:
        UserError: Nobody has named the layers of this transformer so.
    """
    table = ORIGINAL_NAMES.get(backbone.transformer_class)
    if table is None:
        raise UserError(
            f"format must be diffusers, peft or merged for {backbone.name}: the names that ComfyUI and kohya give to layers are known "
            f"here only of {', '.join(ORIGINAL_NAMES)}"
        )
    return table


def original_layers(lora: PlainLoRA) -> dict[str, LowRank]:
    """The layers under the names of Black Forest Labs' code, those that are one layer there fused.

    Raises:
        UserError: See `names_of`, or a part of a fused layer is missing.
    """
    table = names_of(lora.backbone)
    whole: dict[str, LowRank] = {}
    parts: dict[str, dict[int, LowRank]] = {}
    for name, low_rank in lora.layers.items():
        for pattern, target, part in table:
            if match := re.fullmatch(pattern, name):
                if part is None:
                    whole[match.expand(target)] = low_rank
                else:
                    parts.setdefault(match.expand(target), {})[part] = low_rank
                break
        else:
            raise UserError(f"layer {name!r} must have a name in ComfyUI, got none")
    for target, found in parts.items():
        count = 4 if target.endswith("linear1") else 3
        if sorted(found) != list(range(count)):
            raise UserError(f"adapter must reach all {count} parts of {target}, got parts {sorted(found)}")
        whole[target] = fuse([found[i] for i in range(count)])
    return whole


def tensors(lora: PlainLoRA, form: str) -> dict[str, Tensor]:
    """What the file of a format holds.

    Raises:
        UserError: See `original_layers`.
    """
    made: dict[str, Tensor] = {}
    if form in ("diffusers", "peft"):
        prefix = "transformer" if form == "diffusers" else "base_model.model"
        for name, (a, b) in lora.layers.items():
            made |= {f"{prefix}.{name}.lora_A.weight": a, f"{prefix}.{name}.lora_B.weight": b}
    elif form == "comfyui":
        for name, (a, b) in original_layers(lora).items():
            made |= {f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b}
    elif form == "kohya":
        for name, (a, b) in original_layers(lora).items():
            key = f"lora_unet_{name.replace('.', '_')}"
            alpha = torch.tensor(float(len(a)), dtype=a.dtype)  # alpha / rank = 1: the scale is in the up matrix
            made |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": alpha}
    else:
        raise ValueError(f"form must be diffusers, comfyui, kohya or peft, got {form!r}")
    return {key: value.detach().cpu().contiguous() for key, value in made.items()}


def base_of(lora: PlainLoRA) -> tuple[str | None, str | None]:
    """Name and licence of the base: those of the published model where the sizes are its own, of the tiny FLUX where they are its; else unknown.

    A licence belongs to weights. A base of other sizes is another model, even where it is built like FLUX.1-dev.
    """
    named, sizes, backbone = lora.notes.get("base_model"), lora.notes["base"], lora.backbone
    if all(backbone.full_config.get(name, 0) == size for name, size in sizes.items()):
        return named or backbone.hub_id, backbone.licence
    tiny = json.loads((shipped() / "transformer" / "config.json").read_text())
    if named is None and backbone.name == "flux1_dev" and all(tiny.get(name) == size for name, size in sizes.items()):
        return "the tiny FLUX that ships with multicrafter", "Apache-2.0"
    return named, None


def header(lora: PlainLoRA, form: str) -> dict[str, str]:
    """The header of a file: base, licence, training, commit, versions, and how pictures are drawn with it."""
    notes, (base_model, base_licence) = lora.notes, base_of(lora)
    about = {
        "format_version": FORMAT_VERSION,
        "form": form,
        "backbone": lora.backbone.name,
        "base": notes["base"],
        "base_model": base_model,
        "base_licence": base_licence,
        "training": {k: notes[k] for k in ("stage", "steps", "num_references", "size", "reference_size") if k in notes},
        "adapter": notes["config"],
        "sampling": notes.get("sampling", {}),
        "trained_by": {"version": notes.get("code"), "commit": notes.get("commit")},
        "exported_by": {"version": __version__, "commit": source_commit()},
        "exactness": dict(lora.exactness),
    }
    made = {"format": "pt", HEADER: json.dumps(about, sort_keys=True)}
    if form == "kohya":  # what the programs of that family show of a file
        ranks = {len(a) for a, _ in lora.layers.values()}
        made |= {
            "ss_network_module": "networks.lora_flux",
            "ss_network_dim": str(max(ranks)),
            "ss_network_alpha": str(max(ranks)),
        }
    return made


def read_header(file: str | Path) -> dict[str, Any] | None:
    """What `header` wrote into a safetensors file; None where the file is of somebody else.

    Raises:
        UserError: The file is no safetensors file, or its header is of a later version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(HEADER)
        about = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} must be a safetensors file, got {type(error).__name__}: {error}") from error
    if about is None:
        return None
    if not isinstance(about, dict) or about.get("format_version") != FORMAT_VERSION:
        version = about.get("format_version") if isinstance(about, dict) else about
        raise UserError(
            f"{file} must have a header of version {FORMAT_VERSION}, got {version!r}: a newer multicrafter wrote it"
        )
    return about


def check_base(file: str | Path, transformer: Any, backbone: Backbone | None = None) -> None:
    """Refuses a file of this project on another base than it was made for; files of others pass.

    Raises:
        UserError: Another backbone, or another size; the sentence is the rest of "... must fit this base, got".
    """
    about = read_header(file)
    if about is None:
        return
    backbone = backbone or backbone_of(transformer)
    for name, want in (("backbone", backbone.name), ("base", fingerprint(transformer))):
        if about.get(name) != want:
            raise UserError(f"one that was made for the {name} {about.get(name)}, not {want}")


def write(lora: PlainLoRA, form: str, out: Path, *, transformer: Any = None) -> Path:
    """Writes one format: a safetensors file, or for peft and merged a folder; whole or not at all, and over nothing.

    Args:
        lora: What to write, in the type to write it in.
        form: One of `FORMATS`.
        out: Where; must not be there.
        transformer: For "merged": the base without adapters, changed in place.

    Raises:
        UserError: ``out`` is there, the format does not know the layers, or the base is quantized.
    """
    check_out(out, form)
    about = header(lora, form)
    if form == "merged":
        merge(transformer, lora)
        with appearing_folder(out) as folder:
            save_transformer(transformer, folder, about)
    elif form == "peft":
        found = tensors(lora, form)
        with appearing_folder(out) as folder:
            _save(found, folder / "adapter_model.safetensors", about)
            write_json(folder / "adapter_config.json", peft_config(lora))
    else:
        found = tensors(lora, form)
        with appearing(out) as temporary:
            _save(found, temporary, about)
    return out


def check_out(out: Path, form: str) -> None:
    """Raises UserError where a format cannot be written, before any work."""
    if form not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if out.exists() or out.is_symlink():
        raise UserError(f"out must not be there yet, but {out} is; nothing is overwritten")
    if form not in ("peft", "merged") and out.suffix != ".safetensors":
        raise UserError(f"out must end in .safetensors for {form}, got {str(out)!r}")


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name when the block ends, and is removed if the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        staged = Path(temporary) / out.name
        staged.mkdir()
        yield staged
        os.rename(staged, out)  # refuses where a folder with something in it came in between


def _save(found: Mapping[str, Tensor], path: Path, about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(dict(found), path, metadata=about)
    follow_umask(path)


def peft_config(lora: PlainLoRA) -> dict[str, Any]:
    """``adapter_config.json``: rank by layer, alpha equal to it, targets by whole name."""
    ranks = {name: len(a) for name, (a, _) in lora.layers.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_of(lora)[0],
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": "|".join(re.escape(name) for name in sorted(ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def merge(transformer: Any, lora: PlainLoRA) -> None:
    """``W <- W + B A`` in place, computed in float32 and rounded once to the weight's own type.

    Raises:
        UserError: A layer is not there, or is quantized.
    """
    layers = dict(transformer.named_modules())
    for name in lora.layers:
        weight = getattr(layers.get(name), "weight", None)
        if type(layers.get(name)) is not nn.Linear or not weight.is_floating_point():  # type: ignore[union-attr]
            raise UserError(
                f"the base must have a plain linear layer {name!r} to merge into, got {type(layers.get(name)).__name__}"
            )
    with torch.no_grad():
        for name, (a, b) in lora.layers.items():
            weight = layers[name].weight
            update = (b.to(weight.device).float() @ a.to(weight.device).float()) + weight.float()
            weight.copy_(update.to(weight.dtype))


def save_transformer(transformer: Any, folder: Path, about: dict[str, str]) -> None:
    """A transformer as diffusers writes it, with our header in every shard."""
    from huggingface_hub import save_torch_state_dict

    transformer.save_config(folder)
    save_torch_state_dict(
        transformer.state_dict(), folder, metadata=about, max_shard_size="10GB",
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
    )  # fmt: skip
    follow_umask(*folder.glob("*.safetensors"))
