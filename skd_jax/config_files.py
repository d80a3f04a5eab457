"""Config files: where they are, what they may import, and what they say.

A config file is a program with a function ``get_config(arg)``. Config files import each other by
``from configs import digits``. So that this works in any folder, and beside a package ``configs``
of somebody else's, the folders that the name means are chosen here, for each file that is read:

1. the folder the file lies in, if that is called ``configs``;
2. ``configs`` in the current folder;
3. the configs that come with skd_jax.

The first that has the module asked for gives it.
"""

import importlib.machinery
import importlib.util
import os
import sys
import textwrap
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from ml_collections import ConfigDict

from skd_jax.config import field_paths
from skd_jax.errors import UserError, first_line
from skd_jax.paths import given_path

PACKAGE = "configs"
_LOADED = "config_config"  # what ml_collections calls the module of a flag's config file


def bundled() -> Path:
    """The folder of the configs that come with skd_jax: within it, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    in_wheel = package / "bundled" / PACKAGE
    return in_wheel if in_wheel.is_dir() else package.parent / PACKAGE


def find(path: str) -> str:
    """The file that a path means: itself, or else the one of that name that comes with skd_jax.

    Args:
      path: such as "configs/digits.py".

    Returns:
      The path of the file, which need not exist.
    """
    folder, name = os.path.split(os.path.normpath(path))
    ours = os.path.join(bundled(), name)
    if folder == PACKAGE and not os.path.exists(path) and os.path.isfile(ours):
        return ours
    return path


def read(name: str) -> ConfigDict:
    """What a config file's ``get_config`` returns.

    From then on ``import configs`` means the folders that the file imports from.

    Args:
      name: the file's path, and its argument after a colon: "configs/cifar100.py:tasks=10".

    Raises:
      UserError: there is no such file, or it fails; or it returns something else.
    """
    drive, rest = os.path.splitdrive(name)
    path, given, argument = rest.partition(":")
    if argument.startswith("//"):
        given_path(name, "--config")  # which says that it is an address
    file = find(str(given_path(drive + path, "--config")))
    if os.path.isdir(file) or not os.path.exists(file):
        what = "is a folder" if os.path.isdir(file) else "there is no such file"
        raise UserError(f"--config={name}: {what}; skd_jax brings {brought()}")
    _Neighbours.choose(Path(file))
    try:
        config = _run(file).get_config(*([argument] if given else []))
    except Exception as error:  # a config file is a program: anything may be raised in it
        words = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"--config={name}: {words}{first_line(error)}") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"--config={name}: get_config returned {kind}; return a ConfigDict")
    return config


def brought() -> str:
    """The config files that come with skd_jax, in words."""
    files = sorted(file.name for file in bundled().glob("*.py") if file.name != "common.py")
    return ", ".join(f"{PACKAGE}/{name}" for name in files)


def help_text() -> str:
    """What help says of configs and fields, some lines."""
    from skd_jax.methods import METHODS  # and with them JAX, which little of this module needs

    sections: dict[str, list[str]] = {}
    for path in field_paths(METHODS):
        section, _, name = path.rpartition(".")
        sections.setdefault(section, []).append(name)
    lines = [("configs that come with it", brought())]
    lines += [(section, " ".join(dict.fromkeys(names))) for section, names in sections.items()]
    return "\n".join(
        textwrap.fill(f"{head}: {words}", 80, subsequent_indent="    ") for head, words in lines
    )


def _run(file: str) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader(_LOADED, file)  # whatever its suffix
    spec = importlib.util.spec_from_file_location(_LOADED, file, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[_LOADED] = module
    loader.exec_module(module)
    return module


class _Neighbours:
    """Finds the package ``configs``, ahead of ``sys.path``."""

    def __init__(self, folders: list[str]):
        self.folders = folders

    @classmethod
    def choose(cls, file: Path) -> None:
        """Makes ``configs`` mean the folders that ``file`` imports from."""
        own = file.absolute().parent
        candidates = [own] if own.name == PACKAGE else []
        candidates += [Path.cwd() / PACKAGE, bundled()]
        found = cls([str(f) for f in dict.fromkeys(candidates) if f.is_dir()])
        sys.meta_path[:] = [found, *(f for f in sys.meta_path if not isinstance(f, cls))]
        known = sys.modules.get(PACKAGE)
        if known and list(getattr(known, "__path__", ())) != found.folders:
            for name in [n for n in sys.modules if n == PACKAGE or n.startswith(f"{PACKAGE}.")]:
                del sys.modules[name]

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder; modules of the package are found by its folders."""
        if name != PACKAGE or not self.folders:
            return None
        first = Path(self.folders[0], "__init__.py")
        if first.is_file():
            return importlib.util.spec_from_file_location(
                name, first, submodule_search_locations=list(self.folders)
            )
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = list(self.folders)
        return spec
