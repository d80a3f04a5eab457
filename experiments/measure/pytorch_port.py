"""The same networks and steps in PyTorch, written as its users would: what we are measured against.

Not part of skd_jax and no dependency of it: ``pip install torch`` for the benchmark alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Seen = list[Tensor] | None  # Eq. 7's distances, one a BN layer, where they are asked for


class Norm(nn.BatchNorm2d):
    """Batch normalisation that can hand out how far the batch is from the running moments."""

    def forward(self, input: Tensor, seen: Seen = None) -> Tensor:
        if seen is not None:
            assert self.running_mean is not None and self.running_var is not None
            var, mean = torch.var_mean(input.float(), (0, 2, 3), correction=0)
            distance = torch.linalg.norm(mean - self.running_mean)
            seen.append(distance + torch.linalg.norm(var - self.running_var))
        return super().forward(input)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = Norm(outputs)
        self.changes = stride != 1 or inputs != outputs
        if self.changes:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.bn_shortcut = Norm(outputs)

    def forward(self, x: Tensor, seen: Seen) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x), seen))
        y = self.bn2(self.conv2(y), seen)
        if self.changes:
            x = self.bn_shortcut(self.conv_shortcut(x), seen)
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR ResNet of depth 6n + 2: images to (features, logits)."""

    def __init__(self, depth: int, num_classes: int, width: int = 16):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn_stem = Norm(width)
        self.blocks = nn.ModuleList()
        inputs = width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                outputs = width * 2**stage
                self.blocks.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor, seen: Seen = None) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn_stem(self.conv_stem(x), seen))
        for block in self.blocks:
            x = block(x, seen)
        features = x.mean((2, 3))
        return features, self.head(features)


class Delegator(nn.Module):
    """Table IV, for 32x32 images."""

    def __init__(self, z_dim: int = 256):
        super().__init__()
        self.fc = nn.Linear(z_dim, 128 * 8 * 8)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(128),
            *(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, padding=1)),
            *(nn.BatchNorm2d(128), nn.LeakyReLU(0.2)),
            *(nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, padding=1)),
            *(nn.BatchNorm2d(64), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(64, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False)),
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self.fc(z).view(-1, 128, 8, 8).contiguous(memory_format=torch.channels_last)
        return self.layers(x)


def discrepancy(teacher: Tensor, student: Tensor) -> Tensor:
    """Eq. 1."""
    return (1 - F.cosine_similarity(teacher.float(), student.float())).mean()


class Steps:
    """A round of stage one and a CIL step, at one size on one device."""

    def __init__(
        self, *, device: str, compiled: bool, bfloat16: bool, depth: int, old: int, new: int
    ):
        torch.manual_seed(0)

        def place(network: nn.Module) -> nn.Module:
            return network.to(device).to(memory_format=torch.channels_last)

        def sgd(network: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

        self.device = device
        self.teacher = place(ResNet(depth, old)).eval().requires_grad_(False)
        self.student = place(ResNet(depth, old)).train()
        self.learner = place(ResNet(depth, old + new)).train()
        self.delegator = place(Delegator()).train()
        self.frozen = place(Delegator()).eval().requires_grad_(False)
        self.student_sgd, self.learner_sgd = sgd(self.student), sgd(self.learner)
        self.adam = torch.optim.Adam(self.delegator.parameters(), 1e-3)
        kind = torch.device(device).type
        self.autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bfloat16)
        wrap = torch.compile if compiled else lambda f: f
        self.imitation, self.exploration = wrap(self._imitation), wrap(self._exploration)
        self.cil_loss = wrap(self._cil_loss)

    def _imitation(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            images = self.delegator(z)
            target, _ = self.teacher(images)
        return discrepancy(target, self.student(images)[0])

    def _exploration(self, z: Tensor) -> Tensor:
        seen: list[Tensor] = []
        images = self.delegator(z)
        features, logits = self.teacher(images, seen)
        logits = logits.float()
        w = logits.softmax(1).mean(0)
        loss = F.cross_entropy(logits, logits.argmax(1)) + (w * w.log()).sum()
        return loss + torch.stack(seen).sum() - discrepancy(features, self.student(images)[0])

    def _cil_loss(self, z: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            images = torch.cat([self.frozen(z), images])
            target, logits = self.teacher(images)
            labels = torch.cat([logits[: len(z)].argmax(1), labels])
        features, logits = self.learner(images)
        return 0.1 * F.cross_entropy(logits.float(), labels) + discrepancy(target, features)

    def _latent(self, batch: int) -> Tensor:
        return torch.randn(batch, 256, device=self.device)

    def round(self, batch: int) -> Tensor:
        """Five imitate steps and one explore step."""
        for _ in range(5):
            with self.autocast():
                loss = self.imitation(self._latent(batch))
            self.student_sgd.zero_grad()
            loss.backward()
            self.student_sgd.step()
        with self.autocast():
            loss = self.exploration(self._latent(batch))
        self.student_sgd.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        self.student_sgd.step()
        self.adam.step()
        return loss.detach()

    def cil(self, images: Tensor, labels: Tensor) -> Tensor:
        """One CIL step on new images [B, 3, 32, 32] and as many pseudo images."""
        with self.autocast():
            loss = self.cil_loss(self._latent(len(images)), images, labels)
        self.learner_sgd.zero_grad()
        loss.backward()
        self.learner_sgd.step()
        return loss.detach()
