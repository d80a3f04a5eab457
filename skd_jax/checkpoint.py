"""Saving and restoring a run's state: the only file that knows about Orbax.

A checkpoint is one numbered step holding two items: ``state``, a pytree of arrays, and ``meta``, a
JSON dictionary that says where in the run the state belongs. The state is stored as a flat
dictionary from path ("teacher.params.conv.kernel") to array: structure is the template's business
on the way back, so that a mismatch can be named by its path, whatever containers the state is
built of.

Orbax gives atomic saves, not sound ones: a flipped bit comes back as other weights. So SHA-256
digests of both items, taken of what was in memory, lie in ``meta``, and a checkpoint that does not
agree with its digests is :class:`Damaged`. Only JSON and arrays are read: nothing is unpickled, so
a checkpoint from a stranger cannot run code.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from skd_jax.errors import UserError, first_line

# Orbax logs dozens of lines a save through absl's logger, and pages about a damaged checkpoint,
# which is told in one line here: drop those, and no one else's.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

logging.getLogger("asyncio").addFilter(
    lambda record: not re.search("never retrieved.*tensorstore", record.getMessage(), re.DOTALL)
)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of ``tree`` by dotted path. ``None`` and empty containers have no leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries of leaves by dotted path, as :func:`flatten` names them."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it does not ask JAX whether to stop: whoever asks counts a step."""

    def reached_preemption(self, step: int) -> bool:
        """Leaves that to the training loop."""
        del step
        return False


