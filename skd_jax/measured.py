"""What a run has measured so far, and what it watches for while it goes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from skd_jax import metrics, parallel
from skd_jax.errors import UserError


@dataclasses.dataclass
class Measured:
    """What has been measured so far; it is saved with every checkpoint.

    Attributes:
      rows: test accuracies after each task.
      reports: what phases have reported, by their names.
      seconds: by phase, with what it does at its end; and of evaluations, which are apart.
      skipped: steps in which a number was not finite, so that they changed nothing.
      skipped_in_a_row: how many of them were the latest steps.
      skipped_from: the first of these, in words.
      remembered: of the phase under way: see ``Watched``.
      alarmed: the number of the phase whose alarm has been told; -1 before any.
      logged: rows in the log.
    """

    rows: list[metrics.Row] = dataclasses.field(default_factory=list)
    reports: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    skipped_from: str = ""
    remembered: dict[str, Any] = dataclasses.field(default_factory=dict)
    alarmed: int = -1
    logged: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Measured":
        """Reads what ``dataclasses.asdict`` and JSON made of it.

        Raises:
          KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            rows=[
                metrics.Row(tuple(row["correct"]), tuple(row["total"])) for row in values["rows"]
            ],
            reports={
                str(name): [dict(row) for row in rows]
                for name, rows in dict(values["reports"]).items()
            },
            seconds={name: float(spent) for name, spent in dict(values["seconds"]).items()},
            skipped=int(values["skipped"]),
            skipped_in_a_row=int(values["skipped_in_a_row"]),
            skipped_from=str(values["skipped_from"]),
            remembered=dict(values["remembered"]),
            alarmed=int(values["alarmed"]),
            logged=int(values["logged"]),
        )

    def add_seconds(self, name: str, seconds: float) -> None:
        """Books them under ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def count_skipped(self, skipped: np.ndarray, where: str, stop: int, limit: int) -> int:
        """Counts the steps that were left out, and returns how many there are among these.

        Args:
          skipped: [n], not 0 where one was, for the last n steps of the ``stop`` made.
          where: the task and phase, and what a step is called.
          stop: how many steps of the phase have been made.
          limit: as many in a row are too many.

        Raises:
          UserError: there were too many in a row; the message names the first step of them.
        """
        for number, missed in enumerate(skipped > 0, stop - len(skipped) + 1):
            if not missed:
                self.skipped_in_a_row = 0
                continue
            if not self.skipped_in_a_row:
                self.skipped_from = f"{where} {number}"
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= limit:
                raise UserError(
                    f"numbers that are not finite were met, and left out, {limit} times in a row, "
                    f"from {self.skipped_from} on; lower the rates or the terms' weights, in "
                    "another workdir (config.run.max_skipped is the limit)"
                )
        return int(np.sum(skipped > 0))


@dataclasses.dataclass
class Window:
    """Metrics of the steps since the last log, fetched from the devices when they are needed.

    Attributes:
      calls: for each call of a compiled step how many it made, and its metrics, [n] or [n, K], of
        which the first so many count; of several replicas [R, n] or [R, n, K].
      replicas: R.
    """

    calls: list[tuple[int, Mapping[str, Any]]] = dataclasses.field(default_factory=list)
    replicas: int = 1

    @classmethod
    def from_lists(cls, values: Mapping[str, Sequence], replicas: int = 1) -> "Window":
        """Reads what :meth:`to_lists` and JSON made of one.

        Raises:
          TypeError, ValueError: it is something else.
        """
        arrays = {name: np.asarray(value, np.float32) for name, value in values.items()}
        before = (replicas,) if replicas > 1 else ()
        axis = len(before)
        if any(a.ndim - axis not in (1, 2) or a.shape[:axis] != before for a in arrays.values()):
            raise ValueError("metrics that are not [n] or [n, K]")
        lengths = {a.shape[axis] for a in arrays.values()}
        if len(lengths) > 1:
            raise ValueError("metrics of different numbers of steps")
        return cls([(lengths.pop(), arrays)] if arrays else [], replicas)

    def to_lists(self) -> dict[str, list]:
        """Every step's metrics, for JSON, which holds a float32 exactly; null is not finite."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(v) for v in value]
            return value if math.isfinite(value) else None

        return {name: plain(values.tolist()) for name, values in self.steps().items()}

    def steps(self) -> dict[str, np.ndarray]:
        """Every step's metrics, by name: [n] or [n, K], behind the replicas' axis.

        Raises:
          UserError: those read from a checkpoint are not those that the steps give here.
        """
        axis = int(self.replicas > 1)
        fetched = [
            {name: x[(slice(None),) * axis + (slice(made),)] for name, x in call.items()}
            for made, call in jax.device_get(parallel.reachable(list(self.calls)))
        ]
        kinds = [{name: np.shape(x)[1 + axis :] for name, x in call.items()} for call in fetched]
        if any(kind != kinds[0] for kind in kinds):
            raise UserError(
                "the newest checkpoint holds other metrics than this version of skd_jax has; use "
                "the version it was saved with, or another workdir"
            )
        names = fetched[0] if fetched else ()
        return {name: np.concatenate([call[name] for call in fetched], axis) for name in names}

    def each(self) -> list[dict[str, np.ndarray]]:
        """Every step's metrics of each replica, by name: [n] or [n, K]."""
        steps = self.steps()
        if self.replicas == 1:
            return [steps]
        return [{name: x[i] for name, x in steps.items()} for i in range(self.replicas)]


def scalars(steps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What is logged of some steps: means over those whose numbers are finite.

    ``skipped`` is a sum; of a vector [n, K] the largest mean is logged, as ``largest_NAME``.
    """
    found = {}
    for name, values in steps.items():
        if name == "skipped":
            found[name] = float(np.sum(values > 0))
        elif values.ndim > 1:
            found[f"largest_{name}"] = float(np.max(mean_of_finite(values)))
        else:
            found[name] = float(mean_of_finite(values))
    return found


def mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis, of the rows [n] or [n, K] whose numbers are all finite."""
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return np.mean(values[finite], axis=0) if finite.any() else np.full(values.shape[1:], np.nan)
