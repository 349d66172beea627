"""What strangers ask for: numbers, pictures and lists of every kind work; what cannot work is one sentence before work begins."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from multicrafter.cli import main
from multicrafter.cli.options import writable
from multicrafter.models import needs
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.loading import get_device
from multicrafter.models.pictures import coverage, is_picture, open_picture
from multicrafter.pipeline import MultiCrafterPipeline, to_tensor
from PIL import Image

pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
RED = Image.fromarray(pixels)


@pytest.fixture
def pipeline(pipe):
    return MultiCrafterPipeline(pipe)


def draw(pipeline, references=(RED,), prompt="two people", **options):
    return torch.stack(pipeline(prompt, references, **{"num_steps": 1, "output_type": "latent", **options}))


# Numbers


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, torch.tensor, lambda x: np.array(x)])
def test_whole_numbers_of_any_kind(pipeline, kind):
    want = draw(pipeline, seed=3, size=32, num_images=2, num_steps=2, reference_size=16)
    got = draw(pipeline, seed=kind(3), size=kind(32), num_images=kind(2), num_steps=kind(2), reference_size=kind(16))
    assert torch.equal(got, want)
    assert torch.equal(draw(pipeline, size=(kind(32), kind(64))), draw(pipeline, size=(32, 64)))
    several = draw(pipeline, prompt=["two people"] * 2, seed=np.array([3, 4]))
    assert torch.equal(several, draw(pipeline, prompt=["two people"] * 2, seed=[3, 4]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1.5}, "seed must be a whole"), ({"seed": "1"}, "seed must be"), ({"seed": None}, "seed must be"), ({"seed": 2**64}, "64 bits"),
        ({"size": 64.0}, "size must be a whole"), ({"size": "64"}, "size must be"), ({"size": (64, 64, 3)}, "size must be a side"),
        ({"num_images": True}, "num_images must be"), ({"num_steps": 0}, "num_steps must be"), ({"reference_size": 0}, "reference_size must be"),
        ({"prompt": 3}, "prompt must be"), ({"prompt": [b"x"]}, "prompt must be a text"), ({"negative_prompt": ["a", "b"]}, "one per prompt"),
        ({"references": 3}, "references must be pictures"), ({"references": [3]}, "picture must be"), ({"references": ["no.png"]}, "no.png"),
        ({"references": None}, "references must be pictures"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_sentence(pipeline, options, words):
    if "prompt" in options and not isinstance(options["prompt"], list):
        with pytest.raises((ValueError, TypeError)):
            draw(pipeline, **options)
        return
    with pytest.raises(ValueError, match=words):
        draw(pipeline, **options)


# Pictures


def kinds(tmp_path):
    RED.save(tmp_path / "r.png")
    floats = pixels.astype(np.float32) / 255
    return {
        "path": tmp_path / "r.png", "text": str(tmp_path / "r.png"), "array": pixels, "floats": floats,
        "tensor": torch.from_numpy(floats).permute(2, 0, 1), "numpy text": np.array(str(tmp_path / "r.png"))[()],
    }  # fmt: skip


def test_references_of_any_kind_are_the_same_picture(pipeline, tmp_path):
    want = draw(pipeline, [RED, RED])
    for name, given in kinds(tmp_path).items():
        assert torch.equal(draw(pipeline, [given, RED]), want), name
        assert torch.equal(to_tensor(given, 32), to_tensor(RED, 32)), name
    assert torch.equal(draw(pipeline, np.stack([pixels, pixels])), want)
    assert torch.equal(draw(pipeline, np.array([str(tmp_path / "r.png")] * 2)), want)
    two = draw(pipeline, [np.array([str(tmp_path / "r.png")]), [RED]], prompt=["two people"] * 2)
    assert torch.equal(two[0], two[1])
    for alone in (RED, str(tmp_path / "r.png"), tmp_path / "r.png", pixels):
        assert torch.equal(draw(pipeline, alone), draw(pipeline, [RED]))


def test_python_and_the_command_line_open_the_same_picture(tmp_path):
    """Upright, alpha over grey, palettes, 16 bit: as `id_reward.images.open_image` does."""
    from id_reward.images import open_image

    turned = Image.Exif()
    turned[0x0112] = 6
    RED.save(tmp_path / "turned.jpg", exif=turned)
    clear = RED.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(RED.size))
    clear.save(tmp_path / "clear.png")
    RED.quantize(7).save(tmp_path / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    RED.convert("CMYK").save(tmp_path / "print.jpg")
    for name in ("turned.jpg", "clear.png", "palette.png", "deep.png", "print.jpg"):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.asarray(open_picture(picture)), np.asarray(open_image(tmp_path / name))), name
        assert torch.equal(to_tensor(tmp_path / name, 16), to_tensor(open_image(tmp_path / name), 16)), name
    assert open_picture(tmp_path / "turned.jpg").size == (40, 30)


@pytest.mark.parametrize("given", ["a", np.zeros((2, 2)), np.zeros((2, 2, 3)), torch.zeros(3, 2, 2), RED])
def test_one_picture_is_no_sequence(given):
    assert is_picture(given)
    assert not is_picture([given])


half = np.zeros((8, 8), bool)
half[:, :4] = True


@pytest.mark.parametrize(
    "mask",
    [
        half, half.astype(np.uint8), half.astype(np.uint8) * 255, half.astype(np.float64), half.astype(np.uint16) * 65535, half.astype(np.int32),
        torch.from_numpy(half), torch.from_numpy(half).float(), Image.fromarray(half), Image.fromarray(half.astype(np.uint8)),
        Image.fromarray(half.astype(np.uint8) * 255).convert("RGB"), Image.fromarray(half.astype(np.uint8) * 255).convert("P"),
        Image.fromarray(half.astype(np.float32)), Image.fromarray(half.astype(np.uint16) * 65535), Image.fromarray(half.astype(np.int32) * 255),
        Image.fromarray(half.astype(np.uint8) * 255).convert("RGBA"),
    ],
)  # fmt: skip
def test_masks_of_any_depth_are_the_same_mask(mask):
    assert np.array_equal(coverage(mask).numpy(), half.astype(np.float32))


@pytest.mark.parametrize(
    "mask",
    [np.full((4, 4), np.nan), np.full((4, 4), -1.0), np.full((4, 4), 1.5), np.zeros((2, 5, 5)), np.zeros(4), "x", np.full((4, 4), 70000),
     Image.new("RGBA", (4, 4), (255, 255, 255, 9))],
)  # fmt: skip
def test_masks_that_say_nothing_are_refused(mask):
    with pytest.raises((ValueError, OSError)):
        coverage(mask)


# Texts


def test_negative_prompts_one_per_prompt(pipe):
    pipeline = MultiCrafterPipeline(pipe)
    options = {"true_guidance": 3.0, "seed": 1}
    together = draw(pipeline, prompt=["two people"] * 2, negative_prompt=["night", "a dog"], **options)
    for i, text in enumerate(["night", "a dog"]):
        assert torch.allclose(together[i], draw(pipeline, negative_prompt=text, **options)[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_prompt_that_would_be_cut_is_refused(pipeline):
    limit = pipeline.backbone.count_tokens(pipeline.pipe, "x")[1]
    long = "two people " * 20
    for prompt in (long + "by day", long + "by night"):
        with pytest.raises(ValueError, match=f"at most {limit} tokens"):
            draw(pipeline, prompt=prompt)
    with pytest.raises(ValueError, match="at most"):
        draw(pipeline, negative_prompt=long, true_guidance=2.0)
    draw(pipeline, negative_prompt=long), "where it is not used, it cuts nothing"


# Devices and files


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "", "cpu:x", "xpu:7"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="device must be one of cpu"):
        get_device(name)


def test_devices_that_are_there():
    assert get_device("cpu") == get_device(torch.device("cpu")) == torch.device("cpu")


def test_out_may_be_there_and_must_not_be_too_long(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "v1.0").mkdir()
    writable(tmp_path / "a.png", file=True)
    writable(tmp_path / "a.png")
    writable(tmp_path / "v1.0", file=False)
    writable(tmp_path / "new" / "b.png", file=True)
    writable(tmp_path / ("x" * 240 + ".png"), file=True)
    for path, options, words in (
        (tmp_path / "a.png", {"file": False}, "must be a folder"),
        (tmp_path / "v1.0", {"file": True}, "must be a file"),
        (tmp_path / "a.png" / "b.png", {"file": True}, "not a folder"),
        (tmp_path / ("x" * 250 + ".png"), {"file": True}, "at most 255 bytes|name that a file can have"),
        (tmp_path / ("ü" * 124 + ".png"), {"file": True}, "at most 255 bytes"),
        (tmp_path / ("x" * 240 + ".png"), {"file": True, "most": 10_000}, "at most 255 bytes"),
        (tmp_path / ("x" * 300) / "a.png", {"file": True}, "at most 255 bytes|name that a file can have"),
    ):
        with pytest.raises(ValueError, match=words):
            writable(path, **options)


def generate(*argv):
    return main(["generate", "--prompt", "two people", "--steps", "1", *map(str, argv)])


def test_a_second_picture_into_the_same_file_but_never_over_a_reference(tmp_path, capsys):
    RED.save(tmp_path / "r.png")
    for seed in (1, 2):
        assert generate("--reference", tmp_path / "r.png", "--out", tmp_path / "o.png", "--seed", seed) == 0
    before = (tmp_path / "r.png").read_bytes()
    (tmp_path / "link.png").symlink_to(tmp_path / "r.png")
    for out in ("r.png", "link.png"):
        assert generate("--reference", tmp_path / "r.png", "--out", tmp_path / out) == 2
        assert "must not be one of the given pictures" in capsys.readouterr().err
    assert (tmp_path / "r.png").read_bytes() == before


# Memory


def test_what_drawing_needs_grows_as_the_formula_says(pipe):
    def of(**change):
        asked = {
            "size": (64, 64),
            "reference_size": 32,
            "references": 2,
            "pictures": 1,
            "text_tokens": 1,
            "itemsize": 4,
            **change,
        }
        return needs.drawing_bytes(pipe.transformer.config, pipe.vae.config, **asked)

    assert of(pictures=3)["transformer"] == 3 * of()["transformer"]
    assert of(size=(128, 64))["VAE"] == 2 * of()["VAE"]
    assert of(itemsize=2)["VAE"] == of()["VAE"] / 2
    assert sum(of(size=(16384, 16384)).values()) > 2e9


@pytest.mark.parametrize("options", [{"size": 64}, {"num_images": 2}])
def test_a_picture_that_cannot_fit_is_refused_unless_forced(pipeline, monkeypatch, options):
    monkeypatch.setattr(needs, "free_memory", lambda device=None: 1000)
    with pytest.raises(
        ValueError, match=r"memory must hold at least .* pixels at once .*, got 0.0 GB free on cpu.*--force"
    ):
        draw(pipeline, **options)
    draw(pipeline, force=True, **options)


def test_the_command_line_refuses_before_loading(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(needs, "free_memory", lambda device=None: int(4e9))
    monkeypatch.setattr(MultiCrafterPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    RED.save(tmp_path / "r.png")
    for more in (["--size", "16384"], ["--num-images", "100000"]):
        assert generate("--reference", tmp_path / "r.png", "--out", tmp_path / "o.png", *more) == 2
        assert "memory must hold at least" in capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_before_loading(tmp_path, monkeypatch, capsys):
    from multicrafter.models import loading

    monkeypatch.setattr(loading, "load_flux", lambda *a, **k: pytest.fail("weights were loaded"))
    monkeypatch.setattr("multicrafter.plan.memory.free_memory", lambda device=None: int(4e9))
    argv = ["pretrain", "--out", str(tmp_path / "run"), "--set", "pretrain.adapters.rank=100000"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "memory must hold about" in error and "4.0 GB free" in error and "--force" in error
    assert not (tmp_path / "run").exists()


def test_small_runs_need_no_plan():
    from multicrafter.config.recipes import Stage1, Stage2, tiny_stage1
    from multicrafter.plan.memory import is_small

    assert is_small(Stage1()) and is_small(Stage2()) and is_small(tiny_stage1())
    run = tiny_stage1()
    for change in ({"num_scenes": 10**9}, {"batch": 10**6}, {"adapters": AdapterConfig(rank=100_000)}):
        assert not is_small(replace(run, pretrain=replace(run.pretrain, **change)))


def test_a_container_has_its_own_limit(tmp_path, monkeypatch):
    for name, text in (
        ("memory.max", "1000000\n"),
        ("memory.current", "600000\n"),
        ("memory.stat", "anon 5\ninactive_file 1000\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(needs, "CGROUP", tmp_path)
    assert needs.free_memory() == 401_000


# Sizes


def test_an_adapter_is_aligned_at_the_size_it_was_trained_at(pipe, tmp_path):
    from multicrafter.cli.align import _sizes
    from multicrafter.config.recipes import Stage2

    args = Namespace(changes=[], recipe=None, config=None, adapter="a")
    notes = {"size": 96, "reference_size": 48}
    assert _sizes(Stage2(), notes, args) == notes
    assert _sizes(Stage2(), {}, args) == {}
    assert _sizes(Stage2(), notes, Namespace(**{**vars(args), "changes": ["world.size=64"]})) == {"reference_size": 48}
    with pytest.raises(ValueError, match=r"world.size must be 96|world.reference_size must be 48"):
        _sizes(Stage2(), notes, Namespace(**{**vars(args), "recipe": "tiny_stage2"}))


def count_up(pictures, prompts, references):
    return SimpleNamespace(totals=np.arange(len(pictures), dtype=float), parts={})


def test_both_stages_write_the_size_they_saw(pipe, tmp_path):
    from gspo import OnlineConfig, SlidingWindow
    from multicrafter.training.align_config import AlignConfig
    from multicrafter.training.pretrain import PretrainConfig
    from multicrafter.training.runs import run_align, run_pretrain
    from multicrafter.training.scenes import encode_scenes
    from multicrafter.world import WorldConfig

    def notes(folder):
        meta = json.loads((folder / "adapter" / "adapter.json").read_text())
        return meta["size"], meta["reference_size"]

    world = WorldConfig(numbers=(2,), size=96, reference_size=48)
    config = PretrainConfig(
        num_steps=1, batch=2, num_scenes=2, world=world, adapters=AdapterConfig(rank=2, alpha=2.0, num_experts=2)
    )
    adapters = run_pretrain(pipe, config, tmp_path / "one")
    assert notes(tmp_path / "one") == (96, 48)
    adapters.detach()
    adapters, _ = Adapters.load(pipe.transformer, tmp_path / "one" / "adapter")
    seen = []

    def encode(pipe, world, count, **options):
        seen.append((world.size, world.reference_size))
        return encode_scenes(pipe, world, 4, **options)

    align = AlignConfig(
        num_steps=1, prompts=1, online=OnlineConfig(window=SlidingWindow(3, size=1), group_size=2, tail_steps=1)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multicrafter.training.scenes.encode_scenes", encode)
        run_align(
            pipe,
            adapters,
            align,
            tmp_path / "two",
            reward=count_up,
        )
    assert seen == [(96, 48)]
    assert notes(tmp_path / "two") == (96, 48)
