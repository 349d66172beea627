"""References, prompts and pictures in every container that data sets, trainers and notebooks use: the same numbers, or one sentence."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
from id_reward import CompositeReward, Evaluator, Faces, IdentityScorer
from id_reward.identity import reference_key
from id_reward.images import as_array
from id_reward.inputs import content_key, listed, listed_references, row_keys
from id_reward.integrations.rewards import FlowGRPOReward, TRLReward, VerlOmniReward
from PIL import Image

COLOURS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}


class ColourBackend:
    """One face in every picture, embedded as its mean colour."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        self.seen.append(len(images))
        return [
            Faces(np.array([[0.0, 0, 1, 1]]), np.ones(1), as_array(i).reshape(-1, 3).mean(0, keepdims=True))
            for i in images
        ]


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name, colour in COLOURS.items():
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in COLOURS]


def pixels(file: str) -> np.ndarray:
    return as_array(file)


def torch_module():  # type: ignore[no-untyped-def]
    return pytest.importorskip("torch", reason="needs PyTorch, as id-reward[torch] brings it")


def tensor(file: str):  # type: ignore[no-untyped-def]
    return torch_module().from_numpy(pixels(file).copy()).permute(2, 0, 1)


def pandas():  # type: ignore[no-untyped-def]
    return pytest.importorskip("pandas", reason="needs pandas")


def arrow():  # type: ignore[no-untyped-def]
    return pytest.importorskip("pyarrow", reason="needs pyarrow")


def of_objects(items: list) -> np.ndarray:
    array = np.empty(len(items), object)
    for number, item in enumerate(items):
        array[number] = item
    return array


