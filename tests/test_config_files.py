"""Config files in any folder: which is read, what ``configs`` means in it, what the wheel has."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_command_line import parse

from skd_jax import config_files
from skd_jax.errors import UserError

FOREIGN = "raise RuntimeError('of another project')\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """Another current folder, and imports that are as before when the test is over."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    for name in list(sys.modules):
        if _is_ours(name):
            del sys.modules[name]
    sys.modules.update(before)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in ("configs", "config_config")


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def says(word: str) -> tuple[str, ...]:
    """The lines of a config whose ``says`` is a word, which other configs may import."""
    return (
        "from ml_collections import ConfigDict",
        f"WORD = {word!r}",
        "def get_config(arg=None):",
        "    return ConfigDict({'says': WORD, 'arg': arg})",
    )


def imports(name: str) -> tuple[str, ...]:
    """The lines of a config that says what its neighbour ``name`` does."""
    return (f"from configs import {name}", *says(""), f"WORD = {name}.WORD")


# Which file is read


def test_configs_that_skd_jax_brings_are_found_anywhere(elsewhere):
    config = config_files.read("configs/digits.py:tasks=2")
    assert (config.data.name, config.data.tasks) == ("digits", 2)
    assert config_files.read("./configs/cifar100.py").data.name == "cifar100"
    assert parse("--config=configs/folder.py", "--workdir=w")[0].data.name == "folder"
    assert os.listdir(elsewhere) == []


def test_a_file_that_is_there_is_read_first(elsewhere):
    write(elsewhere / "configs" / "digits.py", *says("mine"))
    assert config_files.read("configs/digits.py").says == "mine"
    assert config_files.read("configs/digits.py:a=1:b").arg == "a=1:b"
    assert config_files.read(str(config_files.bundled() / "digits.py")).data.name == "digits"


def test_only_the_folder_configs_is_replaced():
    for name in (
        "digits.py",
        "mine/configs/digits.py",
        "/configs/digits.py",
        "configs/x/digits.py",
    ):
        assert config_files.find(name) == name
        with pytest.raises(UserError, match=r"there is no such file; .*configs/digits\.py"):
            config_files.read(name)


# What ``configs`` means in it


def test_neighbours_come_from_the_file_s_own_folder(elsewhere, tmp_path):
    """Field report: the current folder has a package ``configs`` of another project."""
    write(elsewhere / "configs" / "__init__.py", FOREIGN)
    write(elsewhere / "configs" / "common.py", FOREIGN)
    assert config_files.read("configs/digits.py").data.name == "digits"
    assert config_files.read(str(config_files.bundled() / "digits.py")).data.name == "digits"
    mine = write(tmp_path / "there" / "configs" / "mine.py", *imports("common"))
    write(mine.with_name("common.py"), *says("there"))
    assert config_files.read(str(mine)).says == "there"
    assert config_files.read("configs/recipes.py").data.name == "cifar100"  # imports as it runs


@pytest.mark.parametrize("init", [True, False])
def test_a_file_in_no_folder_configs_takes_the_current_folder_s(elsewhere, tmp_path, init):
    mine = write(tmp_path / "mine.py", *imports("other"))
    write(elsewhere / "configs" / "other.py", *says("here"))
    if init:
        write(elsewhere / "configs" / "__init__.py")
    assert config_files.read(str(mine)).says == "here"


@pytest.mark.parametrize("folder", ["", "configs"])
@pytest.mark.parametrize("init", [True, False])
def test_what_no_other_folder_has_is_skd_jax_s(elsewhere, folder, init):
    lines = ("from configs import digits", "get_config = digits.get_config")
    mine = write(elsewhere / folder / "mine.py", *lines)
    if init:
        write(elsewhere / "configs" / "__init__.py")
    assert config_files.read(str(mine)).data.name == "digits"
    assert config_files.read(os.path.relpath(mine)).data.name == "digits"
    assert importlib.import_module("configs.folder").get_config().data.name == "folder"


def test_the_package_s_own_file_is_run_if_it_is_imported(elsewhere):
    package = write(elsewhere / "configs" / "__init__.py", "WORD = 'package'")
    lines = ("from configs import WORD as FOUND", *says(""), "WORD = FOUND")
    mine = write(elsewhere / "configs" / "mine.py", *lines)
    assert config_files.read(str(mine)).says == "package"
    write(package, FOREIGN)
    assert config_files.read(str(write(elsewhere / "alone.py", *says("alone")))).says == "alone"
    sys.modules.pop("configs")
    with pytest.raises(UserError, match="of another project"):
        config_files.read(str(mine))


