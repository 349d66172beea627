"""Wrong input of every kind, drawn and mutated: right, or refused in one sentence within 10 s and 2 GB; no traceback, no changed file.

``make fuzz`` runs 1,000 of each; FUZZ=50 in the environment is a quick look.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from multicrafter.config import settings as configuration
from multicrafter.config.recipes import Stage1, Stage2, resolve
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.pictures import coverage, lists_of, open_picture
from multicrafter.photos.config import BuildConfig
from multicrafter.photos.notes import match_notes, read_notes
from multicrafter.scoring.manifest import find_cases, read_prompts
from PIL import Image

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("FUZZ", "50"))
SECONDS, BYTES = 10, 2 * 10**9
PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if os.environ.get("FUZZ_SHRINK", "1") == "1" else [])]
fuzz = settings(
    phases=PHASES,
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    derandomize=COUNT < 100,
)


@contextmanager
def bounded():
    """Ten seconds and two gigabytes more than there are now."""

    def late(*_):
        raise AssertionError(f"no answer within {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * float(os.environ.get("FUZZ_SLOWER", "1")))
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def answer(action, folder=None):
    """The result, or None where it was refused as it should be."""
    before = files(folder) if folder else None
    try:
        with bounded():
            return action()
    except ValueError as error:
        text = str(error)
        assert text and len(text) < 2000, text
        assert "Traceback" not in text
        return None
    finally:
        if folder:
            assert files(folder) == before, "a file was changed"


@st.composite
def mutated(draw, content: bytes):
    """A valid file with bytes flipped, cut, doubled, inserted or replaced."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "double", "number"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        else:
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"9999", b"-1  "])
            )
    return bytes(data)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.just("../x"),
    st.just([1, 2, 3, 4]), st.just({"box": [0, 0, 1, 1]}), st.just("9" * 400), st.just(10**30),
)  # fmt: skip


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def bent(draw, value):
    """A JSON value with some of its values replaced, taken out, or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        node = value
        for key in path[:-1]:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
        if kind == "replace" or isinstance(node, list):
            node[path[-1]] = json.loads(json.dumps(draw(ODD)))  # a value of its own, which may be bent next
        elif kind == "drop":
            del node[path[-1]]
        else:
            node[draw(st.text(max_size=6))] = node.pop(path[-1])
    return value


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def encoded(kind):
    pixels = np.random.default_rng(1).integers(0, 255, (12, 10, 3), np.uint8)
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if kind == "TIFF":
        picture = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    if kind == "16":
        picture, kind = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256), "PNG"
    picture.save(buffer, kind)
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "16")}


@fuzz
@given(st.data())
def test_pictures(folder, data):
    kind = data.draw(st.sampled_from(sorted(FILES)))
    (folder / "picture.png").write_bytes(data.draw(mutated(FILES[kind])))
    picture = answer(lambda: open_picture(folder / "picture.png"), folder)
    if picture is not None:
        assert picture.mode == "RGB" and picture.width * picture.height <= 10**8


DTYPES = [np.uint8, np.int32, np.int64, np.float32, np.float64, np.float16, bool, np.complex64, object]


@fuzz
@given(st.data())
def test_arrays_as_pictures_and_masks(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=5)))
    dtype = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(st.sampled_from([0, 1, 255, -3, 1e9, float("nan"), float("inf")]))
    with np.errstate(all="ignore"):
        array = (np.random.default_rng(0).random(shape) * scale).astype(dtype)
    value = torch.from_numpy(np.array(array)) if dtype is not object and data.draw(st.booleans()) else array
    picture = answer(lambda: open_picture(value))
    if picture is not None:
        assert picture.mode == "RGB"
    mask = answer(lambda: coverage(value))
    if mask is not None:
        assert mask.dim() == 2 and bool(((mask >= 0) & (mask <= 1)).all())


REFERENCES = st.recursive(
    st.one_of(ODD, st.just(np.zeros((4, 4, 3), np.uint8)), st.just(torch.zeros(3, 4, 4)), st.just("none.png")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


class Blind:
    """A backend that finds one face in every picture."""

    dim = 4

    def detect_and_embed(self, images):
        from id_reward import Faces

        return [Faces(np.array([[0.0, 0, 2, 2]]), np.ones(1), np.eye(4)[:1]) for _ in images]


@fuzz
@given(st.lists(REFERENCES, max_size=3), st.integers(1, 3))
def test_reward_inputs(references, count):
    rows = answer(lambda: lists_of(references, count, name="references"))
    if rows is not None:
        assert len(rows) == count and all(rows)
        opened = answer(lambda: [[open_picture(p) for p in row] for row in rows])
        if opened is not None:
            from id_reward import IdentityScorer

            scored = answer(lambda: IdentityScorer(Blind()).score([Image.new("RGB", (8, 8))] * count, opened))
            assert scored is None or len(scored) == count


MANIFEST = [
    {
        "key": "a",
        "prompt": "two people",
        "references": ["r.png", {"image": "s.png", "kind": "object", "box": [0, 0, 0.5, 1]}],
        "count": 2,
    },
    {"picture": "b c.png", "prompt": "nobody", "category": "x", "target": "t.png"},
]
XVERSE = [{"index": 0, "prompt": "x", "modulation": [{"src_inputs": [{"image_path": "a/human/1.png"}]}]}]


@fuzz
@given(st.data())
def test_manifests(folder, data):
    content = data.draw(st.sampled_from([MANIFEST, XVERSE]))
    path = folder / "manifest.json"
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(bent(content))))
    else:
        path.write_bytes(data.draw(mutated(json.dumps(content).encode())))
    (folder / "pictures").mkdir(exist_ok=True)
    for name in ("a.png", "b c.png", "0.png"):
        (folder / "pictures" / name).touch()
    read = answer(lambda: read_prompts(path), folder)
    if read is not None:
        answer(lambda: find_cases(read[1], folder / "pictures", format=read[0]), folder)


NOTES = [
    {"file_name": "a.jpg", "consent": "no", "minor": "unknown", "people": [{"box": [1, 2, 3, 4], "consent": "yes"}]},
    {"file_name": "sub/b.jpg", "consent": "yes", "caption": "c"},
]


@fuzz
@given(st.data())
def test_metadata_of_photos(folder, data):
    """A "no" is either obeyed or stops the build, whatever happens to the file around it."""
    root = folder / "photos"
    root.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in NOTES)
    if data.draw(st.booleans()):
        rows = data.draw(bent(NOTES))
        lines = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)
        (root / "metadata.jsonl").write_text(lines)
    else:
        (root / "metadata.jsonl").write_bytes(data.draw(mutated(lines.encode())))
    notes = answer(lambda: read_notes(root), root)
    if notes is not None:
        found = answer(lambda: match_notes(notes, ["a.jpg", "sub/b.jpg"], [], root=root), root)
        if found is not None:
            refusing = sum(n.refuses for n in notes.values())
            assert sum(n.refuses for n in found[0].values()) >= refusing


@pytest.fixture(scope="module")
def adapter(folder):
    """A transformer, and the files of an adapter that fits it."""
    from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline

    pipe = build_pipeline(
        TinyFluxConfig(num_heads=2, head_dim=16, num_double=1, num_single=1, vae_channels=(8, 8, 8), text_width=16)
    )
    adapters = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2))
    path = adapters.save(folder / "adapter", num_references=2, size=64, sampling={"num_steps": 4, "guidance": 2.0})
    adapters.detach()
    return pipe.transformer, {p.name: p.read_bytes() for p in path.iterdir()}


@fuzz
@given(st.data())
def test_adapters(adapter, folder, data):
    transformer, content = adapter
    path = folder / "adapter"
    for name, value in content.items():
        (path / name).write_bytes(value)
    if data.draw(st.booleans()):
        meta = data.draw(bent(json.loads(content["adapter.json"])))
        (path / "adapter.json").write_text(json.dumps(meta))
    else:
        name = data.draw(st.sampled_from(sorted(content)))
        (path / name).write_bytes(data.draw(mutated(content[name])))
    names = [n for n, _ in transformer.named_parameters()]
    loaded = answer(lambda: Adapters.load(transformer, path), path)
    if loaded is not None:
        assert all(bool(torch.isfinite(p).all()) for p in loaded[0].parameters())
        loaded[0].detach()
    assert [n for n, _ in transformer.named_parameters()] == names, "the transformer was changed"


@fuzz
@given(st.data())
def test_configurations(folder, data):
    run = data.draw(st.sampled_from([Stage1(), Stage2()]))
    path = folder / "run.yaml"
    content = configuration.to_dict(run)
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(bent(content))))
    else:
        path.write_bytes(data.draw(mutated(configuration.as_yaml(content).encode())))
    read = answer(lambda: resolve(config=path), folder)
    if read is not None:
        again = configuration.to_dict(read)
        assert configuration.from_dict(type(read), again) == read
        assert "nan" not in json.dumps(again).lower() and "Infinity" not in json.dumps(again)


@fuzz
@given(st.data())
def test_configurations_of_builds(data):
    content = data.draw(bent(configuration.to_dict(BuildConfig())))
    read = answer(lambda: configuration.from_dict(BuildConfig, content))
    assert read is None or isinstance(read, BuildConfig)


@fuzz
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["lr", "pretrain.lr", "rank", "world.size", "idar.coef", "x", ""]), st.text(max_size=8)
        ),
        max_size=3,
    )
)
def test_changes_of_the_command_line(changes):
    answer(lambda: configuration.override(Stage1(), [f"{name}={value}" for name, value in changes]))