# what holds the references of one picture, made from its files; every row is a temporary: nothing but the container keeps it alive
ROWS = {
    "list": list, "tuple": tuple, "deque": deque, "generator": lambda files: (f for f in files), "map": lambda files: map(str, files),
    "array of strings": np.array, "array of objects": lambda files: np.array(files, object),
    "array of pictures": lambda files: of_objects([Image.open(f) for f in files]),
    "pixels": lambda files: np.stack([pixels(f) for f in files]), "floats": lambda files: np.stack([pixels(f) for f in files]) / 255,
    "tensor": lambda files: torch_module().stack([tensor(f) for f in files]),
    "bfloat16": lambda files: torch_module().stack([tensor(f) for f in files]).bfloat16() / 255,
    "list of tensors": lambda files: [tensor(f) for f in files], "list of arrays": lambda files: [pixels(f) for f in files],
    "pandas": lambda files: pandas().Series(files, index=range(5, 5 + len(files))),
    "pandas strings": lambda files: pandas().Series(files, dtype="string"), "pandas index": lambda files: pandas().Index(files),
    "arrow": lambda files: arrow().array(files), "arrow chunks": lambda files: arrow().chunked_array([files]),
    "bytes": lambda files: [Path(f).read_bytes() for f in files],
    "dictionaries": lambda files: [{"bytes": Path(f).read_bytes(), "path": None} for f in files],
}  # fmt: skip
OUTER = {
    "list": list, "tuple": tuple, "generator": lambda rows: (r for r in rows), "objects": of_objects,
    "pandas": lambda rows: pandas().Series(rows, index=list(range(len(rows)))[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("outer", OUTER)
def test_every_container_of_references_gives_the_same_rewards(files, row, outer) -> None:
    """Temporaries whose addresses were used again scored [1, .04, .04] where [1, 1, 1] is right."""

    def references():  # type: ignore[no-untyped-def]
        return OUTER[outer]([ROWS[row]([file]) for file in files])

    images = [Image.open(file) for file in files]
    scorer = IdentityScorer(ColourBackend())
    for _ in range(2):  # with an empty cache, and with a full one
        np.testing.assert_allclose(scorer(images, [""] * 3, references()), [1, 1, 1], atol=1e-12)
    reward = CompositeReward({"identity": (scorer, 1.0)}, batch_size=2)
    np.testing.assert_allclose(reward(images, [""] * 3, references()).totals, [1, 1, 1], atol=1e-12)
    found = TRLReward(reward)(prompts=[""] * 3, completions=images, references=references())
    assert found == pytest.approx([1, 1, 1])
    scores, _ = FlowGRPOReward(reward)(images, [""] * 3, [{"references": given} for given in references()])
    assert scores["avg"] == pytest.approx([1, 1, 1])
    verl = [
        VerlOmniReward(reward)("", image, "", {"references": given})["score"]
        for image, given in zip(images, references())
    ]
    assert verl == pytest.approx([1, 1, 1])
    unit = lambda some: np.stack([as_array(i).reshape(-1, 3).mean(0) + 1e-9 for i in some])  # noqa: E731
    result = Evaluator(identity=scorer, clip_pictures=unit, dino_pictures=unit)(images, [""] * 3, references())
    for name in ("Face-Sim", "CLIP-I", "DINO-I"):
        np.testing.assert_allclose(result.values[name], [1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_two_references_each_keep_their_order(files, row) -> None:
    known = IdentityScorer(ColourBackend()).embed_references(ROWS[row](files[:2]))
    np.testing.assert_allclose(known, [COLOURS["r"], COLOURS["g"]], atol=1)


def test_stacks_of_whole_batches(files) -> None:
    torch = torch_module()
    images = np.stack([pixels(f) for f in files])
    references = images[:, None]
    scorer = IdentityScorer(ColourBackend())
    np.testing.assert_allclose(scorer(images, [""] * 3, references), [1, 1, 1])
    tensors = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
    np.testing.assert_allclose(scorer(tensors, [""] * 3, tensors[:, None]), [1, 1, 1])
    scores, _ = FlowGRPOReward(CompositeReward({"x": (scorer, 1.0)}))(
        tensors / 255, np.array(["a"] * 3), [{"references": t} for t in tensors[:, None]]
    )
    assert scores["avg"] == pytest.approx([1, 1, 1])


def test_prompts_and_pictures_in_any_container(files) -> None:
    seen: list[list[str]] = []

    def length(images, prompts, references):  # type: ignore[no-untyped-def]
        seen.append(list(prompts))
        return np.array([len(p) for p in prompts], float)

    reward = CompositeReward({"x": (length, 1.0)}, batch_size=1)
    for prompts in (
        ("a", "bb"),
        np.array(["a", "bb"]),
        (p for p in ("a", "bb")),
        pandas().Series(["a", "bb"], index=[7, 3]),
    ):
        assert reward(iter(files[:2]), prompts, [[]] * 2).totals.tolist() == [1, 2]
    assert seen == [["a"], ["bb"]] * 4


def test_a_generator_that_stands_for_several_pictures_is_walked_once(files) -> None:
    one, other = (f for f in files[:1]), (f for f in files[1:2])
    rows = listed_references([one, one, other, one], 4)
    assert rows == [files[:1], files[:1], files[1:2], files[:1]]


@pytest.mark.parametrize(("given", "words"), [
    (["a.png", "b.png"], r"references\[0\] must be a list of pictures, got 'a.png'"),
    ("a.png", "references must be a list of lists, one for each picture, got 'a.png'"),
    ([["a.png"]], r"one entry per picture \(2\), got (2 and )?1"),
    ([["a.png"], "b.png"], r"references\[1\] must be a list"),
    ([[], [None]], r"references\[1\]\[0\] must be one of pictures, got None"),
    ([[], ["a.png", float("nan")]], r"references\[1\]\[1\]"),
    ([[], np.zeros((4, 4, 3))], r"references\[1\] must be a list of pictures, got ndarray of shape \(4, 4, 3\); put a single picture"),
    ([[], {"a.png"}], r"references\[1\]"), ([[], {"anna": "a.png"}], r"references\[1\]"), ([[], 3], r"references\[1\]"),
    ([[], None], r"references\[1\] must be a list of pictures, got None"), ([[], np.array("a.png")], r"references\[1\]"),
    (None, "references must be"),
    (np.zeros((2, 4, 4, 3)), r"references\[0\] must be a list of pictures"),
])  # fmt: skip
def test_what_is_no_list_of_references_is_refused(given, words) -> None:
    backend = ColourBackend()
    scorer = IdentityScorer(backend)
    for call in (
        lambda: scorer(["x", "y"], ["", ""], given),
        lambda: CompositeReward({"x": (scorer, 1.0)})(["x", "y"], ["", ""], given),
        lambda: Evaluator(identity=scorer)(["x", "y"], ["", ""], given),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert backend.seen == []  # before work begins


def test_a_table_and_a_missing_value_of_pandas_are_refused() -> None:
    table = pandas().DataFrame({"references": ["a.png"]})
    with pytest.raises(ValueError, match="references must be a list"):
        listed_references(table, 1)
    with pytest.raises(ValueError, match=r"references\[0\]\[1\]"):
        listed_references([pandas().Series(["a.png", None], dtype="string")], 1)


def test_one_string_is_no_list_of_prompts(files) -> None:
    """It became one prompt for each letter."""
    reward = CompositeReward({"x": (lambda i, p, r: np.zeros(len(i)), 1.0)})
    for call in (
        lambda: reward(files, "red", [[]] * 3),
        lambda: FlowGRPOReward(reward)(files, "red", [{"references": []}] * 3),
        lambda: TRLReward(reward)(prompts="red", completions=files, references=[[]] * 3),
        lambda: Evaluator(text=reward)(files, "red", [[]] * 3),
    ):
        with pytest.raises(ValueError, match="prompts must be a list"):
            call()
    with pytest.raises(ValueError, match="images must be a list"):
        reward("a.png", ["x"], [[]])


def test_pictures_with_equal_bytes_that_look_different_are_told_apart(tmp_path) -> None:
    indices = Image.new("P", (2, 2), 0)
    red, green = indices.copy(), indices.copy()
    red.putpalette([255, 0, 0]), green.putpalette([0, 255, 0])
    assert red.tobytes() == green.tobytes()
    np.testing.assert_allclose(
        IdentityScorer(ColourBackend()).embed_references([red, green]), [COLOURS["r"], COLOURS["g"]]
    )
    half = Image.fromarray(np.array([[[255, 0, 0]], [[0, 255, 0]]], np.uint8).repeat(2, 1))
    keys = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        half.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as opened:
            opened.load()
            keys.add(content_key(opened))
    assert len(keys) == 4  # 2 x 2 pixels, symmetric: half of the eight turns look alike
    clear, opaque = Image.new("L", (2, 2), 9), Image.new("L", (2, 2), 9)
    clear.info["transparency"] = 9
    assert content_key(clear) != content_key(opaque)
    dark, darker = (Image.fromarray(np.full((2, 2), v, np.uint16)) for v in (300, 301))  # equal in 8 bits
    assert content_key(dark) != content_key(darker)


def test_a_file_is_known_by_its_content_not_by_name_and_date(tmp_path) -> None:
    red, green = np.array([[COLOURS["r"]]], np.uint8), np.array([[COLOURS["g"]]], np.uint8)
    file, scorer = tmp_path / "x.bmp", IdentityScorer(ColourBackend())
    Image.fromarray(red).save(file)
    state = os.stat(file)
    np.testing.assert_allclose(scorer.embed_references([file]), [COLOURS["r"]])
    Image.fromarray(green).save(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(file).st_size == state.st_size
    np.testing.assert_allclose(scorer.embed_references([file]), [COLOURS["g"]])
    Image.fromarray(green).save(tmp_path / "copy.bmp")
    scorer.embed_references([tmp_path / "copy.bmp", str(file)])
    assert scorer.backend.seen == [1, 1]  # type: ignore[attr-defined]


def test_arrays_and_tensors_are_known_by_their_values() -> None:
    torch = torch_module()
    array = np.arange(12.0).reshape(2, 2, 3)
    assert content_key(array) == content_key(array.copy()) == content_key(np.asfortranarray(array))
    assert content_key(array) != content_key(array.reshape(4, 1, 3)) != content_key(array.astype(np.float32))
    assert content_key(array[::-1]) != content_key(array)
    one = torch.arange(12.0).reshape(3, 2, 2)
    assert (
        content_key(one)
        == content_key(one.clone().requires_grad_())
        == content_key(one.permute(0, 2, 1).contiguous().permute(0, 2, 1))
    )
    assert content_key(one) != content_key(one.bfloat16()) == content_key(one.bfloat16())
    assert content_key(one) != content_key(one.numpy())  # their axes mean other things
    assert content_key(one.double() + 1e-12) != content_key(one.double())
    assert reference_key is content_key


def test_what_has_no_content_to_compare_is_never_taken_from_the_cache() -> None:
    """An address is no name: a new object gets the one of an old that is gone."""

    class Handle:
        def __init__(self, value: float) -> None:
            self.value = value

    class Reader(ColourBackend):
        def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
            self.seen.append(len(images))
            values = [float(i.value if isinstance(i, Handle) else i[0]) for i in images]
            return [Faces(np.array([[0.0, 0, 1, 1]]), np.ones(1), np.array([[v, 1.0]])) for v in values]

    scorer = IdentityScorer(Reader())
    for value in range(50):
        assert scorer.embed_references([Handle(value)])[0, 0] == value
        assert scorer.embed_references([of_objects([value, None])])[0, 0] == value  # objects are kept as addresses
    assert scorer._cache == {}
    shared = Handle(3)
    scorer.score([Handle(1)] * 3, [[shared]] * 3)
    assert scorer.backend.seen[-2:] == [1, 3]  # type: ignore[attr-defined]  # within a call it is looked at once


def test_the_same_objects_of_a_group_are_hashed_once(monkeypatch) -> None:
    import id_reward.inputs as inputs

    counted: list[object] = []
    monkeypatch.setattr(inputs, "content_key", lambda p, real=content_key: counted.append(p) or real(p))
    people = [np.zeros((2, 2, 3)), np.ones((2, 2, 3))]
    keys = row_keys([people, list(people), people, [people[0], people[0]]])
    assert len(counted) == 3 and keys[0] == keys[1] == keys[2] and keys[3] == [keys[0][0]] * 2


def test_listed_takes_empty_containers() -> None:
    assert listed([], "x") == listed(np.array([]), "x") == listed(iter(()), "x") == []
    assert listed(np.zeros((0, 4, 4, 3)), "x") == []
