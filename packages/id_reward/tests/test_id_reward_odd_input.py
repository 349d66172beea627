"""What strangers handed over and what came of it: each of these was a wrong number, a traceback, a hang or a memory bomb once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")

sys.path.insert(0, str(Path(__file__).parent))
from id_reward import CompositeReward, Faces, IdentityScorer, cosine_similarity, swap_rate
from id_reward.building import build_scorer, load_object
from id_reward.errors import InputError
from id_reward.floats import as_floats, finite, whole
from id_reward.images import as_array, open_image
from id_reward.inputs import content_key
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward
from id_reward.outputs import check_target
from id_reward.serving.client import encode
from odd_pictures import brightness, file, gray
from PIL import Image

NAN, INF = float("nan"), float("inf")


class Colours:
    """One face a picture, its mean colour."""

    def detect_and_embed(self, images: Any) -> list[Faces]:
        means = [as_array(i).reshape(-1, 3).mean(0) for i in images]
        return [Faces(np.array([[0.0, 0, 2, 2]]), np.ones(1), m[None]) for m in means]


# numbers


def test_what_is_masked_has_no_value() -> None:
    masked = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])
    assert np.array_equal(as_floats(masked), [1, NAN, 3], equal_nan=True)
    assert np.array_equal(as_floats(np.ma.array([1, 2], mask=[True, False])), [NAN, 2], equal_nan=True)
    reward = CompositeReward({"a": (lambda i, p, r: masked, 1.0)})
    assert np.isnan(reward([0] * 3, ["x"] * 3, [[]] * 3).totals).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="finite"):
        cosine_similarity(np.ma.array([[1.0, 0.0]], mask=[[True, False]]), np.eye(2))
    with pytest.raises(ValueError, match="masked array"):
        as_array(np.ma.array(np.full((4, 4, 3), 7, np.uint8), mask=True))


@pytest.mark.parametrize("given", [np.array([1.0, "2"], dtype=object), [10**400], np.array(["1"], dtype=object)])
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="numbers are expected"):
        as_floats(given)


def test_tensors_without_values_are_refused() -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(3, 4, 4, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(ValueError, match="without readable values"):
            as_floats(tensor)
        with pytest.raises(ValueError, match="without readable values"):
            as_array(tensor)


def test_settings_are_numbers_in_their_range() -> None:
    assert finite("x", np.float32(0.5)) == 0.5 and whole("n", np.int64(3), least=1) == 3
    for value in (NAN, INF, "1", None, True, [1], 10**400, 1 + 1j):
        with pytest.raises(ValueError, match="x must be a finite number"):
            finite("x", value)
    for value in (1.5, NAN, "2", None, True, 0, 10):
        with pytest.raises(ValueError, match="n must be a whole number from 1 to 9"):
            whole("n", value, least=1, most=9)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"missing_penalty": "1"}, "missing_penalty"), ({"extra_penalty": None}, "extra_penalty"), ({"min_similarity": "0"}, "min_similarity"),
        ({"cache_size": 1.5}, "cache_size"), ({"cache_size": "5"}, "cache_size"), ({"cache_size": NAN}, "cache_size"),
    ],
)  # fmt: skip
def test_options_of_the_identity_scorer(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=f"{word} must be"):
        IdentityScorer(Colours(), **options)


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [
        ([brightness], {}, "parts must map names"), ({"total": (brightness, 1.0)}, {}, "'total'"),
        ({"a": (brightness, "1")}, {}, "weight of a must be"), ({"a": (brightness, 1j)}, {}, "weight of a must be"),
        ({"a": (brightness, 1.0)}, {"batch_size": 1.5}, "batch_size must be"), ({"a": (brightness, 1.0)}, {"batch_size": "2"}, "batch_size"),
        ({"a": (brightness, 1.0)}, {"batch_size": True}, "batch_size"), ({"a": (brightness, 1.0)}, {"normalization": "batch"}, "must map names"),
    ],
)  # fmt: skip
def test_composites_that_cannot_be_meant(parts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompositeReward(parts, **options)


def test_numpys_numbers_normalise() -> None:
    reward = CompositeReward({"a": (brightness, np.float32(2))}, normalization={"a": (np.float32(0), np.float32(0.5))})
    assert reward([gray(255)], ["x"], [[]]).totals.tolist() == [4.0]


def test_shapes_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="one row each"):
        cosine_similarity(np.zeros((2, 2, 2)), np.eye(2))
    with pytest.raises(ValueError, match="confusion must be"):
        swap_rate(np.zeros((2, 3)))


# pictures


def test_open_files_are_pictures_and_stay_open(tmp_path: Path) -> None:
    """A file's ``detach`` is no tensor's: it took the file away from whoever gave it."""
    scorer, rewards = IdentityScorer(Colours()), []
    (tmp_path / "a.png").write_bytes(file(51))
    with open(tmp_path / "a.png", "rb") as opened:
        for given in (opened, io.BytesIO(file(51))):
            rewards += scorer([gray(51)] * 2, ["x"] * 2, [[given]] * 2).tolist()
            assert content_key(given) is None and not given.closed and given.seekable()
    assert rewards == pytest.approx([1.0] * 4)
    with pytest.raises(ValueError, match=r"references\[0\] must be a list of pictures"):
        scorer([gray(51)], ["x"], [io.BytesIO(file(51))])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.png")
    pipe = tmp_path / "p.png"
    for what in (open_image, encode):
        with pytest.raises(ValueError, match="must be a file, got a pipe or a device"):
            what(pipe)
    assert content_key(pipe) is None
    with pytest.raises(ValueError, match="did not write"):
        check_target(tmp_path / "p.png", "--json p.png", [])


def test_prompts_are_strings() -> None:
    for wrong in (None, 3, b"x"):
        with pytest.raises(ValueError, match=r"prompts\[1\] must be a string, got"):
            CompositeReward({"a": (brightness, 1.0)})([gray(1)] * 2, ["x", wrong], [[]] * 2)


MEMORY = """
import resource, sys, warnings
from id_reward.images import as_image
warnings.simplefilter("ignore")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(as_image(sys.argv[1]).size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "F"])
def test_a_large_picture_needs_little_beside_its_own_pixels(mode: str, tmp_path: Path) -> None:
    """49 million pixels in a file of some kilobytes; it took 2.1 GB once, and is some .6 GB itself."""
    path = tmp_path / ("a.tif" if mode == "F" else "a.png")
    Image.new(mode, (7000, 7000)).save(path, **({"compression": "tiff_lzw"} if mode == "F" else {}))
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )  # fmt: skip
    assert done.stdout.startswith("(7000, 7000)") and float(done.stdout.split()[-1]) < 1.0


