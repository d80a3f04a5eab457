"""A stranger's model folder is read or refused in a line; it runs and opens nothing else."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from skd_jax.errors import UserError
from skd_jax.model import load

FILES = ("model.safetensors", "delegator.safetensors", "config.json", "labels.txt")
VALUES = (
    *(None, True, 0, -1, 3, 2**70, 1e308, float("nan"), "", "../../etc/passwd", "skd_jax.main"),
    *([], [1], [0.5] * 3, ["a"] * 4, {}, {"x": {}}, "os", "__import__('os').getcwd()"),
)
opened: list[str] | None = None  # what Python opens while a folder is read


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def whole(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    small_model.save(folder)
    return folder


def _mutated(rng: random.Random, content: bytes, name: str) -> bytes:
    kind = rng.randrange(5)
    if name == "config.json" and kind < 3:
        return _with_other_fields(rng, json.loads(content))
    if kind == 0:  # cut off
        return content[: rng.randrange(len(content))]
    if kind == 1:  # something in between
        place = rng.randrange(len(content))
        return content[:place] + rng.randbytes(rng.randrange(1, 40)) + content[place:]
    changed = bytearray(content)
    reach = len(changed) if kind == 2 else min(len(changed), 300)  # its header, most often
    for _ in range(rng.randrange(1, 9)):
        changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)


def _with_other_fields(rng: random.Random, config: dict) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        node = config
        while True:
            name = rng.choice(sorted(node))
            if isinstance(node[name], dict) and node[name] and rng.random() < 0.7:
                node = node[name]
                continue
            node[rng.choice((name, "path", "module"))] = rng.choice(VALUES)
            break
    return json.dumps(config).encode()


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_strangers_folder_is_read_or_refused(whole, tmp_path, number):
    global opened
    folder, read = tmp_path / "model", 0
    load(whole)  # all modules that reading needs
    for seed in range(number):
        rng = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for name in rng.sample(FILES, rng.choice((1, 1, 2))):
            (folder / name).write_bytes(_mutated(rng, (whole / name).read_bytes(), name))
        modules, opened = set(sys.modules), []
        try:
            load(folder)
            read += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1, (seed, str(error))
            assert len(str(error)) < 1500, (seed, str(error))
        finally:
            places, opened = opened, None
        assert set(sys.modules) == modules, seed
        strange = [place for place in places if not Path(place).is_relative_to(folder)]
        assert not strange, (seed, strange)
    assert 0 < read < number  # some changes do no harm, others are found
