"""Scoring a group of pictures against references, beside what one would write by hand.

    python packages/id_reward/scripts/fetch_photos.py
    python packages/id_reward/benchmarks/bench_id_reward_scoring.py --out benchmarks/results/id_reward-scoring.json

Every figure is a ratio within one run, the two sides taking turns; median and extremes over the rounds.

* dlib: 12 photos (768 px) and 3 references, all real. By hand: detector, landmarks and descriptor face by face, picture by picture, at the same
  resolution, the references once for the group ("by hand"), or once for every picture ("by hand, references each time").
* insightface: `FaceAnalysis` as it comes (five models), picture by picture, against our backend. The published weights cannot be had offline, so
  a pack with the same five models, inputs and outputs stands in, random networks of about the published cost: detector 13 GMAC at 640, ArcFace
  6.3 GMAC, 3-D landmarks 3 GMAC, the other two small.
* bookkeeping: everything of ours that is neither detection nor embedding, as a share of the whole.
* matching: `match` on 4x4 matrices, one core. Import: a fresh interpreter, against numpy alone, and what it no longer loads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parents[1]
SIZE = 768


def cpu_seconds() -> float:
    """Of this process and its finished children: what a busy neighbour does not change much."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def turns(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each side, round by round; one round before that to warm up. The clock is `CLOCK` unless given."""
    clock = clock or CLOCK
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return seconds


CLOCK: Callable[[], float] = time.perf_counter


