"""dlib's face network as arrays, from either of two packages that carry it.

The network (``dlib_face_recognition_resnet_model_v1``) is 29 convolutions, each followed by a scale and shift of its channels, and
one linear layer. `face-recognition-models` (PyPI, CC0) has dlib's own file in fp32; `@vladmandic/face-api` (npm, MIT) has it quantised to
8 bits, a quarter of the size.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from id_reward.errors import InputError
from id_reward.shapes import Float

EXTRA = 'the dlib backend needs dlib and its models: pip install "id-reward[dlib]"'
BLOCKS = (
    *("conv32_1", "conv32_2", "conv32_3"),
    *("conv64_down", "conv64_1", "conv64_2", "conv64_3"),
    *("conv128_down", "conv128_1", "conv128_2"),
    *("conv256_down", "conv256_1", "conv256_2", "conv256_down_out"),
)
CONVOLUTIONS = ("conv32_down", *(f"{block}/conv{i}" for block in BLOCKS for i in (1, 2)))


def model_folder() -> Path:
    """Where ``face-recognition-models`` keeps its files; found without importing it (its import needs pkg_resources)."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(EXTRA)
    return Path(spec.submodule_search_locations[0]) / "models"


class Convolution(NamedTuple):
    """filters (o, i, h, w), bias (o,), then ``scale * x + shift`` by channel."""

    filters: Float[np.ndarray, "o i h w"]
    bias: Float[np.ndarray, " o"]
    scale: Float[np.ndarray, " o"]
    shift: Float[np.ndarray, " o"]


class Weights(NamedTuple):
    """All convolutions in the order of `CONVOLUTIONS`, and the linear layer (256, 128)."""

    convolutions: tuple[Convolution, ...]
    linear: Float[np.ndarray, "i o"]


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """An integer as dlib writes it: a byte that says how many bytes follow (its top bit is the sign), then these, lowest first."""
    size, negative = data[at] & 0x0F, data[at] & 0x80
    value = int.from_bytes(data[at + 1 : at + 1 + size], "little")
    return (-value if negative else value), at + 1 + size


def _tensor(data: bytes, at: int) -> np.ndarray:
    """A tensor: version 2, four sizes, then little-endian floats."""
    version, at = _integer(data, at)
    if version != 2:
        raise InputError(f"a dlib tensor must be of version 2, got {version}")
    count = 1
    for _ in range(4):
        size, at = _integer(data, at)
        count *= size
    if not 0 < count * 4 <= len(data) - at:
        raise InputError(f"a dlib tensor must fit into its file, got {count} numbers with {len(data) - at} bytes left")
    return np.frombuffer(data, "<f4", count, at)


def read_dlib(path: str | Path) -> Weights:
    """Reads dlib's own file; nothing of it is executed.

    Raises:
        ValueError: It is not that network's file.
    """
    data = Path(path).read_bytes()
    try:
        convolutions = [_tensor(data, m.end()) for m in re.finditer(rb"con_4(?=\x01\x02)", data)]
        affine = [_tensor(data, m.end()) for m in re.finditer(rb"affine_(?=\x01\x02)", data)]
        if len(convolutions) != len(CONVOLUTIONS) or len(affine) != len(CONVOLUTIONS):
            raise InputError(f"it must have {len(CONVOLUTIONS)} convolutions, got {len(convolutions)}")
        (linear,) = (
            t for m in re.finditer(rb"fc_2(?=\x01)", data) for t in [_fc_tensor(data, m.end())] if t.size == 256 * 128
        )
        result, channels = [], 3
        for name, both, scale_shift in zip(CONVOLUTIONS, convolutions, affine, strict=True):
            out, side = len(scale_shift) // 2, 7 if name == "conv32_down" else 3
            filters = both[:-out].reshape(out, channels, side, side)
            result.append(Convolution(filters, both[-out:], scale_shift[:out], scale_shift[out:]))
            channels = out
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} must be dlib_face_recognition_resnet_model_v1.dat: {error}") from None
    return Weights(tuple(result), linear.reshape(256, 128))


def _fc_tensor(data: bytes, at: int) -> np.ndarray:
    """The linear layer states its sizes (outputs, inputs) before its tensor."""
    for _ in range(2):
        _, at = _integer(data, at)
    return _tensor(data, at)


def read_face_api(folder: str | Path) -> Weights:
    """Reads ``face_recognition_model.bin`` and its manifest: ``value = uint8 * scale + min``; filters are (h, w, i, o) there.

    Raises:
        ValueError: The files are missing or do not hold the network.
    """
    folder = Path(folder)
    try:
        groups = json.loads((folder / "face_recognition_model-weights_manifest.json").read_text())
        tensors: dict[str, np.ndarray] = {}
        for group in groups:
            data, at = b"".join((folder / Path(name).name).read_bytes() for name in group["paths"]), 0
            for entry in group["weights"]:
                rule, count = entry.get("quantization"), int(np.prod(entry["shape"]))
                kind = np.dtype(rule["dtype"] if rule else entry["dtype"]).newbyteorder("<")
                values = np.frombuffer(data, kind, count, at).astype(np.float64)
                at += count * kind.itemsize
                values = values * rule["scale"] + rule["min"] if rule else values
                tensors[entry["name"]] = values.astype(np.float32).reshape(entry["shape"])
        result = [
            Convolution(
                tensors[f"{name}/conv/filters"].transpose(3, 2, 0, 1),
                tensors[f"{name}/conv/bias"],
                tensors[f"{name}/scale/weights"],
                tensors[f"{name}/scale/biases"],
            )
            for name in CONVOLUTIONS
        ]
        return Weights(tuple(result), tensors["fc"])
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} must hold face_recognition_model.bin and its -weights_manifest.json (npm pack @vladmandic/face-api@1.7.15, "
            f"folder model/), but {Path(error.filename).name} is missing"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder} must hold the face_recognition_model of @vladmandic/face-api, got: {error}"
        ) from None
