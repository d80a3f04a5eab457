"""Saving and restoring a run's state: the only file that knows about Orbax.

A checkpoint is one numbered step holding two items: ``state``, a pytree of arrays, and ``meta``, a
JSON dictionary that says where in the run the state belongs. The state is stored as a flat
dictionary from path ("teacher.params.conv.kernel") to array: structure is the template's business
on the way back, so that a mismatch can be named by its path, whatever containers the state is
built of.
"""

import logging
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from skd_jax.errors import UserError

# Orbax logs dozens of lines a save at INFO, through absl's logger: drop those, and no one else's.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.WARNING or "orbax" not in record.pathname
)


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of ``tree`` by dotted path. ``None`` and empty containers have no leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
        self._opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Args:
            step: Greater than every step saved before.
            state: A pytree of arrays (JAX or numpy, any shape and dtype but PRNG keys).
            meta: What JSON can hold; tuples come back as lists.

        Raises:
            ValueError: ``step`` is not greater than the newest one.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_flatten(state)), meta=ocp.args.JsonSave(meta)
        )
        if not self._manager.save(step, args=items):  # Orbax's way to say "not a newer step"
            raise ValueError(f"step {step} is not newer than the newest saved, {self.latest()}")

    def latest(self) -> int | None:
        """Returns the newest complete step, or None where there is none."""
        return self._manager.latest_step() if self._directory.is_dir() else None

    def newest(self) -> int | None:
        """The newest step that this process sees in the folder, without asking other processes."""
        if not self._directory.is_dir():
            return None
        steps = (int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())
        return max(steps, default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what :meth:`save` was given as ``meta``.

        Raises:
            UserError: The step is missing or cannot be read.
        """
        self._must_exist(step)
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["meta"]
        except Exception as error:
            raise self._unreadable(step, error) from error

    def restore(self, step: int, template: Any) -> Any:
        """Reads a state back, bit for bit.

        Args:
            step: One of the saved steps.
            template: A pytree of the state's structure, with leaves that have a shape and a dtype:
                arrays or ``jax.ShapeDtypeStruct``. Only those two are read from it.

        Returns:
            The template's structure, its leaves uncommitted arrays on the default device.

        Raises:
            UserError: The step is missing or cannot be read, or it differs from the template in
                structure, shape or dtype.
        """
        self._must_exist(step)
        wanted = _flatten(template)
        self._must_match(step, wanted)
        # Templates of numpy arrays come back as such: where the arrays lay when they were saved
        # (another device, several) then does not matter. Broadcasting one element takes no memory.
        hosts = {k: np.broadcast_to(np.empty((), x.dtype), x.shape) for k, x in wanted.items()}
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(hosts))
            arrays = self._manager.restore(step, args=args)["state"]
        except Exception as error:
            raise self._unreadable(step, error) from error
        # jnp.array copies: a buffer shared with numpy could not be donated.
        leaves = [jnp.array(arrays[path]) for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def wait(self) -> None:
        """Returns when every save that was started has ended; raises what failed in one."""
        if self._opened is not None:
            self._opened.wait_until_finished()

    def close(self) -> None:
        """Waits for running saves and releases Orbax's threads. The object may be used again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when it is first needed: making it makes the directory.
        if self._opened is None:
            self._opened = ocp.CheckpointManager(
                self._directory,
                # Without handlers a manager that has saved nothing yet has no item metadata.
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True),
            )
        return self._opened

    def _must_exist(self, step: int) -> None:
        self.wait()  # a step still being written has another name
        if not (self._directory / str(step)).is_dir():
            raise UserError(
                f"there is no checkpoint {self._directory / str(step)}: name another step"
            )

    def _must_match(self, step: int, wanted: dict[str, Any]) -> None:
        """Compares paths, shapes and dtypes; Orbax itself would cast a dtype silently."""
        try:
            saved = self._manager.item_metadata(step)["state"].tree
        except Exception as error:
            raise self._unreadable(step, error) from error

        def describe(leaves: dict[str, Any], path: str) -> str:
            if path not in leaves:
                return "absent"
            return f"{np.dtype(leaves[path].dtype).name}{list(leaves[path].shape)}"

        for path in [*wanted, *saved]:
            here, there = describe(wanted, path), describe(saved, path)
            if here != there:
                raise UserError(
                    f"checkpoint {self._directory / str(step)} does not fit this run: {path} is "
                    f"{there} in it but {here} here; use the config and code it was saved with, "
                    "or another workdir"
                )

    def _unreadable(self, step: int, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [""])[0][:200]
        return UserError(
            f"cannot read checkpoint {self._directory / str(step)} "
            f"({type(error).__name__}: {reason}); delete it to resume from the one before"
        )