def ratios(seconds: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """How many times longer every other side takes, round by round."""
    return {
        name: spread([a / b for a, b in zip(values, seconds[ours])]) for name, values in seconds.items() if name != ours
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def group(photos: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """12 pictures and 3 references."""
    from id_reward.images import open_image
    from PIL import ImageOps

    def read(name: str) -> Any:
        picture = open_image(photos / name)
        picture.thumbnail((SIZE, SIZE))
        return picture

    samples = [read(f"face-api/sample{i}.jpg") for i in range(1, 7)]
    pictures = [np.asarray(p) for p in (*samples, *map(ImageOps.mirror, samples))]
    return pictures, [np.asarray(read(f"face-recognition/{n}.jpg")) for n in ("obama", "obama2", "biden")]


def bench_dlib(photos: Path, rounds: int) -> dict[str, Any]:
    import dlib
    from id_reward import IdentityScorer, get_face_backend
    from id_reward.backends.faces.dlib_faces import model_folder

    pictures, references = group(photos)
    detector, folder = dlib.get_frontal_face_detector(), model_folder()
    landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
    network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))

    def by_hand(picture: np.ndarray) -> list[np.ndarray]:
        scale = 1024 / max(picture.shape)
        large = dlib.resize_image(picture, rows=round(picture.shape[0] * scale), cols=round(picture.shape[1] * scale))
        boxes, _, _ = detector.run(large, 0, 0.3)
        return [np.array(network.compute_face_descriptor(large, landmarks(large, box))) for box in boxes]

    backends = {name: get_face_backend("dlib", embedder=name) for name in ("torch", "dlib")}

    def ours(name: str) -> None:
        IdentityScorer(backends[name])(pictures, [""] * 12, [references] * 12)  # an empty cache every time

    seconds = turns(
        {
            "by hand": lambda: [by_hand(p) for p in (*pictures, *references)],
            "by hand, references each time": lambda: [by_hand(q) for p in pictures for q in (p, *references)],
            "ours, embedder dlib": lambda: ours("dlib"),
            "ours": lambda: ours("torch"),
        },
        rounds,
    )
    return {"seconds": {k: spread(v) for k, v in seconds.items()}, "times faster than": ratios(seconds, "ours")} | {
        "bookkeeping": bookkeeping(backends["torch"], pictures, references, statistics.median(seconds["ours"]), rounds)
    }


def bookkeeping(backend: Any, pictures: list, references: list, whole: float, rounds: int) -> dict[str, Any]:
    """The scorer with a backend that has looked before: matching, hashing, lists."""
    from id_reward import IdentityScorer

    known = dict(zip(map(id, (*pictures, *references)), backend.detect_and_embed([*pictures, *references])))

    class Seen:
        def detect_and_embed(self, images: list) -> list:
            return [known[id(image)] for image in images]

    seconds = turns({"x": lambda: IdentityScorer(Seen())(pictures, [""] * 12, [references] * 12)}, 5 * rounds)["x"]
    return {"seconds": spread(seconds), "share of the whole": spread([s / whole for s in seconds])}


def realistic_pack(folder: Path) -> Path:
    """Five models of about buffalo_l's cost; see the module's docstring."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    spec = importlib.util.spec_from_file_location("tiny_onnx", PACKAGE / "tests" / "tiny_onnx.py")
    assert spec and spec.loader
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.pack(folder)
    rng = np.random.default_rng(0)

    def deepen(name: str, layers: int, stride: int) -> None:
        """Runs 3x3 convolutions of 64 channels beside the small network and adds nothing of theirs to its first output."""
        model = onnx.load(folder / name)
        graph, source, last = model.graph, model.graph.input[0].name, "deep_0"

        def constant(label: str, value: np.ndarray) -> str:
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), label))
            return label

        stem = constant("deep_stem", rng.normal(size=(64, 3, stride, stride)) / stride)
        nodes = [helper.make_node("Conv", [source, stem], [last], kernel_shape=[stride] * 2, strides=[stride] * 2)]
        for layer in range(layers):
            weight = constant(f"deep_w{layer}", rng.normal(size=(64, 64, 3, 3)) * np.sqrt(2 / 576))
            nodes.append(
                helper.make_node("Conv", [last, weight], [f"deep_c{layer}"], kernel_shape=[3, 3], pads=[1] * 4)
            )
            nodes.append(helper.make_node("Relu", [f"deep_c{layer}"], [f"deep_{layer + 1}"]))
            last = f"deep_{layer + 1}"
        nodes.append(helper.make_node("ReduceMean", [last], ["deep_mean"], axes=[0, 1, 2, 3], keepdims=0))
        nodes.append(helper.make_node("Mul", ["deep_mean", constant("deep_zero", np.array(0.0))], ["deep_nothing"]))
        first = graph.output[0].name
        for node in graph.node:
            for at, output in enumerate(node.output):
                if output == first:
                    node.output[at] = "shallow"
        nodes.append(helper.make_node("Add", ["shallow", "deep_nothing"], [first]))
        graph.node.extend(nodes)
        onnx.checker.check_model(model)
        onnx.save(model, folder / name)

    assert TensorProto.FLOAT
    deepen("det_10g.onnx", 56, 8)  # 80 x 80 cells: .236 GMAC a layer
    deepen("w600k_r50.onnx", 54, 2)  # 56 x 56: .116
    deepen("1k3d68.onnx", 36, 4)  # 48 x 48: .085
    return folder


def bench_insightface(rounds: int) -> dict[str, Any]:
    from id_reward import IdentityScorer, get_face_backend
    from insightface.app import FaceAnalysis

    with tempfile.TemporaryDirectory() as folder:
        pack = realistic_pack(Path(folder) / "pack")
        spec = importlib.util.spec_from_file_location("tiny_onnx", PACKAGE / "tests" / "tiny_onnx.py")
        assert spec and spec.loader
        tiny = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tiny)
        pictures = [tiny.picture((168, 168), (408, 328), (248, 520), seed=i) for i in range(12)]
        references = [tiny.picture((328, 328), seed=100 + i) for i in range(3)]
        application = FaceAnalysis(name=str(pack))
        application.prepare(0)
        backend = get_face_backend("insightface", model=pack)

        def default(image: np.ndarray) -> list:
            return application.get(np.ascontiguousarray(image[..., ::-1]))

        assert len(default(pictures[0])) == len(backend.detect_and_embed(pictures[:1])[0].boxes) == 3
        seconds = turns(
            {
                "FaceAnalysis": lambda: [default(p) for p in (*pictures, *references)],
                "FaceAnalysis, references each time": lambda: [default(q) for p in pictures for q in (p, *references)],
                "ours": lambda: IdentityScorer(backend)(pictures, [""] * 12, [references] * 12),
            },
            rounds,
        )
    return {"seconds": {k: spread(v) for k, v in seconds.items()}, "times faster than": ratios(seconds, "ours")}


def bench_matching(rounds: int) -> dict[str, Any]:
    from id_reward import match, score_similarity

    matrices = list(np.random.default_rng(0).uniform(-1, 1, (5000, 4, 4)))
    seconds = turns(
        {
            "match": lambda: [match(m) for m in matrices],
            "score_similarity": lambda: [score_similarity(m) for m in matrices],
        },
        rounds,
    )
    return {name: spread([len(matrices) / s for s in values]) for name, values in seconds.items()} | {
        "unit": "per second"
    }


def bench_import(rounds: int) -> dict[str, Any]:
    def fresh(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    seconds = turns(
        {
            "python": fresh("pass"),
            "numpy": fresh("import numpy"),
            "id_reward": fresh("import id_reward"),
            "numpy and scipy.optimize": fresh("import numpy, scipy.optimize"),
            "numpy and jaxtyping": fresh("import numpy, jaxtyping"),
        },
        rounds,
    )
    bare = statistics.median(seconds["python"])
    return {name: spread([s - bare for s in values]) for name, values in seconds.items() if name != "python"} | {
        "unit": "seconds beyond a bare interpreter"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help="dlib, insightface, matching, import; default: all")
    parser.add_argument("--photos", type=Path, default=ROOT / ".photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds instead of wall clock, for a busy machine")
    arguments = parser.parse_args()
    if arguments.cpu:
        global CLOCK
        CLOCK = cpu_seconds
    warnings.simplefilter("ignore")
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "matching": lambda: bench_matching(arguments.rounds),
        "import": lambda: bench_import(arguments.rounds),
        "dlib": lambda: bench_dlib(arguments.photos, arguments.rounds),
        "insightface": lambda: bench_insightface(arguments.rounds),
    }
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"parts: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    content: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        content = json.loads(arguments.out.read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    names = ("numpy", "scipy", "torch", "dlib-bin", "insightface", "onnxruntime")
    for part in arguments.parts or known:
        content[part] = known[part]() | {
            "circumstances": {
                "commit": commit,
                "clock": "CPU seconds, on a busy machine" if arguments.cpu else "wall clock",
                "load": os.getloadavg()[0],
                "device": f"cpu, {os.cpu_count()} cores, {platform.processor() or platform.machine()}",
                "python": platform.python_version(),
                "versions": {name: importlib.metadata.version(name) for name in names},
                "command": " ".join(["bench_id_reward_scoring.py", *sys.argv[1:]]),
            }
        }
        print(json.dumps({part: content[part]}, indent=1), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = arguments.out.with_suffix(".tmp")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