def test_bands_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is worked on in pieces is the picture that is worked on whole."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 11, 4), np.uint8)
    deep, real = rng.integers(0, 65536, (37, 11)).astype(np.uint16), rng.random((37, 11)).astype(np.float32)
    pictures = [
        Image.fromarray(pixels), Image.fromarray(pixels[..., :2], "LA"), Image.fromarray(deep), Image.fromarray(real),
        Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., :3]).quantize(9), Image.fromarray(pixels[..., :3]).convert("CMYK"),
    ]  # fmt: skip
    wanted = [as_array(p, background=(3, 130, 250)) for p in [*pictures, real]]
    monkeypatch.setattr("id_reward.images.BAND", 25)
    for want, picture in zip(wanted, [*pictures, real], strict=True):
        assert np.array_equal(as_array(picture, background=(3, 130, 250)), want)
    colours, alpha = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    assert np.array_equal(wanted[0], np.round(alpha * colours + (1 - alpha) * np.array([3, 130, 250])))


def test_what_cannot_be_read_is_refused_wherever_it_comes_first() -> None:
    """Their content is asked for before their pixels are: torch answered."""
    torch = pytest.importorskip("torch")
    scorer = IdentityScorer(Colours())
    for tensor in (torch.zeros(3, 4, 4, device="meta"), torch.zeros(3, 4, 4).to_sparse()):
        with pytest.raises(ValueError, match="without readable values"):
            scorer([gray(51)], ["x"], [[tensor]])


