"""Reads a folder of images with one sub-folder a class."""

import json
import os
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from skd_jax.config import Data
from skd_jax.data.images import SUFFIXES, is_companion, list_files, no_images, warn_left_out
from skd_jax.data.records import (
    Encoded,
    Records,
    cache_file,
    concatenate,
    decode,
    read_cache,
    read_file,
    stamp,
    write_cache,
)
from skd_jax.errors import UserError, warn
from skd_jax.output import listed
from skd_jax.paths import given_path

FIX = "replace it, or move it away"
Listing = dict[str, list[pathlib.Path]]  # class name -> files
_SPLITS = {  # what the folder of a split may be called, in any case, and the split that it is
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}


def read_folder(data: Data) -> Records:
    """Lists the image folder ``data.data_dir`` and decodes every file once to see that it is sound.

    What was sound is kept in the user's cache folder: only new and changed files are read again.

    The class folders lie in the folder itself, or in its sub-folders ``train`` and ``test`` (or
    ``validation``, or ``val``), which are then the splits. Names sort to labels. A class's images
    may lie in folders below its own. Hidden files and other systems' companion files are ignored;
    all other files and folders that are not read are named by a warning on standard error.

    Raises:
      UserError: no such folder, no classes, a class without images, splits with different classes
        or of which one is missing or there twice, or a file that is no image.
    """
    root = given_path(data.data_dir, "config.data.data_dir")
    if not data.data_dir or not root.is_dir():
        raise UserError(
            f"config.data.data_dir={data.data_dir!r} is not a folder: name one that has "
            "one sub-folder of images a class."
        )
    splits = _splits(root)
    beside = [] if "all" in splits else [f for f in _folders(root) if f not in splits.values()]
    if beside:
        read = " and ".join(folder.name for folder in splits.values())
        names = listed([folder.name for folder in beside], 5)
        warn(f"in {root}, images are read from {read}, and these folders are left out: {names}")
    listings = {name: _list_classes(folder) for name, folder in splits.items()}
    names = sorted(set().union(*listings.values()))
    for split, listing in listings.items():
        missing = [name for name in names if name not in listing]
        if missing:
            raise UserError(
                f"{splits[split]} has no folder for the classes {missing[:5]} that another split "
                "has: add them, or remove them there."
            )
    labels, parts = concatenate(
        {
            split: np.repeat(np.arange(len(names)), [len(listing[name]) for name in names])
            for split, listing in listings.items()
        }
    )
    files: list[pathlib.Path | None] = [
        file for listing in listings.values() for name in names for file in listing[name]
    ]
    checked = _check_files([file for file in files if file], root, data)

    def encoded(ids: list[int]) -> list[Encoded]:
        return [file for i in ids if (file := files[i])]

    def drop(ids: list[int]) -> None:
        for i in ids:
            files[i] = None

    return Records(
        class_names=tuple(names),
        labels=labels,
        parts=parts,
        encoded=encoded,
        place=lambda i: str(files[i]),
        fix=FIX,
        drop=drop,
        files=checked,
    )


def changed_files(before: dict[str, list[int]], now: dict[str, list[int]]) -> str | None:
    """Says which file of an image folder was added, removed or changed since it was last read.

    Args:
      before: ``Records.files`` as it was.
      now: as it is.

    Returns:
      words for an error: the first such file and how many more there are; None if there is none.
    """
    changed = sorted(
        file for file in before.keys() | now.keys() if before.get(file) != now.get(file)
    )
    if not changed:
        return None
    first, *others = changed
    what = "is new" if first not in before else "is gone" if first not in now else "has changed"
    more = {0: "", 1: " (and 1 more file differs)"}
    return f"{first} {what}" + more.get(len(others), f" (and {len(others)} more files differ)")


