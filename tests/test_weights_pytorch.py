"""State dicts of PyTorch's own networks: the same logits here, and a file that goes back strictly.

The modules are small ones of the public codes' layout: tensor names, shortcuts, last ReLU, heads.
"""

import jax
import numpy as np
import pytest

from skd_jax import steps, weights
from skd_jax.errors import UserError
from skd_jax.models import grow_head

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

try:
    import torchvision
except (ImportError, RuntimeError):  # the latter of a build for another torch
    torchvision = None

pytestmark = pytest.mark.slow


class CosineLinear(nn.Module):
    """LUCIR's; without a sigma as a part of SplitCosineLinear."""

    def __init__(self, inputs: int, outputs: int, sigma: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.sigma = nn.Parameter(torch.ones(1)) if sigma else None

    def forward(self, x):
        out = F.linear(F.normalize(x, p=2, dim=1), F.normalize(self.weight, p=2, dim=1))
        return out if self.sigma is None else self.sigma * out


class SplitCosineLinear(nn.Module):
    def __init__(self, inputs: int, old: int, new: int):
        super().__init__()
        self.fc1, self.fc2 = (CosineLinear(inputs, n, sigma=False) for n in (old, new))
        self.sigma = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.sigma * torch.cat([self.fc1(x), self.fc2(x)], dim=1)


def linear(inputs: int, classes: int) -> nn.Module:
    return nn.Linear(inputs, classes)


def cosine(inputs: int, classes: int) -> nn.Module:
    return CosineLinear(inputs, classes)


def split_cosine(inputs: int, classes: int) -> nn.Module:
    """Of 7 classes 3 are new; of 10, as many as are new to a file of 7."""
    return SplitCosineLinear(inputs, {7: 4, 10: 7}[classes], 3)


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def conv_and_norm(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class OptionA(nn.Module):
    """akamaster's shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.planes = outputs

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4))


class DownsampleA(nn.Module):
    """PyCIL's shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.avg = nn.AvgPool2d(kernel_size=1, stride=stride)

    def forward(self, x):
        x = self.avg(x)
        return torch.cat((x, x.mul(0)), 1)


class DownsampleB(nn.Module):
    """The shortcut of PyCIL's networks with cosine heads."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, planes, stride, shortcut, last):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample, self.last = shortcut, last

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return out if self.last else F.relu(out)


class ShortcutBlock(BasicBlock):
    """akamaster's, whose shortcut always exists, be it empty."""

    def __init__(self, inputs, planes, stride, shortcut, last):
        super().__init__(inputs, planes, stride, None, last)
        self.shortcut = shortcut or nn.Sequential()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PyCILBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, planes, stride, shortcut, last):
        super().__init__()
        self.conv_a, self.bn_a = conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv_b, self.bn_b = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample, self.last = shortcut, last

    def forward(self, x):
        out = F.relu(self.bn_a(self.conv_a(x)), inplace=True)
        out = self.bn_b(self.conv_b(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return out if self.last else F.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs, planes, stride, shortcut, last):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample, self.last = shortcut, last

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return out if self.last else F.relu(out)


class Stages(nn.Module):
    """What the families share: stages of blocks, and the mean over pixels."""

    def stages(self, name, block, blocks, width, shortcut, without_last_relu=False):
        """Adds the stages, calls them, and gives the number of features."""
        self.names, inputs = [f"{name}{s + 1}" for s in range(len(blocks))], width
        for s, count in enumerate(blocks):
            planes, layers = width * 2**s, []
            for b in range(count):
                stride = 2 if s and not b else 1
                outputs = planes * block.expansion
                changes = stride > 1 or inputs != outputs
                last = without_last_relu and (s, b) == (len(blocks) - 1, count - 1)
                between = shortcut(inputs, outputs, stride) if changes else None
                layers.append(block(inputs, planes, stride, between, last))
                inputs = outputs
            setattr(self, self.names[s], nn.Sequential(*layers))
        return inputs

    def features(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class CifarResNet(Stages):
    """chenyaofo's, and LUCIR's with a cosine head and no last ReLU."""

    def __init__(self, classes, channels=3, blocks=(1, 1, 1), width=4, head=linear, relu=True):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3), nn.BatchNorm2d(width)
        inputs = self.stages("layer", BasicBlock, blocks, width, conv_and_norm, not relu)
        self.fc = head(inputs, classes)

    def forward(self, x):
        return self.fc(self.features(F.relu(self.bn1(self.conv1(x)))))


class Akamaster(Stages):
    def __init__(self, classes, channels=3, blocks=(1, 1, 1), width=4, option=OptionA):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3), nn.BatchNorm2d(width)
        self.linear = nn.Linear(self.stages("layer", ShortcutBlock, blocks, width, option), classes)

    def forward(self, x):
        return self.linear(self.features(F.relu(self.bn1(self.conv1(x)))))


class PyCILConvnet(Stages):
    def __init__(self, channels, blocks, width, shortcut, relu, fc):
        super().__init__()
        self.conv_1_3x3, self.bn_1 = conv(channels, width, 3), nn.BatchNorm2d(width)
        self.out_dim = self.stages("stage_", PyCILBlock, blocks, width, shortcut, not relu)
        if fc:
            self.fc = nn.Linear(self.out_dim, 10)

    def forward(self, x):
        return self.features(F.relu(self.bn_1(self.conv_1_3x3(x))))


class PyCIL(nn.Module):
    def __init__(self, classes, channels=3, blocks=(1, 1, 1), width=4, head=linear):
        super().__init__()
        plain = head is linear
        shortcut = DownsampleA if plain else DownsampleB
        self.convnet = PyCILConvnet(channels, blocks, width, shortcut, plain, plain)
        self.fc = head(self.convnet.out_dim, classes)

    def forward(self, x):
        return self.fc(self.convnet(x))


class ImageNetResNet(Stages):
    """torchvision's, and LUCIR's with a cosine head and no last ReLU."""

    def __init__(
        self, classes, channels=3, blocks=(1,) * 4, width=4, block=BasicBlock, head=linear
    ):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 7, 2), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = self.stages("layer", block, blocks, width, conv_and_norm, head is not linear)
        self.fc = head(inputs, classes)

    def forward(self, x):
        return self.fc(self.features(self.maxpool(F.relu(self.bn1(self.conv1(x))))))


