"""The example's model in PyTorch, as someone has it: a class of their own, trained, and saved.

Not part of skd_jax and no dependency of it: used if ``pip install torch`` was done.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2, for images of one channel."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage in range(3):
            inputs, outputs = width * 2 ** max(0, stage - 1), width * 2**stage
            first = Block(inputs, outputs, 2 if stage else 1)
            others = [Block(outputs, outputs, 1) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *others))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _normalised(images: np.ndarray, mean: float, std: float) -> Tensor:
    return (torch.from_numpy(images[:, None].astype(np.float32) / 255) - mean) / std


def train(
    images: np.ndarray,
    labels: np.ndarray,
    path: Path,
    *,
    depth: int,
    width: int,
    mean: float,
    std: float,
    epochs: int,
) -> None:
    """Trains on uint8 images [n, side, side] with labels [n], and saves the state dict."""
    torch.manual_seed(0)
    model = ResNet(depth, width, int(labels.max()) + 1)
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [epochs // 2, 3 * epochs // 4])
    inputs, targets = _normalised(images, mean, std), torch.from_numpy(labels.astype(np.int64))
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimiser.step()
        schedule.step()
    save_file(model.state_dict(), path)


def classify(
    path: Path, images: np.ndarray, *, depth: int, width: int, classes: int, mean: float, std: float
) -> Sequence[int]:
    """Loads a state dict into the class above with more outputs, strictly, and classifies."""
    model = ResNet(depth, width, classes)
    model.load_state_dict(load_file(path), strict=True)
    model.eval()
    with torch.no_grad():
        return model(_normalised(images, mean, std)).argmax(1).tolist()
