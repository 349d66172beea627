"""PickScore, HPSv3 and judges that answer in words, on tiny checkpoints in the real formats."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs id-reward[preference]")
pytest.importorskip("transformers", reason="needs id-reward[preference]")
pytest.importorskip("PIL", reason="needs id-reward[image]")
import torch
from id_reward import CompositeReward
from id_reward.backends import preference
from id_reward.backends.preference import HPSv3Scorer, PickScorer, hpsv3_instruction
from id_reward.backends.vision_language import QUESTION, JudgeScorer, VisionLanguageModel, read_ratings
from PIL import Image

spec = importlib.util.spec_from_file_location("tiny_checkpoints", Path(__file__).with_name("tiny_checkpoints.py"))
assert spec and spec.loader
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

INSTRUCTION = "How good is it?\nText - {prompt}\nRating: <|Reward|>\nEND"
PROMPTS = ["a cat", "two cats that sit on a rather long sofa", "a cat"]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)) for size in ((60, 90, 3), (200, 64, 3), (56, 56, 3))
    ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return tiny.qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def checkpoint(qwen, tmp_path_factory) -> Path:
    return tiny.hpsv3(qwen, tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors")


@pytest.fixture(scope="module")
def hpsv3(qwen, checkpoint) -> HPSv3Scorer:
    return HPSv3Scorer.from_pretrained(
        checkpoint, qwen, instruction=INSTRUCTION, dtype="float32", pixels=56 * 56, batch_size=2
    )


def test_pickscore_is_the_models_own_logit(clip) -> None:
    from transformers import CLIPModel, CLIPProcessor

    scorer = PickScorer.from_pretrained(clip)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.inference_mode():
        inputs = processor(images=pictures(), text=PROMPTS, return_tensors="pt", padding=True)
        expected = model(**inputs).logits_per_image.diagonal()
    np.testing.assert_allclose(scorer(pictures(), PROMPTS, [[]] * 3), expected, rtol=1e-4)
    unit = PickScorer.from_pretrained(clip, clip, scale="unit")
    np.testing.assert_allclose(unit(pictures(), PROMPTS, [[]] * 3), expected / 26, rtol=1e-4)
    assert scorer([], [], []).shape == (0,) and scorer.to("cpu") is scorer
    with pytest.raises(ValueError, match="scale"):
        PickScorer(scorer.encoder, scale="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one entry per picture"):
        scorer(pictures(), ["x"], [])
    with pytest.raises(ValueError, match="clip's processor must be a folder"):
        PickScorer.from_pretrained(clip, "/nowhere")


def test_hpsv3_by_hand(hpsv3, qwen, checkpoint) -> None:
    """The head on the hidden state of its token, picture by picture, from the file's own tensors."""
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    state = load_file(checkpoint)
    processor = AutoProcessor.from_pretrained(qwen)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
    assert token == len(processor.tokenizer) - 1 == state["model.embed_tokens.weight"].shape[0] - 1
    expected = []
    for picture, prompt in zip(pictures(), PROMPTS):
        resized = hpsv3._picture(picture)
        assert resized.width % 28 == resized.height % 28 == 0
        text = (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + INSTRUCTION.format(prompt=prompt)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )  # fmt: skip
        inputs = processor(text=[text], images=[resized], return_tensors="pt")
        with torch.inference_mode():
            hidden = hpsv3.model.model(**inputs).last_hidden_state[0][inputs["input_ids"][0] == token][0]
            for n in (0, 3, 5):
                hidden = torch.nn.functional.linear(hidden, state[f"rm_head.{n}.weight"], state[f"rm_head.{n}.bias"])
                hidden = hidden.relu() if n < 5 else hidden
        expected.append(float(hidden[0]))
    found = hpsv3(pictures(), PROMPTS, [[]] * 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len({round(v, 4) for v in found}) == 3  # the picture matters, and so does the prompt
    assert abs(hpsv3(pictures()[:1], ["a dog"], [[]])[0] - found[0]) > 1e-5
    assert hpsv3([], [], []).shape == (0,)
    body = hpsv3.model.state_dict()
    torch.testing.assert_close(body["model.language_model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    some = next(n for n in state if n.startswith("visual.blocks"))
    torch.testing.assert_close(body[f"model.{some}"], state[some])


def test_hpsv3_refuses_what_does_not_fit(qwen, checkpoint, tmp_path, hpsv3) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(checkpoint)
    given = {"base": qwen, "instruction": INSTRUCTION, "dtype": "float32"}
    fewer = {n: v for n, v in state.items() if "layers.1.mlp" not in n}
    save_file(fewer, tmp_path / "fewer.safetensors")
    save_file({n: v for n, v in state.items() if "rm_head" not in n}, tmp_path / "headless.safetensors")
    save_file({**state, "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}, tmp_path / "misshapen.safetensors")
    save_file({**state, "lora.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    for name, words in (
        ("fewer", "must fit its base model, but"), ("headless", "must hold the reward's head"), ("misshapen", "must fit its base model"),
        ("more", "must fit its base model, but 1 tensors do not, lora.weight"), ("nothing", "there is no"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            HPSv3Scorer.from_pretrained(tmp_path / f"{name}.safetensors", **given)
    with pytest.raises(ValueError, match="base must be a folder"):
        HPSv3Scorer.from_pretrained(checkpoint, "/nowhere", instruction=INSTRUCTION)
    for wrong in ("{prompt}", "<|Reward|>", "{prompt} <|Reward|> <|Reward|>"):
        with pytest.raises(ValueError, match="instruction must hold"):
            HPSv3Scorer.from_pretrained(checkpoint, qwen, instruction=wrong)
    with pytest.raises(ValueError, match="prompts must not hold"):
        hpsv3(pictures()[:1], ["a <|Reward|>"], [[]])


def test_the_instruction_comes_out_of_the_installed_package_without_running_it(tmp_path, monkeypatch) -> None:
    package = tmp_path / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('this was run')")
    (package / "data_collator_qwen.py").write_text(
        'import nothing_that_is_there\nINSTRUCTION = """\nRate.\nText: {text_prompt}\n"""\nprompt_with_special_token = """<|Reward|>\nEND"""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hpsv3_instruction() == "\nRate.\nText: {prompt}\n<|Reward|>\nEND"
    monkeypatch.setattr(preference.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps hpsv3"):
        hpsv3_instruction()


def test_a_vision_language_model_answers_each_question_alone(qwen) -> None:
    """Batches of different lengths give what one at a time gives, and only the answer comes back."""
    model = VisionLanguageModel.from_pretrained(qwen, max_new_tokens=12, batch_size=3, dtype="float32")
    questions = ["what?", "and what is this, if you look at it for long?", "what?"]
    together = model.answer(pictures(), questions)
    alone = [model.answer([p], [q])[0] for p, q in zip(pictures(), questions)]
    assert together == alone and "what" not in "".join(together)
    with pytest.raises(ValueError, match="one entry per picture"):
        model.answer(pictures(), ["x"])
    with pytest.raises(ValueError, match="model must be a folder"):
        VisionLanguageModel.from_pretrained("/nowhere")


def test_a_judges_ratings_are_read_out_of_a_real_generation(qwen, monkeypatch) -> None:
    """The tiny model talks nonsense, so its last step is given what a trained one says; everything around it is real."""
    judge = VisionLanguageModel.from_pretrained(qwen, dtype="float32")
    says = {
        "good": "Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3",
        "odd": "I cannot tell.",
        "high": "Alignment: 9, Coherence: 4, Style: 3",
    }
    tokenizer = judge.processor.tokenizer

    def generate(input_ids, **options):  # type: ignore[no-untyped-def]
        questions = tokenizer.batch_decode(input_ids)
        answers = [next(a for word, a in says.items() if f"request: {word}" in question) for question in questions]
        new = tokenizer(answers, return_tensors="pt", padding=True)["input_ids"]
        return torch.cat([input_ids, new], 1)

    monkeypatch.setattr(judge.model, "generate", generate)
    scorer = JudgeScorer(judge)
    found = scorer(pictures(), ["good", "odd", "high"], [[]] * 3)
    assert found[0] == pytest.approx(0.75) and np.isnan(found[1:]).all()
    assert scorer.ratings(pictures()[:1], ["good"]).tolist() == [[5, 4, 3]]
    reward = CompositeReward({"judge": (scorer, 2.0)}, nan_policy="zero")
    assert reward(pictures(), ["good", "odd", "high"], [[]] * 3).totals.tolist() == [1.5, 0, 0]
    assert "{prompt}" in QUESTION and scorer.to("cpu") is scorer


@pytest.mark.parametrize(("answer", "expected"), [
    ("Alignment Score (1-5): 4\nStyle Score (1-5): 2.5", [4, 2.5]), ("**Alignment Score:** 3\n**Style Score:** 1", [3, 1]),
    ("alignment = .5, STYLE: 5/5", [0.5, 5]), ("Alignment Score: good", [np.nan, np.nan]), ("", [np.nan, np.nan]), ("4 5", [np.nan, np.nan]),
    ("Style Score (1-5): -1", [np.nan, -1]),
])  # fmt: skip
def test_ratings_are_read_by_name(answer, expected) -> None:
    np.testing.assert_array_equal(read_ratings(answer, ["Alignment", "Style"]), expected)


def test_a_judge_is_checked() -> None:
    judge = SimpleNamespace(answer=lambda images, questions: [""] * len(images))
    for wrong in ({"question": "how good?"}, {"names": ()}, {"low": 5.0, "high": 1.0}):
        with pytest.raises(ValueError, match=r"question must|names must"):
            JudgeScorer(judge, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens"):
        VisionLanguageModel(None, None, max_new_tokens=0)