class PyCILImageNet(nn.Module):
    """Its stem is one nn.Sequential, and its body ends in a layer that is never called."""

    def __init__(self, classes):
        super().__init__()
        body = ImageNetResNet(13)
        stem = (body.conv1, body.bn1, nn.ReLU(inplace=True), body.maxpool)
        body.conv1 = nn.Sequential(*stem)
        del body.bn1
        self.convnet, self.fc = body, nn.Linear(body.fc.in_features, classes)

    def forward(self, x):
        return self.fc(self.convnet.features(self.convnet.conv1(x)))


class Wrapped(nn.Module):
    """As nn.DataParallel has it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class InTwo(nn.Module):
    """Body and head under prefixes of their own."""

    def __init__(self, classes):
        super().__init__()
        body = CifarResNet(classes)
        self.net, self.classifier = body, nn.Sequential(nn.Dropout(), body.fc)
        body.fc = nn.Identity()

    def forward(self, x):
        return self.classifier(self.net(x))


FAMILIES = {
    "chenyaofo": CifarResNet,
    "chenyaofo, deeper, grey": lambda k: CifarResNet(k, 1, (3, 3, 3), 6),
    "lucir": lambda k: CifarResNet(k, blocks=(2, 2, 2), head=cosine, relu=False),
    "lucir, later": lambda k: CifarResNet(k, head=split_cosine, relu=False),
    "lucir, imagenet": lambda k: ImageNetResNet(k, head=cosine),
    "akamaster A": Akamaster,
    "akamaster B": lambda k: Akamaster(k, 1, (2, 2, 2), option=conv_and_norm),
    "akamaster A, wrapped": lambda k: Wrapped(Akamaster(k, blocks=(2, 2, 2))),
    "pycil": PyCIL,
    "pycil, grey, wrapped": lambda k: Wrapped(PyCIL(k, 1, (3, 3, 3))),
    "pycil, cosine": lambda k: PyCIL(k, head=cosine),
    "pycil, cosine, later": lambda k: PyCIL(k, head=split_cosine),
    "pycil, imagenet": PyCILImageNet,
    "in two": InTwo,
    "resnet10": ImageNetResNet,
    "resnet18": lambda k: ImageNetResNet(k, 1, (2, 2, 2, 2)),
    "resnet34": lambda k: ImageNetResNet(k, blocks=(3, 4, 6, 3)),
    "resnet50": lambda k: ImageNetResNet(k, blocks=(3, 4, 6, 3), block=Bottleneck),
}


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode with every number drawn: BN's moments, scales and shifts, the head."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(17)
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("weight") and tensor.ndim == 1:  # small, that deep sums stay small
            tensor.copy_(0.3 + 0.4 * torch.rand(tensor.shape, generator=generator))
        elif name.endswith("sigma"):
            tensor.fill_(2.5)
        elif tensor.ndim == 1:  # biases and means
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator) + 0.2)
        else:
            spread = (2 / tensor[0].numel()) ** 0.5
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def logits(found: weights.Weights, images: np.ndarray) -> np.ndarray:
    """Of our network, for images NCHW."""
    classifier = steps.networks(found.model).classifier(found.network.params)
    run = jax.jit(lambda v, x: classifier.apply(v, x, False)[1])
    return np.asarray(run(found.network.variables(), images.transpose(0, 2, 3, 1)))


def check(model: nn.Module, longer: nn.Module, path, sizes: tuple[int, ...]) -> None:
    """Ours has the model's logits; a file with a longer head loads, and has our longer logits."""
    randomised(model)
    state = {name: x.clone().contiguous() for name, x in model.state_dict().items()}
    save_file(state, path / "old.safetensors")
    found = weights.read(path / "old.safetensors")
    params = grow_head(found.network.params, jax.random.key(0), 3)
    grown = found.network.replace(params=params)
    weights.write(path / "new.safetensors", grown, found.names)
    longer.load_state_dict(load_file(path / "new.safetensors"), strict=True)
    longer.eval()
    again = weights.read(path / "new.safetensors")
    assert (found.classes, again.classes, found.model) == (7, 10, again.model)
    for size in sizes:
        shape = (4, found.channels, size, size)
        images = np.random.default_rng(size).normal(size=shape).astype(np.float32)
        with torch.no_grad():
            expected, expected_longer = (net(torch.tensor(images)) for net in (model, longer))
        assert expected.std() > 0.05
        assert np.abs(logits(found, images) - expected.numpy()).max() < 1e-4
        assert np.abs(logits(again, images) - expected_longer.numpy()).max() < 1e-4
        assert torch.allclose(expected_longer[:, :7], expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_pytorchs_and_the_longer_file_loads_strictly(family, tmp_path):
    make = FAMILIES[family]
    sizes = (64, 37) if "resnet" in family or "imagenet" in family else (16, 13)
    check(make(7), make(10), tmp_path, sizes)


@pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_own_networks(name, tmp_path):
    make = getattr(torchvision.models, name)
    check(make(num_classes=7), make(num_classes=10), tmp_path, (48,))


@pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
@pytest.mark.parametrize("depth", [101, 152])
def test_torchvisions_deepest_come_in_and_go_out(depth, tmp_path):
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=7)
    save_file(model.state_dict(), tmp_path / "old.safetensors")
    found = weights.read(tmp_path / "old.safetensors")
    assert (found.model.family, found.model.depth, found.model.width) == ("imagenet", depth, 64)
    weights.write(tmp_path / "new.safetensors", found.network, found.names)
    written = load_file(tmp_path / "new.safetensors")
    model.load_state_dict(written, strict=True)
    assert written.keys() == model.state_dict().keys()


def test_the_three_lines_turn_a_pickle_into_a_file_that_is_read(tmp_path):
    model = randomised(PyCIL(7))
    state, optimizer = model.state_dict(), {"state": {}, "param_groups": [{"lr": 0.1}]}
    saved = (
        *(state, {"state_dict": state, "epoch": 3}, {"tasks": 0, "model_state_dict": state}),
        {"accuracy": torch.tensor(0.9), "scheduler": {}, "optimizer": optimizer, "model": state},
    )
    for number, content in enumerate(saved):
        (tmp_path / "old.safetensors").unlink(missing_ok=True)
        torch.save(content, tmp_path / "old.pt")
        with pytest.raises(UserError) as caught:
            weights.read(tmp_path / "old.pt")
        exec("\n".join(caught.value.fix), {})
        assert weights.read(tmp_path / "old.safetensors").classes == 7, number
