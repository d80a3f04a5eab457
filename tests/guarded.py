"""A source of images that no method but joint training may trip."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from skd_jax import experiment
from skd_jax.config import Data
from skd_jax.data import class_schedule, open_source


class Guarded:
    """A source that raises where an image of a class is read after one of a later task."""

    def __init__(self, data: Data):
        self._source = open_source(data)
        self.class_names = self._source.class_names
        schedule = class_schedule(data, self.class_names)
        self._task = {c: task for task, classes in enumerate(schedule) for c in classes}
        self._of = self._source.labels("train")
        self._now = 0

    def labels(self, split):
        return self._source.labels(split)

    def forget(self, indices):
        self._source.forget(indices)

    def read(self, split, indices):
        found = self._source.read(split, indices)  # its own refusal comes first
        if split == "train":
            tasks = {self._task[c] for c in self._of[np.asarray(indices)].tolist()}
            self._now = max(self._now, *tasks)
            if min(tasks) < self._now:
                raise RuntimeError("an old image was read")
        return found


@contextmanager
def no_old_images() -> Iterator[None]:
    """Runs begun within read from such a source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "open_source", Guarded)
        yield