def test_files_of_two_folders_do_not_mix(tmp_path):
    files = [write(tmp_path / n / "configs" / "mine.py", *imports("other")) for n in "abc"]
    for file in files:
        write(file.with_name("other.py"), *says(file.parts[-3]))
    for _ in range(2):
        assert [config_files.read(str(file)).says for file in files] == ["a", "b", "c"]
    assert sum(isinstance(f, config_files._Neighbours) for f in sys.meta_path) == 1


# What is wrong with one


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("x = 1",), "get_config"),
        (("def get_config(): pass",), "NoneType"),
        (("def get_config(): return 1",), "returned int"),
        (("get_config = 1 / 0",), "ZeroDivisionError: division by zero"),
        (("import no_such_thing",), "no_such_thing"),
        (("from configs import no_such_thing",), "no_such_thing"),
        (("raise ValueError('first\\nsecond')",), "mine.py: first"),
        (("def get_config(",), "mine.py, line 1"),
        (("\0",), "null bytes"),
    ],
)
def test_a_wrong_file_is_named_with_the_reason(elsewhere, lines, words):
    write(elsewhere / "mine.py", *lines)
    with pytest.raises(UserError) as error:
        config_files.read("mine.py")
    said = str(error.value)
    assert said.startswith("--config=mine.py: ") and words in said and "\n" not in said


@pytest.mark.parametrize("name", ["", ":", "configs", "nowhere.py", "x" * 9999, "\0", "a/b.py:c"])
def test_what_is_no_file_is_refused(elsewhere, name):
    (elsewhere / "configs").mkdir()
    words = "File name too long" if len(name) > 255 else "no such file|is a folder|is no path"
    with pytest.raises(UserError, match=words):
        config_files.read(name)


# The wheel


def test_every_package_is_packed(repo):
    setuptools = tomllib.loads((repo / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = sorted((repo / "skd_jax").rglob("__init__.py"))
    packages = [".".join(init.parent.relative_to(repo).parts) for init in inits]
    assert sorted(setuptools["packages"]) == sorted([*packages, "skd_jax.bundled.configs"])
    assert setuptools["package-dir"] == {"skd_jax.bundled.configs": "configs"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    found = [d.version for d in importlib.metadata.distributions(name="setuptools")]
    if not found or int(found[0].split(".")[0]) < 77:
        pytest.skip("no setuptools of version 77 or later: pip install -e '.[dev]'")
    repo = Path(__file__).resolve().parent.parent
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, tree)
    for name in ("skd_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo / name, tree / name, ignore=ignored)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    python(build, tree)
    [wheel] = (tree / "wheel").glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    return site


def python(code: str, folder: Path, *args: str, site: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else os.environ
    command = [sys.executable, *(("-c", code) if code else ()), *args]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 or not code, done.stderr
    return done.stdout + done.stderr


def test_the_wheel_has_the_configs_within_the_package(site, repo):
    [info] = [path.name for path in site.iterdir() if path.name != "skd_jax"]
    assert info.endswith(".dist-info")
    assert (site / "skd_jax" / "py.typed").is_file()
    ours = {f.name: f.read_bytes() for f in (repo / "configs").glob("*.py")}
    packed = {f.name: f.read_bytes() for f in (site / "skd_jax" / "bundled" / "configs").iterdir()}
    assert packed == ours


def test_the_wheel_reads_configs_in_any_folder(site, elsewhere):
    write(elsewhere / "configs" / "__init__.py", FOREIGN)
    write(elsewhere / "mine" / "mine.py", "import configs.digits as d", "get_config = d.get_config")
    code = (
        "import sys; from skd_jax import config_files; print(config_files.bundled())\n"
        "for name in sys.argv[1:]: print(config_files.read(name).data.name)"
    )
    out = python(code, elsewhere, "configs/digits.py:tasks=2", "configs/recipes.py", site=site)
    assert out.split() == [str(site / "skd_jax" / "bundled" / "configs"), "digits", "cifar100"]
    out = python(code, elsewhere / "mine", "mine.py", site=site)
    assert out.split()[1:] == ["digits"]


@pytest.mark.slow
def test_the_wheel_s_command_starts_in_any_folder(site, elsewhere):
    args = ("--config=configs/digits.py", "--workdir=w", "--config.run.devices=99")
    said = python("", elsewhere, "-m", "skd_jax.main", *args, site=site)
    assert said.startswith("error: config.run.devices: 99"), said
