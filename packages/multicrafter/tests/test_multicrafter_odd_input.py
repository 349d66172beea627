"""Settings, pictures and requests of strangers: each of these was a wrong number, a traceback or a memory bomb once."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from multicrafter import UserError, load_into
from multicrafter.cli import main
from multicrafter.config import settings
from multicrafter.config.recipes import tiny_stage1
from multicrafter.models.adapters import AdapterConfig, Adapters, check_shapes
from multicrafter.models.binding import BindingConfig
from multicrafter.models.pictures import coverage, lists_of
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.training.pretrain_config import PretrainConfig
from multicrafter_refusals import refused
from PIL import Image

NAN = float("nan")
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255


def test_a_guidance_of_nought_is_nought(monkeypatch):
    """It was taken for none and replaced by the adapter's."""
    import multicrafter.scoring.evaluate as scoring

    asked = []
    monkeypatch.setattr(
        scoring,
        "EvaluateConfig",
        lambda **given: asked.append(given["guidance"]) or (_ for _ in ()).throw(LookupError),
    )
    for guidance in (["--guidance", "0"], [], ["--guidance", "3"]):
        with pytest.raises(LookupError):
            main(["evaluate", "--cases", "1", *guidance])
    assert asked[0] == 0 and asked[1] > 0 and asked[2] == 3


# configurations


@pytest.mark.parametrize(
    "text",
    [
        "pretrain:\n  num_steps: 7\n  num_steps: 8\n", "pretrain: {num_steps: 7}\npretrain: {batch: 2}\n", "pretrain: {num_steps: 010}\n",
        "pretrain: {num_steps: 1:30}\n", "pretrain: {lr: 1:30.5}\n", "pretrain: " + "[" * 4_000, "pretrain: !!python/name:os.system x\n",
        "pretrain: {num_steps: " + "9" * 5000 + "}\n",
    ],
)  # fmt: skip
def test_yaml_that_is_not_what_it_looks_like(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="must be YAML"):
        settings.read(tmp_path / "c.yaml")


def test_what_stays_readable(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: 1_000, y: -3, z: 1.5e-3, w: 0}\nb: {<<: *a, x: 2}\n")
    assert settings.read(tmp_path / "c.yaml") == {
        "a": {"x": 1000, "y": -3, "z": 1.5e-3, "w": 0},
        "b": {"x": 2, "y": -3, "z": 1.5e-3, "w": 0},
    }
    os.mkfifo(tmp_path / "p.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        settings.read(tmp_path / "p.yaml")


def test_a_few_lines_that_stand_for_gigabytes_are_named_in_a_few_words(tmp_path):
    lines = [
        "- &a [x,x,x,x,x,x,x,x,x]",
        *(f"- &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(12)),
    ]
    (tmp_path / "c.yaml").write_text("num_steps:\n" + "\n".join(lines) + "\n")
    with pytest.raises(UserError, match="num_steps must be int") as caught:
        settings.from_dict(PretrainConfig, settings.read(tmp_path / "c.yaml"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("num_steps=010", "readable YAML"), ("num_steps=" + "9" * 400, "64 bits"), ("pretrain.num_steps=" + "[" * 4_000, "readable YAML"),
        ("pretrain.idar.kind=[dice]", "must be one of"),
    ],
)  # fmt: skip
def test_overrides_that_are_not_what_they_look_like(change, words):
    with pytest.raises(UserError, match=words):
        settings.override(tiny_stage1(), [change])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 1.5}, "num_steps"), ({"num_steps": "2"}, "num_steps"), ({"num_steps": True}, "num_steps"), ({"batch": None}, "batch"),
        ({"seed": 1.5}, "seed"), ({"seed": 10**30}, "seed"), ({"lr": "0.1"}, "lr"), ({"lr": True}, "lr"), ({"shapes": 3}, "shapes"),
        ({"shapes": [64]}, r"shapes\[0\]"), ({"schedule": None}, "schedule"), ({"adapters": {"rank": 2}}, "adapters"), ({"data": 5}, "data"),
    ],
)  # fmt: skip
def test_every_setting_is_of_its_type(options, words):
    with pytest.raises(UserError, match=f"{words} must be"):
        PretrainConfig(**options)


def test_settings_of_numpy_are_written_down_as_numbers(tmp_path):
    made = PretrainConfig(
        num_steps=np.int64(3), lr=np.float32(0.5), data=tmp_path, shapes=[[64, np.int32(32)]], seed=torch.tensor(2)
    )
    assert (type(made.num_steps), type(made.lr), made.shapes, made.seed, made.data) == (
        int,
        float,
        ((64, 32),),
        2,
        str(tmp_path),
    )
    assert json.loads(json.dumps(settings.to_dict(made)))["num_steps"] == 3


# pictures, masks, prompts


