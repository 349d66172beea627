"""A workflow of ComfyUI that draws with an exported LoRA, its references in context and at the places that the model was trained with.

It uses nodes of ComfyUI's core only. *ReferenceLatent* puts a reference behind the picture. *Edit Model Reference Method* says which positions
it gets. "uxo/uno" is UNO's diagonal, which FLUX.1-dev was trained with here, and "index" is one plane a reference, as in Kontext and klein.
Attention is not separated, because the core has no node for that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from multicrafter import UserError
from multicrafter.models.checks import whole
from multicrafter.models.export import PlainLoRA

Node = dict[str, Any]


class Files(NamedTuple):
    """Names under which ComfyUI's own documents keep the parts of a base; yours may be called otherwise."""

    model: str
    encoders: tuple[str, ...]
    encoder_type: str
    vae: str
    latent: str
    places: str


_FLUX1 = Files(
    "flux1-dev.safetensors", ("clip_l.safetensors", "t5xxl_fp16.safetensors"), "flux", "ae.safetensors", "EmptySD3LatentImage", "uxo/uno"
)  # fmt: skip
FILES = {
    "flux1_dev": _FLUX1,
    "flux1_kontext": _FLUX1._replace(model="flux1-dev-kontext.safetensors", places="index"),
    "flux2_klein": Files(
        "flux-2-klein-base-4b.safetensors", ("qwen_3_4b.safetensors",), "flux2", "flux2-vae.safetensors", "EmptyFlux2LatentImage", "index"
    ),
}  # fmt: skip


class _Graph:
    """Nodes by number; `add` returns the link to a node's output."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, kind: str, title: str = "", *, output: int = 0, **inputs: Any) -> list[Any]:
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return [number, output]


def workflow(lora: PlainLoRA, name: str, *, prompt: str = "two people in the park") -> dict[str, Node]:
    """The workflow in ComfyUI's API format: drop the file on its page, choose your files and references, and run it.

    Args:
        lora: What was exported: its notes say sizes, steps and guidance.
        name: File of the LoRA in ComfyUI's folder ``models/loras``.
        prompt: To begin with.

    Raises:
        UserError: ComfyUI's core cannot lay out the references of this base.
    """
    files = FILES.get(lora.backbone.name)
    if files is None:
        raise UserError(f"a workflow can be written for {', '.join(FILES)}, got {lora.backbone.name}")
    notes, sampling = lora.notes, lora.notes.get("sampling") or {}
    size = whole("size", notes.get("size") or 512, least=16)
    steps = whole("num_steps", sampling.get("num_steps", 20), least=1)
    graph = _Graph()
    model = graph.add("UNETLoader", "the base", unet_name=files.model, weight_dtype="default")
    model = graph.add("LoraLoaderModelOnly", "the adapter", model=model, lora_name=name, strength_model=1.0)
    if len(files.encoders) == 2:
        first, second = files.encoders
        clip = graph.add("DualCLIPLoader", clip_name1=first, clip_name2=second, type=files.encoder_type)
    else:
        clip = graph.add("CLIPLoader", clip_name=files.encoders[0], type=files.encoder_type)
    vae = graph.add("VAELoader", vae_name=files.vae)
    latents = [
        _reference(graph, vae, i, int(notes.get("reference_size") or size // 2))
        for i in range(int(notes.get("num_references", 2)))
    ]

    def conditioning(text: str, title: str) -> list[Any]:
        made = graph.add("CLIPTextEncode", title, clip=clip, text=text)
        for latent in latents:
            made = graph.add("ReferenceLatent", conditioning=made, latent=latent)
        return graph.add(
            "FluxKontextMultiReferenceLatentMethod", conditioning=made, reference_latents_method=files.places
        )

    positive = conditioning(prompt, "the prompt")
    if files.encoder_type == "flux2":
        negative = conditioning("", "the negative prompt")
        cfg = lora.backbone.default_true_guidance
        guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
        sigmas = graph.add("Flux2Scheduler", steps=steps, width=size, height=size)
    else:
        guidance = float(sampling.get("guidance", lora.backbone.default_guidance))
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=guidance)
        model = graph.add("ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=size, height=size)
        guider = graph.add("BasicGuider", model=model, conditioning=positive)
        sigmas = graph.add("BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    drawn = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("RandomNoise", noise_seed=0), guider=guider,
        sampler=graph.add("KSamplerSelect", sampler_name="euler"), sigmas=sigmas,
        latent_image=graph.add(files.latent, width=size, height=size, batch_size=1),
    )  # fmt: skip
    picture = graph.add("VAEDecode", samples=drawn, vae=vae)
    graph.add("SaveImage", images=picture, filename_prefix="multicrafter")
    return graph.nodes


def _reference(graph: _Graph, vae: list[Any], index: int, side: int) -> list[Any]:
    picture = graph.add("LoadImage", f"reference {index + 1}", image=f"reference_{index + 1}.png")
    square = graph.add(
        "ResizeAndPadImage", image=picture, target_width=side, target_height=side, padding_color="white", interpolation="lanczos"
    )  # fmt: skip
    return graph.add("VAEEncode", pixels=square, vae=vae)
