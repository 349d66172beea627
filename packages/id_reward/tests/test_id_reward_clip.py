"""CLIP and HPSv2 on randomly initialised checkpoints in the real formats."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")
pytest.importorskip("transformers", reason="needs id-reward[clip] or id-reward[objects]")
pytest.importorskip("open_clip", reason="needs id-reward[clip]")
import open_clip
import torch
from id_reward.backends.aesthetics import MEAN, STD, HPSv2Scorer, hps_preprocess
from id_reward.backends.text import ClipEncoder, ClipScorer, OpenClip, TransformersClip
from PIL import Image
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("tiny_checkpoints", Path(__file__).with_name("tiny_checkpoints.py"))
assert spec and spec.loader
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["two people in a park", "a cat", "two people in a park"]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (60, 100), (301, 200)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("checkpoints") / "clip")


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "open_clip"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**ARCHITECTURE).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE, "preprocess_cfg": {}}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "HPS_v2_compressed.pt"
    torch.manual_seed(1)
    model = open_clip.CLIP(**ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.parameters():  # the usual initial weights hardly look at the picture
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return path


def test_the_transformers_score_is_the_models_own(transformers_folder, pictures) -> None:
    from transformers import CLIPModel, CLIPProcessor

    encoder = TransformersClip.from_pretrained(transformers_folder, batch_size=2)
    assert isinstance(encoder, ClipEncoder)
    found = ClipScorer(encoder)(pictures, PROMPTS, [[]] * 3)
    model, processor = (
        CLIPModel.from_pretrained(transformers_folder),
        CLIPProcessor.from_pretrained(transformers_folder),
    )
    with torch.inference_mode():
        theirs = model(**processor(images=pictures, text=PROMPTS, return_tensors="pt", padding=True))
        oracle = torch.diagonal(theirs.logits_per_image) / model.logit_scale.exp()
    np.testing.assert_allclose(found, oracle, atol=1e-5)
    assert len(set(found.round(6))) == 3


def test_folders_of_the_time_before_safetensors_load_but_run_nothing(transformers_folder, pictures, tmp_path) -> None:
    from transformers import CLIPModel

    shutil.copytree(transformers_folder, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(transformers_folder).state_dict(), tmp_path / "old" / "pytorch_model.bin")
    want = TransformersClip.from_pretrained(transformers_folder).embed_pictures(pictures)
    np.testing.assert_allclose(
        TransformersClip.from_pretrained(tmp_path / "old").embed_pictures(pictures), want, atol=1e-6
    )

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.write_text, (tmp_path / "evil", "ran"))

    torch.save({"w": Evil()}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="clip must be in transformers' format"):
        TransformersClip.from_pretrained(tmp_path / "old")
    assert not (tmp_path / "evil").exists()


def test_the_open_clip_score_is_the_models_own(open_clip_folder, pictures) -> None:
    name = f"local-dir:{open_clip_folder}"
    encoder = OpenClip.from_pretrained(name, batch_size=2)
    found = ClipScorer(encoder)(pictures, PROMPTS, [[]] * 3)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.inference_mode():
        picture, text, _ = model(
            torch.stack([preprocess(p) for p in pictures]), open_clip.get_tokenizer("ViT-B-32")(PROMPTS)
        )
    np.testing.assert_allclose(found, (picture * text).sum(1), atol=1e-5)


def test_scales_and_long_prompts(transformers_folder, pictures) -> None:
    encoder = TransformersClip.from_pretrained(transformers_folder)
    cosine = ClipScorer(encoder)(pictures, PROMPTS, [[]] * 3)
    np.testing.assert_allclose(
        ClipScorer(encoder, scale="clipscore")(pictures, PROMPTS, [[]] * 3), 2.5 * cosine.clip(0)
    )
    np.testing.assert_allclose(ClipScorer(encoder, scale="unit")(pictures, PROMPTS, [[]] * 3), (1 + cosine) / 2)
    assert np.isfinite(ClipScorer(encoder)(pictures[:1], ["word " * 200], [[]])).all()
    assert ClipScorer(encoder)([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="prompts"):
        ClipScorer(encoder)(pictures, PROMPTS[:1], [[]] * 3)
    with pytest.raises(ValueError, match="scale"):
        ClipScorer(encoder, scale="percent")  # type: ignore[arg-type]


def test_a_prompt_is_embedded_once(transformers_folder, pictures, monkeypatch) -> None:
    encoder = TransformersClip.from_pretrained(transformers_folder)
    seen: list[str] = []
    original = encoder.processor.tokenizer
    monkeypatch.setattr(encoder.processor, "tokenizer", lambda some, **o: seen.extend(some) or original(some, **o))
    encoder.embed_text(PROMPTS)
    assert seen == PROMPTS[:2]


def test_hps_preprocessing_keeps_the_whole_picture_between_black_bars(pictures) -> None:
    for picture in pictures:
        tensor = hps_preprocess(picture)
        assert tensor.shape == (3, 224, 224)
        scale = 224 / max(picture.size)
        width, height = round(picture.width * scale), round(picture.height * scale)
        top, left = (224 - height) // 2, (224 - width) // 2
        black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
        outside = torch.ones(224, 224, dtype=torch.bool)
        outside[top : top + height, left : left + width] = False
        assert (tensor[:, outside] - black[:, None]).abs().max() < 1e-6 if outside.any() else True
        inside = tensor[:, top : top + height, left : left + width] * torch.tensor(STD)[:, None, None]
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1) / 255
        # PIL rounds to 8 bits and cuts off what leaves [0, 1]
        difference = (inside + torch.tensor(MEAN)[:, None, None]).clamp(0, 1) - expected
        assert difference.abs().mean() < 0.005 and difference.abs().max() < 0.1
    # the longest side fits exactly, the other does not: hpsv2 itself forgets the bars here and its network refuses the picture
    assert hps_preprocess(Image.new("RGB", (224, 100))).shape == (3, 224, 224)
    assert hps_preprocess(Image.new("RGB", (2000, 1))).shape == (3, 224, 224)


def test_hps_is_the_cosine_of_its_own_preprocessing(checkpoint, pictures) -> None:
    found = HPSv2Scorer.from_pretrained(checkpoint, architecture=ARCHITECTURE, batch_size=2)(
        pictures, PROMPTS, [[]] * 3
    )
    model = open_clip.CLIP(**ARCHITECTURE).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with torch.inference_mode():
        a = model.encode_image(torch.stack([hps_preprocess(p) for p in pictures]), normalize=True)
        b = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS), normalize=True)
    np.testing.assert_allclose(found, (a * b).sum(1), atol=1e-6)
    assert np.ptp(found) > 1e-3


def test_checkpoints_that_do_not_fit_are_named(checkpoint, tmp_path, transformers_folder, open_clip_folder) -> None:
    with pytest.raises(ValueError, match="xswu/HPSv2"):
        HPSv2Scorer.from_pretrained(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"bad\.pt must be a checkpoint"):
        HPSv2Scorer.from_pretrained(tmp_path / "bad.pt", architecture=ARCHITECTURE)
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must fit"):
        HPSv2Scorer.from_pretrained(tmp_path / "other.pt", architecture=ARCHITECTURE)

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.write_text, (tmp_path / "evil", "ran"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="must be a checkpoint"):
        HPSv2Scorer.from_pretrained(tmp_path / "evil.pt", architecture=ARCHITECTURE)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(ValueError, match="clip must be a folder"):
        TransformersClip.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be loaded"):
        OpenClip.from_pretrained("ViT-none", checkpoint)
    with pytest.raises(ValueError, match="checkpoint must be a file"):
        OpenClip.from_pretrained("ViT-B-32")
    safe = tmp_path / "hps.safetensors"
    save_file(torch.load(checkpoint, weights_only=True)["state_dict"], safe)
    assert HPSv2Scorer.from_pretrained(safe, architecture=ARCHITECTURE)


THEIRS = """
import json, sys, types
sys.modules["turtle"] = types.SimpleNamespace(forward=None)  # hpsv2 imports it by mistake, and it needs tkinter
import hpsv2.src.open_clip.factory as factory
import hpsv2.img_score as scoring
checkpoint, prompt, architecture, *pictures = sys.argv[1:]
factory._MODEL_CONFIGS["ViT-H-14"] = json.loads(architecture)  # a small network under the name that it asks for
create = scoring.create_model_and_transforms
scoring.create_model_and_transforms = lambda name, pretrained, **options: create(name, None, **{**options, "precision": "fp32"})
print(json.dumps([float(x) for x in scoring.score(pictures, prompt, cp=checkpoint)]))
"""


@pytest.mark.slow
def test_parity_with_the_package_hpsv2(checkpoint, pictures, tmp_path) -> None:
    """Hpsv2 1.2.0 in an environment of its own (it borrows torch from ours); the same scores to 1e-5."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "hpsv2==1.2.0", "clint", "args"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    if done.returncode:
        pytest.skip(f"hpsv2 cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(packages, "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    # its wheel lacks the vocabulary, which is CLIP's
    vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    Path(packages, "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz").write_bytes(vocabulary.read_bytes())
    files = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    prompt = "a photo of two people, café at night"
    done = subprocess.run(
        [python, "-c", THEIRS, str(checkpoint), prompt, json.dumps(ARCHITECTURE), *files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = HPSv2Scorer.from_pretrained(checkpoint, architecture=ARCHITECTURE)(pictures, [prompt] * 3, [[]] * 3)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.ptp(theirs) > 1e-3  # the pictures are told apart, so agreement says something
    print("hpsv2 parity, largest difference:", np.abs(ours - np.array(theirs)).max())