def check_workdir(workdir: str | pathlib.Path, data: Data, flag: str = "--workdir") -> None:
    """Checks that what a run writes does not lie among the images it reads.

    Args:
      workdir: where it writes.
      data: what it reads.
      flag: what the workdir is called in an error.

    Raises:
      UserError: the workdir lies in the image folder, where its pictures would count as images.
    """
    if data.name != "folder" or not data.data_dir:
        return
    written = given_path(workdir, flag).resolve()
    for read in _splits(given_path(data.data_dir, "config.data.data_dir")).values():
        root = read.resolve()
        if not written.is_relative_to(root):
            continue
        if not any(map(is_companion, written.relative_to(root).parts)):
            raise UserError(
                f"{flag}={workdir} lies in the image folder {read}, where what is written would "
                "count as images: name a folder outside it."
            )


def _splits(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of class folders by the name of their split: "all", or "train" and "test".

    Raises:
      UserError: a split is there twice, or the one to train on is missing.
    """
    children, found = _folders(root), {}
    for child in children:
        split = _SPLITS.get(child.name.lower())
        if split and _folders(child):
            if split in found:
                raise UserError(
                    f"{root} has both {found[split].name} and {child.name}: name the one that is "
                    "meant, and move the other away."
                )
            found[split] = child
    if "train" not in found:
        if found and len(found) == len(children):
            names = " and ".join(folder.name for folder in found.values())
            raise UserError(
                f"{root} has {names} and no train: call the folder of the classes to train on "
                "train, or name it as config.data.data_dir."
            )
        return {"all": root}
    tested = found.get("test") or found.get("val")
    return {"train": found["train"], **({"test": tested} if tested else {})}


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_companion(p.name))


def _list_classes(folder: pathlib.Path) -> Listing:
    children = _folders(folder)
    if not children:
        raise UserError(
            f"{folder} has no class sub-folders: config.data.data_dir needs one sub-folder of "
            "images a class."
        )
    found = {child.name: list_files(child) for child in children}
    for name, (images, others) in found.items():
        if not images:
            raise UserError(
                f"{folder / name} {no_images(others)}: add some, or move the folder away."
            )
    loose = [f for f in folder.iterdir() if f.is_file() and not is_companion(f.name)]
    loose = sorted(f for f in loose if f.suffix.lower() in SUFFIXES)
    warn_left_out(folder, [file for _, others in found.values() for file in others], loose)
    listing = {name: images for name, (images, _) in found.items()}
    deeper = [f for name, files in listing.items() for f in files if f.parent != folder / name]
    if deeper:
        more = f" and {len(deeper) - 1} more" if deeper[1:] else ""
        warn(
            f"in {folder}, images in folders below a class folder count as that class's: "
            f"{deeper[0].relative_to(folder)}{more}"
        )
    return listing


def _check_files(files: list[pathlib.Path], root: pathlib.Path, data: Data) -> dict[str, list[int]]:
    """Decodes every file that has changed; returns size and CRC-32 by path within ``root``."""
    cache = cache_file("images", str(root.resolve()))
    kept: dict[str, list[int]] = json.loads(read_cache(cache) or b"{}")  # stamp, then CRC-32
    names = [file.relative_to(root).as_posix() for file in files]

    def check(name: str, file: pathlib.Path) -> tuple[list[int] | None, int, int]:
        now = stamp(file)  # before it is read: what changes meanwhile gets another one
        if now and name in kept and kept[name][:-1] == now:
            return now, now[0], kept[name][-1]
        content = read_file(file)
        how = (data.load_size, data.channels, data.fit, data.interpolation)
        decode(content, str(file), FIX, *how)
        return now, len(content), zlib.crc32(content)

    found, stamped = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        checks = tqdm(
            threads.map(check, names, files), "checking images", len(files), delay=2, leave=False
        )
        try:
            for name, (now, size, crc) in zip(names, checks, strict=True):
                found[name] = [size, crc]
                if now:
                    stamped[name] = [*now, crc]
        except UserError:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
        finally:  # also what was sound up to a file that is not
            now_kept = {name: kept[name] for name in names if name in kept} | stamped
            if now_kept != kept:
                write_cache(cache, json.dumps(now_kept).encode())
    return found