def test_masks_are_upright_opaque_and_one(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    mask = Image.fromarray(HALF)
    mask.save(tmp_path / "turned.png", exif=turned)
    mask.rotate(-90, expand=True).save(tmp_path / "upright.png")
    assert torch.equal(coverage(tmp_path / "turned.png"), coverage(tmp_path / "upright.png"))
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(coverage(opened), coverage(tmp_path / "upright.png"))
    Image.fromarray(np.dstack([HALF] * 4)).save(tmp_path / "clear.png")
    palette = mask.convert("P")
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png")
    mask.save(tmp_path / "two.gif", save_all=True, append_images=[Image.fromarray(255 - HALF)])
    (tmp_path / "bad.png").write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("clear.png", "palette.png", "two.gif", "bad.png", "none.png", ".", "pipe.png"):
        with pytest.raises(UserError):
            coverage(tmp_path / name)
    labels = np.zeros((8, 8), np.uint8)
    labels[:, :4] = 2
    for wrong in (
        labels,
        labels.astype(np.uint16) * 100,
        np.dstack([HALF] * 4),
        np.ma.array(HALF, mask=True),
        torch.zeros(2, 2, device="meta"),
    ):
        with pytest.raises(UserError):
            coverage(wrong)
    assert coverage(labels == 2).mean() == 0.5


def test_a_mask_of_the_command_line_is_that_of_python(tmp_path, capsys):
    for name in ("a", "b"):
        Image.fromarray(PIXELS).save(tmp_path / f"{name}.png")
    Image.fromarray(np.dstack([HALF] * 4)).save(tmp_path / "clear.png")
    message = refused(
        capsys, tmp_path, "generate", "--prompt", "x", "--reference", tmp_path / "a.png", "--out", tmp_path / "o.png", "--separation", "masks",
        "--mask", tmp_path / "clear.png",
    )  # fmt: skip
    assert "opaque" in message


@pytest.fixture
def pipeline(pipe):
    return MultiCrafterPipeline(pipe)


def draw(pipeline, **options):
    given = {
        "prompt": "two people",
        "references": [Image.fromarray(PIXELS)] * 2,
        "num_steps": 1,
        "output_type": "latent",
        "size": 32,
        **options,
    }
    return pipeline(given.pop("prompt"), given.pop("references"), **{"reference_size": 16, **given})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, "prompt must be a text"), ({"prompt": 3}, "prompt must be a text"), ({"prompt": {"a": 1}}, "prompt must be a text"),
        ({"prompt": {"a"}}, "prompt must be a text"), ({"prompt": "a \udcff b"}, "UTF-8"), ({"negative_prompt": 5}, "negative_prompt must be"),
        ({"num_steps": 10**9}, "num_steps must be at most 10,000"), ({"references_per_subject": 2}, "references_per_subject must be a list"),
        ({"references": {"a": PIXELS}}, "references must be pictures"), ({"references": {"a.png"}}, "references must be pictures"),
        ({"separation": "masks", "masks": 5}, "masks must be pictures"), ({"progress": 5}, "progress must be a function"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function"), ({"callback_on_step_end": lambda *a: [1]}, "a dictionary"),
        ({"callback_on_step_end": lambda *a: {"latents": torch.zeros(1)}}, "latents of shape"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_meant(pipeline, options, words):
    with pytest.raises(UserError, match=words):
        draw(pipeline, **options)


def test_no_negative_prompt_is_an_empty_one(pipeline):
    """None is what diffusers' own pipelines have."""
    assert torch.equal(
        draw(pipeline, negative_prompt=None, true_guidance=2.0)[0],
        draw(pipeline, negative_prompt="", true_guidance=2.0)[0],
    )


@pytest.mark.parametrize(
    "options",
    [
        {"draft_steps": 1.5},
        {"draft_steps": "3"},
        {"draft_steps": 10**9},
        {"bind_at": "a"},
        {"strength": "1"},
        {"sigmas": (0,)},
        {"sigmas": 0.5},
        {"arrows": 5},
    ],
)  # fmt: skip
def test_bindings_that_cannot_be_meant(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}.* must be"):
        BindingConfig(mode="draft", **options)


def test_pictures_of_data_sets_are_pictures(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    given = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert lists_of([given, (tmp_path / "a.png").read_bytes()], 1, name="references") == [
        [given, (tmp_path / "a.png").read_bytes()]
    ]


# adapters


class Other:
    """No pipeline."""


@pytest.mark.parametrize("wrong", [None, "a", Other(), torch.nn.Linear(2, 2)])
def test_an_adapter_goes_on_a_pipeline(wrong, pipe):
    with pytest.raises(UserError, match="pipe must be a pipeline of diffusers with a transformer"):
        load_into(wrong, "adapter")
    for adapter in (None, 5):
        with pytest.raises(UserError, match="adapter must be a folder or a hub id"):
            load_into(pipe, adapter)


def test_experts_that_are_not_there_cost_no_memory():
    """``num_experts`` of a plain adapter's adapter.json was believed: 512 GB were asked for."""
    plain = {"transformer_blocks.0.attn.to_q.lora_A.default.weight": torch.zeros(2, 4)}
    with pytest.raises(UserError, match="must hold tensors of 1000000000 experts"):
        check_shapes("adapter", plain, AdapterConfig(rank=2, num_experts=10**9))


def test_half_an_adapter_does_not_stay(pipe, monkeypatch):
    import multicrafter.models.adapters as adapters

    def full(*_, **__):
        raise MemoryError

    before = dict(pipe.transformer.state_dict())
    monkeypatch.setattr(adapters, "inject", full)
    with pytest.raises(MemoryError):
        Adapters(pipe.transformer, AdapterConfig(rank=2))
    assert not getattr(pipe.transformer, "peft_config", None)
    assert {n.replace("base_layer.", "") for n in pipe.transformer.state_dict()} == set(before)