def test_a_masked_reference_is_not_the_one_without_a_mask() -> None:
    """Equal bytes: the cache gave the picture that is refused the other's face."""
    pixels, scorer = np.full((4, 4, 3), 51, np.uint8), IdentityScorer(Colours())
    scorer.embed_references([pixels])
    with pytest.raises(ValueError, match="masked array"):
        scorer.embed_references([np.ma.array(pixels, mask=True)])


def test_sixteen_bits_in_either_order_of_bytes() -> None:
    levels = np.full((2, 2, 3), 51 * 257)
    assert as_array(levels.astype(">u2")).max() == as_array(levels.astype("<u2")).max() == 51


def test_a_name_that_no_file_can_have() -> None:
    for name in ("a" * 5000 + ".png", "a\0b.png", "bad\udc80.png"):
        with pytest.raises(ValueError, match="must be a"):
            open_image(name)


# adapters


@pytest.mark.parametrize(
    "prompt", [[], [{"role": "user"}], [{"content": None}], 3, [{"content": ["x"]}], {"content": "x"}]
)
def test_trl_names_a_prompt_that_is_none(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\] must be a string or a conversation"):
        TRLReward(brightness)([prompt], [gray(1)], references=[[gray(1)]])


@pytest.mark.parametrize(
    "metadata",
    [None, {"references": [[]]}, [None], ["references"], ['{"references": []}'], "references", [["references"]]],
)
def test_flow_grpo_names_metadata_that_is_none(metadata: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata(\[0\])? must be"):
        FlowGRPOReward(brightness)([gray(1)], ["x"], metadata)


def test_verl_names_what_does_not_fit() -> None:
    reward = VerlOmniReward(brightness)
    for extra in (["references"], "references"):
        with pytest.raises(ValueError, match="extra_info must be a dictionary"):
            reward("d", gray(1), "x", extra)
    with pytest.raises(ValueError, match="at least one frame"):
        reward("d", np.zeros((0, 4, 4, 3), np.uint8), "x", {"references": []})
    for missing in (NAN, INF, "0", None):
        with pytest.raises(ValueError, match="missing_score must be"):
            VerlOmniReward(brightness, missing_score=missing)


def test_a_part_cannot_take_the_place_of_the_sum() -> None:
    """verl's "score" was the part's raw value, without its weight, and Flow-GRPO's "avg" ate the part."""
    with pytest.raises(ValueError, match="'score'"):
        VerlOmniReward({"score": (brightness, 2.0)})
    with pytest.raises(ValueError, match="'avg'"):
        FlowGRPOReward({"avg": (brightness, 2.0)})


@pytest.mark.parametrize("options", [{"threshold": [1, 2]}, {"references": ["a"]}, {"scorer": 3}, {"scorer": "..:x"}])
def test_options_of_a_configuration_that_are_no_options(options: dict[str, Any]) -> None:
    from id_reward.integrations.verl_omni import compute_score

    with pytest.raises(ValueError, match="must be"):
        compute_score("d", gray(1), "x", {"references": []}, **options)
    with pytest.raises(ValueError, match="must be a dictionary"):
        build_scorer([options])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"package\.module:name"):
        load_object("a b:c")


def test_a_refusal_is_one_line_where_what_came_prints_on_several() -> None:
    with pytest.raises(InputError, match=r"got list \[array\(\[\[\[0\], \[0\]\]\]") as refused:
        as_array([np.zeros((1, 2, 1), np.uint8)])
    assert "\n" not in str(refused.value)