class Damaged(Exception):
    """A checkpoint cannot be read, or is not what was saved; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved, read back and found sound.

    Attributes:
      path: the checkpoint's folder.
      step: its number.
      meta: what :meth:`Checkpoints.save` was given as ``meta``; tuples are lists now.
      arrays: the state's leaves by dotted path.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def into(self, template: Any) -> Any:
        """The state in the structure it had, bit for bit.

        Args:
            template: A pytree of the state's structure, with leaves that have a shape and a dtype:
                arrays or ``jax.ShapeDtypeStruct``. Only those two are read from it.

        Returns:
            The template's structure, its leaves uncommitted arrays on the default device.

        Raises:
            UserError: The state differs from the template in structure, shape or dtype.
        """

        def describe(leaves: dict[str, Any], path: str) -> str:
            if path not in leaves:
                return "absent"
            return f"{np.dtype(leaves[path].dtype).name}{list(leaves[path].shape)}"

        wanted = flatten(template)
        for path in [*wanted, *self.arrays]:
            here, there = describe(wanted, path), describe(self.arrays, path)
            if here != there:
                raise UserError(
                    f"checkpoint {self.path} does not fit this run: {path} is {there} in it but "
                    f"{here} here; use the config and code it was saved with, or another workdir"
                )
        # jnp.array copies: a buffer shared with numpy could not be donated.
        leaves = [jnp.array(self.arrays[path]) for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)


class Checkpoints:
    """The checkpoints of one run, newest last. Saves are asynchronous.

    Nothing is written, and the directory is not made, before the first :meth:`save`.
    """

    def __init__(self, directory: str | Path, keep: int):
        """Looks at ``directory`` without touching it.

        Args:
            directory: Where the steps lie, one directory each.
            keep: How many of the newest steps are kept, at least 1.

        Raises:
            ValueError: ``keep`` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self._directory = Path(directory).absolute()  # Orbax refuses relative paths
        self._keep = keep
        # The state is the same in every process, so one writes it: without barriers, none can wait
        # for a process whose disk is full.
        self._writes = jax.process_index() == 0
        self._opened: ocp.CheckpointManager | None = None
        self._saving: int | None = None
        self._failed = False  # a save that Orbax tells of once more when it is closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else what went wrong first is told, and the newest sound step stays
                raise

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Of several processes the first saves, and the others return.

        Args:
            step: Greater than every step saved before.
            state: A pytree of arrays (JAX or numpy, any shape and dtype but PRNG keys), the same in
                every process.
            meta: What JSON can hold; tuples come back as lists.

        Raises:
            ValueError: ``step`` is not greater than the newest one.
            UserError: This save could not be started, or the one before it failed: the disk is
                full, for instance. Older checkpoints are as they were.
        """
        if not self._writes:
            return
        self.wait()
        newest = self.steps()[:1]
        if newest and step <= newest[0]:
            raise ValueError(f"step {step} is not newer than the newest saved, {newest[0]}")
        leaves = flatten(state) | {_STEP: np.int64(step)}  # Orbax refuses a state without arrays
        # Copies: on a CPU what is fetched is the array's own memory, which may be donated.
        arrays = {path: np.array(leaf) for path, leaf in jax.device_get(leaves).items()}
        meta = json.loads(json.dumps(meta))
        digests = {"state": digest_of(arrays), "meta": _digest_json(meta)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave({"meta": meta, "sha256": digests}),
        )
        _silence_late_errors()
        try:
            # "force": whether to save is not Orbax's to decide.
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._unsaved(step, error) from error
        self._saving = step

    def steps(self) -> list[int]:
        """The complete steps that this process sees in the folder, newest first.

        Orbax is not asked: with several processes it would wait for all of them.
        """
        if not self._directory.is_dir():
            return []
        names = (path.name for path in self._directory.iterdir() if path.is_dir())
        numbers = (int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))
        return sorted(numbers, reverse=True)

    def read(self, step: int) -> Checkpoint:
        """Reads a checkpoint and holds it against its digests.

        Raises:
            Damaged: It is not what was saved.
            UserError: It cannot be read for a reason that may pass: permissions, memory, the disk.
        """
        self.wait()  # a step still being written has another name
        _silence_late_errors()
        path = self._directory / str(step)
        if not path.is_dir():
            raise Damaged("there is no such folder")
        try:
            with self._reader() as reader:
                args = ocp.args.Composite(meta=ocp.args.JsonRestore())
                saved = reader.restore(step, args=args)["meta"]
                meta, digests = saved["meta"], saved["sha256"]
                if digests["meta"] != _digest_json(meta):
                    raise Damaged("its meta differs from what was saved")
                tree = reader.item_metadata(step)["state"].tree
                # Templates of numpy arrays come back as such: where the arrays lay when they were
                # saved (another device, several) does not matter. Broadcasting one element takes
                # no memory.
                hosts = {
                    k: np.broadcast_to(np.empty((), x.dtype), x.shape) for k, x in tree.items()
                }
                args = ocp.args.Composite(state=ocp.args.StandardRestore(hosts))
                arrays = reader.restore(step, args=args)["state"]
            if digests["state"] != digest_of(arrays) or arrays.pop(_STEP) != step:
                raise Damaged("its weights differ from what was saved")
        except Damaged:
            raise
        except Exception as error:  # Orbax and what is below it raise all kinds
            reason = f"{type(error).__name__}: {first_line(error)}"
            if _may_pass(error):
                raise UserError(f"cannot read checkpoint {path} ({reason}); fix that") from error
            raise Damaged(reason) from error
        return Checkpoint(path, step, meta, arrays)

    def set_aside(self, step: int) -> Path:
        """Moves a step out of the way, and says where to; nothing is deleted.

        Raises:
            UserError: It cannot be moved.
        """
        self.close()  # Orbax remembers the steps it has seen
        source = self._directory / str(step)
        names = (str(step), *(f"{step}_{n}" for n in range(2, 10_000)))
        try:
            self.damaged.mkdir(exist_ok=True)
            free = (self.damaged / name for name in names if not (self.damaged / name).exists())
            return source.rename(next(free))
        except OSError as error:
            raise UserError(
                f"checkpoint {source} is damaged and cannot be moved to {self.damaged} "
                f"({error.strerror}); fix that, or move it yourself"
            ) from error

    @property
    def damaged(self) -> Path:
        """Where damaged steps are kept."""
        return self._directory.with_name(self._directory.name + "_damaged")

    def wait(self) -> None:
        """Returns when every save that was started has ended.

        Raises:
            UserError: One failed.
        """
        step, self._saving = self._saving, None
        if self._opened is None or step is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._failed = True
            raise self._unsaved(step, error) from error
        if not (self._directory / str(step)).is_dir():
            raise self._unsaved(step, OSError("it was not completed"))

    def close(self) -> None:
        """Waits for running saves and releases Orbax's threads. The object may be used again.

        Raises:
            UserError: A save failed.
        """
        opened = self._opened
        try:
            self.wait()
        finally:
            told, self._opened, self._failed = self._failed, None, False
            try:
                if opened is not None:
                    opened.close()
            except Exception:
                if not told:
                    raise

    @property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when it is first needed: making it makes the directory.
        if self._opened is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._opened = _Manager(
                self._directory,
                item_handlers=_handlers(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    create=False,
                    cleanup_tmp_directories=True,  # that a killed save left
                    multiprocessing_options=_alone(),
                ),
            )
        return self._opened

    def _reader(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=_alone()
        )
        return ocp.CheckpointManager(self._directory, item_handlers=_handlers(), options=options)

    def _unsaved(self, step: int, error: Exception) -> UserError:
        reason = first_line(error)
        return UserError(
            f"cannot save checkpoint {self._directory / str(step)} ({type(error).__name__}: "
            f"{reason}); those before it are as they were: fix that (free some space on the disk) "
            "and run the same command again"
        )


_STEP = "step"


def _alone() -> ocp.options.MultiprocessingOptions:
    """This process by itself: one that fails must not leave others waiting."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
    )


def _handlers() -> dict[str, Any]:
    """How the items are stored; without these a reader has no item metadata."""
    return {
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=_alone()),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=_alone()),
    }


def _may_pass(error: Exception) -> bool:
    """Whether it is the machine that failed, and the checkpoint may be sound."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    codes = "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|UNKNOWN"
    # TensorStore, which reads the arrays, raises ValueError for all of these.
    return isinstance(error, OSError | MemoryError) or bool(re.match(codes, str(error)))


@functools.cache
def _silence_late_errors() -> None:
    """Where one of Orbax's reads or writes fails, later ones complain that no one waits."""
    before = sys.unraisablehook

    def hook(problem: Any) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            before(problem)

    sys.unraisablehook = hook


def digest_of(arrays: dict[str, Any]) -> str:
    """SHA-256 of named arrays: their paths, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for path in sorted(arrays):
        array = np.asarray(arrays[path])
        digest.update(f"{path} {array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest_json(values: dict[str, Any]) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
