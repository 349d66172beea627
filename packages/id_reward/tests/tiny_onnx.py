"""Tiny insightface packs in the real format, whose detector finds bright squares. Needs onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

POINTS = np.array([[-0.3, -0.2], [0.3, -0.2], [0.0, 0.1], [-0.2, 0.4], [0.2, 0.4]])  # eyes, nose, mouth


def save(path: Path, nodes, inputs, outputs, weights) -> None:
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        [numpy_helper.from_array(np.asarray(w, w.dtype), n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def detector(path: Path, *, radius: float = 1.5, points: bool = True) -> None:
    """SCRFD's format: strides 8, 16, 32, two anchors; scores, boxes and five points as (n, 1), (n, 4), (n, 10).

    The score of a cell is high where the whole cell is white (2 anchors alike; the duplicates fall to NMS).
    """
    nodes, outputs, weights = [], [], {}
    kinds = [("score", 1), ("bbox", 4)] + ([("kps", 10)] if points else [])
    for kind, width in kinds:
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            kernel = np.zeros((2 * width, 3, stride, stride), np.float32)
            bias = np.zeros(2 * width, np.float32)
            if kind == "score":
                kernel[:] = 40.0 / (3 * stride * stride)
                bias[:] = -38.0 if stride == 16 else -60.0  # only stride 16 ever finds anything
            elif kind == "bbox":
                bias[:] = radius
            else:
                bias[:] = np.tile((POINTS * radius).ravel(), 2)
            weights |= {f"{name}_w": kernel, f"{name}_b": bias, f"{name}_s": np.array([-1, width], np.int64)}
            nodes += [
                helper.make_node(
                    "Conv",
                    ["input", f"{name}_w", f"{name}_b"],
                    [f"{name}_c"],
                    kernel_shape=[stride] * 2,
                    strides=[stride] * 2,
                ),
                helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}_t", f"{name}_s"], [f"{name}_r"]),
                helper.make_node("Sigmoid" if kind == "score" else "Identity", [f"{name}_r"], [name]),
            ]
            outputs.append((name, [None, width]))
    save(path, nodes, [("input", [1, 3, "height", "width"])], outputs, weights)


def network(path: Path, *, side: int, dim: int, batch: object = "batch", seed: int = 0) -> None:
    """A random network (b, 3, side, side) -> (b, dim), as recognition (112), landmarks (192) and attributes (96) are."""
    rng, cell = np.random.default_rng(seed), side // 4
    weights = {
        "w": rng.normal(size=(8, 3, cell, cell)).astype(np.float32) / cell,
        "g": rng.normal(size=(8 * 16, dim)).astype(np.float32),
        "s": np.array([-1, 8 * 16], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["data", "w"], ["c"], kernel_shape=[cell] * 2, strides=[cell] * 2),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "s"], ["f"]),
        helper.make_node("MatMul", ["f", "g"], ["features"]),
    ]
    save(path, nodes, [("data", [batch, 3, side, side])], [("features", [batch, dim])], weights)


def pack(folder: Path, *, batch: object = "batch", points: bool = True) -> Path:
    """All five models of a pack like buffalo_l."""
    folder.mkdir(parents=True, exist_ok=True)
    detector(folder / "det_10g.onnx", points=points)
    network(folder / "w600k_r50.onnx", side=112, dim=512, batch=batch)
    network(folder / "1k3d68.onnx", side=192, dim=3309, seed=1)
    network(folder / "2d106det.onnx", side=192, dim=212, seed=2)
    network(folder / "genderage.onnx", side=96, dim=3, seed=3)
    return folder


def picture(*centres: tuple[int, int], size: tuple[int, int] = (640, 640), seed: int = 0) -> np.ndarray:
    """Dark noise with a white square of 16 pixels around each centre; put it on a cell (8 + 16 n) and one face is found there."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 120, (size[1], size[0], 3)).astype(np.uint8)
    for x, y in centres:
        image[y - 8 : y + 8, x - 8 : x + 8] = 255
    return image
