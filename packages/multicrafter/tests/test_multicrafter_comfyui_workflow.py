"""The workflow of ComfyUI is one that its core can run, with references where the model was trained with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from moe_lora.export import LowRank
from multicrafter import UserError
from multicrafter.cli import main
from multicrafter.models.backbones import get_backbone
from multicrafter.models.comfyui_workflow import workflow
from multicrafter.models.export import PlainLoRA
from multicrafter.world import shipped_adapter

# node -> its required inputs, a type for what is linked, None for what is written in; and what it gives. From ComfyUI 0.9.1.
NODES: dict[str, tuple[dict[str, str | None], str | None]] = {
    "UNETLoader": ({"unet_name": None, "weight_dtype": None}, "MODEL"),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": None, "strength_model": None}, "MODEL"),
    "DualCLIPLoader": ({"clip_name1": None, "clip_name2": None, "type": None}, "CLIP"),
    "CLIPLoader": ({"clip_name": None, "type": None}, "CLIP"),
    "VAELoader": ({"vae_name": None}, "VAE"),
    "LoadImage": ({"image": None}, "IMAGE"),
    "ResizeAndPadImage": (
        {"image": "IMAGE", "target_width": None, "target_height": None, "padding_color": None, "interpolation": None}, "IMAGE",
    ),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, "LATENT"),
    "CLIPTextEncode": ({"clip": "CLIP", "text": None}, "CONDITIONING"),
    "ReferenceLatent": ({"conditioning": "CONDITIONING", "latent": "LATENT"}, "CONDITIONING"),
    "FluxKontextMultiReferenceLatentMethod": ({"conditioning": "CONDITIONING", "reference_latents_method": None}, "CONDITIONING"),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": None}, "CONDITIONING"),
    "ModelSamplingFlux": ({"model": "MODEL", "max_shift": None, "base_shift": None, "width": None, "height": None}, "MODEL"),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, "GUIDER"),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": None}, "GUIDER"),
    "BasicScheduler": ({"model": "MODEL", "scheduler": None, "steps": None, "denoise": None}, "SIGMAS"),
    "Flux2Scheduler": ({"steps": None, "width": None, "height": None}, "SIGMAS"),
    "RandomNoise": ({"noise_seed": None}, "NOISE"),
    "KSamplerSelect": ({"sampler_name": None}, "SAMPLER"),
    "EmptySD3LatentImage": ({"width": None, "height": None, "batch_size": None}, "LATENT"),
    "EmptyFlux2LatentImage": ({"width": None, "height": None, "batch_size": None}, "LATENT"),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"}, "LATENT",
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, "IMAGE"),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": None}, None),
}  # fmt: skip
PLACES = {"flux1_dev": "uxo/uno", "flux1_kontext": "index", "flux2_klein": "index"}


def made(name: str, **notes: Any) -> dict[str, Any]:
    lora = PlainLoRA(
        layers={"x": LowRank(torch.ones(1, 2), torch.ones(2, 1))}, backbone=get_backbone(name),
        notes={"size": 1024, "reference_size": 512, "num_references": 3, "sampling": {"num_steps": 28, "guidance": 4.0}, **notes},
    )  # fmt: skip
    return workflow(lora, "mine.safetensors")


def upstream(graph: dict[str, Any], start: str) -> list[str]:
    """Every node that a node depends on, itself first."""
    found = [start]
    for value in graph[start]["inputs"].values():
        if isinstance(value, list):
            found += [n for n in upstream(graph, value[0]) if n not in found]
    return found


@pytest.mark.parametrize("name", sorted(PLACES))
def test_every_input_is_there_and_gets_its_type(name):
    graph = json.loads(json.dumps(made(name)))
    for node in graph.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys(), node
        for key, value in node["inputs"].items():
            if inputs[key] is None:
                assert not isinstance(value, list)
            else:
                assert NODES[graph[value[0]]["class_type"]][1] == inputs[key], (node, key)
    (end,) = [number for number, node in graph.items() if node["class_type"] == "SaveImage"]
    assert sorted(upstream(graph, end)) == sorted(graph), "no node is left over"


@pytest.mark.parametrize("name", sorted(PLACES))
def test_references_lora_and_numbers_are_the_adapters(name):
    graph = made(name)
    kinds = [node["class_type"] for node in graph.values()]
    of = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds.count("LoadImage") == 3
    assert {n["inputs"]["reference_latents_method"] for n in graph.values() if "Method" in n["class_type"]} == {
        PLACES[name]
    }
    assert of["LoraLoaderModelOnly"]["lora_name"] == "mine.safetensors"
    assert of["ResizeAndPadImage"]["target_width"] == 512
    scheduler = of["Flux2Scheduler" if name == "flux2_klein" else "BasicScheduler"]
    assert scheduler["steps"] == 28
    (guider,) = [number for number, node in graph.items() if node["class_type"] in ("BasicGuider", "CFGGuider")]
    for key in ("conditioning",) if name != "flux2_klein" else ("positive", "negative"):
        chain = upstream(graph, graph[guider]["inputs"][key][0])
        latents = [graph[n]["inputs"]["latent"][0] for n in chain if graph[n]["class_type"] == "ReferenceLatent"]
        loaded = [[n for n in upstream(graph, latent) if graph[n]["class_type"] == "LoadImage"] for latent in latents]
        pictures = [graph[n]["inputs"]["image"] for (n,) in loaded]
        assert pictures == ["reference_3.png", "reference_2.png", "reference_1.png"], "the last one is appended last"
    if name != "flux2_klein":
        assert of["FluxGuidance"]["guidance"] == 4.0


def test_a_base_that_the_core_does_not_lay_out_is_refused():
    with pytest.raises(UserError, match="a workflow can be written for flux1_dev"):
        made("flux2_klein_kv")


def test_the_command_writes_it_beside_the_lora(tmp_path, capsys):
    out, graph = tmp_path / "lora.safetensors", tmp_path / "draw.json"
    words = ["export", str(shipped_adapter()), "--out", str(out), "--workflow", str(graph)]
    assert main([*words, "--format", "kohya"]) == 2 and "for --format comfyui" in capsys.readouterr().err
    assert main([*words, "--format", "comfyui"]) == 0
    nodes = json.loads(graph.read_text()).values()
    assert [n["inputs"]["lora_name"] for n in nodes if n["class_type"] == "LoraLoaderModelOnly"] == ["lora.safetensors"]
    out.unlink()
    assert main([*words, "--format", "comfyui"]) == 2 and "--workflow must be a new file" in capsys.readouterr().err
    assert not out.exists()
