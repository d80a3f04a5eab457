"""A task's images and nobody else's: training images by task, test images, batch indices.

A class-incremental learner must not see old images again, and here it cannot: once a task is
opened, the images of earlier ones can no longer be reached through the stream, through the tasks it
handed out, or through the source. Joint training, the upper bound, asks for a stream that keeps
them.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from skd_jax import parallel
from skd_jax.compiler import compiled
from skd_jax.data.classes import Schedule
from skd_jax.data.sources import Source

Images = np.ndarray | jax.Array


class TaskImages:
    """The training images of one task, while it lasts.

    Attributes:
      classes: original ids of the task's classes; class i has head position first_label + i.
      first_label: the number of classes of earlier tasks.
      n: the number of images.
      labels: int32 [n], head positions in first_label..first_label+len(classes)-1.
    """

    def __init__(
        self,
        source: Source,
        classes: tuple[int, ...],
        first_label: int,
        rows: Sequence[np.ndarray],
        in_memory: bool,
        mesh: Mesh | None = None,
    ):
        """Names the task's records.

        Args:
          source: where images are read.
          classes: original ids of the task's classes.
          first_label: head position of the first of them.
          rows: int [n_i] for each class: its records in the source's train split.
          in_memory: keep all images on the device, once fetch is called.
          mesh: the devices a batch is split over; in memory, each holds all images.
        """
        self.classes = classes
        self.first_label = first_label
        self.labels = np.repeat(
            np.arange(first_label, first_label + len(classes), dtype=np.int32),
            [len(r) for r in rows],
        )
        self.n = len(self.labels)
        self._rows = np.concatenate(rows)
        self._kept: np.ndarray | None = None
        self._source: Source | None = source
        self._in_memory = in_memory
        self._mesh = mesh
        self._pool: tuple[jax.Array, jax.Array] | None = None
        self._ahead: tuple[np.ndarray, Future[np.ndarray]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def narrow(self, indices: Sequence[int]) -> None:
        """Leaves the images at some indices alone; before any is fetched."""
        left = np.asarray(indices, np.int32)
        self._rows, self.labels = self._rows[left], self.labels[left]
        self.n = len(self.labels)

    def extend(self, images: Any, labels: Any) -> None:
        """Puts kept images behind the task's own; before any is fetched.

        Args:
          images: uint8 [m, S, S, C]; they get the indices n .. n + m - 1.
          labels: int32 [m], positions in the head.
        """
        self._kept = np.asarray(images)
        self.labels = np.concatenate([self.labels, np.asarray(labels, np.int32)])
        self.n = len(self.labels)

    def fetch(self, batches: np.ndarray, rows: int = 0) -> tuple[Images, Images]:
        """Gets the images of some steps, [steps, B] or [steps, R, B], split over the devices.

        In memory they are taken from all the task's images, which the first call lays on the
        device. Else they are decoded, now or by an earlier call of prefetch, each by the process
        whose devices need it.

        Args:
          batches: int32 [steps, B], indices into this task's images; of R replicas [steps, R, B].
          rows: how many steps to hand out, if more; what images the rest have says nothing.

        Returns:
          uint8 images [steps, B, S, S, C] and their labels, int32 [steps, B]; or [steps, R, B, ...]
          both.

        Raises:
          RuntimeError: the task was closed.
        """
        self._reader()
        mine, sizes = self._mine(batches), batches.shape[1:]
        if self._in_memory:
            if self._pool is None:
                pool = (self._read(np.arange(self.n)), self.labels)
                self._pool = parallel.replicate(self._mesh, pool)
            mine = filled(mine, rows)
            return _take(self._pool, parallel.split(self._mesh, mine, sizes))
        ahead, self._ahead = self._ahead, None
        decoded = ahead and np.array_equal(ahead[0], mine)
        images = ahead[1].result() if ahead and decoded else self._read(mine)
        labels = parallel.split(self._mesh, filled(self.labels[mine], rows), sizes)
        return parallel.split(self._mesh, filled(images, rows), sizes), labels

    def take(self, indices: np.ndarray) -> Images:
        """The images at some indices, uint8 [m, S, S, C], on one device."""
        return jnp.asarray(self._read(np.asarray(indices, np.int32)))

    def prefetch(self, batches: np.ndarray) -> None:
        """Starts decoding what the next call of fetch will ask for; nothing to do in memory.

        Args:
          batches: as fetch takes them.

        Raises:
          RuntimeError: the task was closed.
        """
        self._reader()
        if not self._in_memory:
            mine = self._mine(batches)
            self._ahead = mine, self._thread.submit(self._read, mine)

    def close(self) -> None:
        """Lets go of the images, those on the device included."""
        self._thread.shutdown(cancel_futures=True)
        for array in self._pool or ():
            array.delete()
        self._source = self._pool = self._ahead = self._kept = None
        self._rows = self._rows[:0]

    def _reader(self) -> Source:
        if self._source is None:
            raise RuntimeError("this task is over and its training images are gone")
        return self._source

    def _mine(self, batches: np.ndarray) -> np.ndarray:
        """What of the batches this process's devices take; a copy."""
        part = parallel.local_part(self._mesh, batches.shape[1:])
        return np.array(batches[:, *part], np.int32)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices``, of any shape."""
        flat, source = indices.ravel(), self._reader()
        if self._kept is None:
            images = source.read("train", self._rows[flat])
        else:
            own = flat < len(self._rows)
            images = np.empty((len(flat), *self._kept.shape[1:]), np.uint8)
            images[~own] = self._kept[flat[~own] - len(self._rows)]
            if own.any():
                images[own] = source.read("train", self._rows[flat[own]])
        return images.reshape(*indices.shape, *images.shape[1:])


class ReplicaImages:
    """What each of R replicas reads of one task's images.

    Attributes:
      n: the number of images of each.
    """

    def __init__(self, images: TaskImages, places: Sequence[np.ndarray]):
        """Names each one's images.

        Args:
          images: all that any of them reads.
          places: int [n] for each replica: where among them its own lie.
        """
        self._images, self._places = images, np.stack(places).astype(np.int32)
        self.n = self._places.shape[1]

    def fetch(self, batches: np.ndarray, rows: int = 0) -> tuple[Images, Images]:
        """See :meth:`TaskImages.fetch`; int32 [steps, R, B], indices into each one's images."""
        return self._images.fetch(self._placed(batches), rows)

    def prefetch(self, batches: np.ndarray) -> None:
        """See :meth:`TaskImages.prefetch`."""
        self._images.prefetch(self._placed(batches))

    def of(self, replica: int) -> Callable[[np.ndarray], Images]:
        """:meth:`TaskImages.take` of one replica's images."""
        places = self._places[replica]
        return lambda indices: self._images.take(places[np.asarray(indices, np.int32)])

    def _placed(self, batches: np.ndarray) -> np.ndarray:
        return self._places[np.arange(len(self._places))[None, :, None], batches]


@compiled()
def _take(pool: tuple[jax.Array, jax.Array], batches: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, labels = pool
    return images[batches], labels[batches]


class TrainingStream:
    """Hands out the training images of one task after the other.

    Never those of an earlier one, unless it is told not to forget.
    """

    def __init__(
        self,
        source: Source,
        schedule: Schedule,
        in_memory: bool,
        mesh: Mesh | None = None,
        forgets: bool = True,
    ):
        """Indexes the training images by class.

        Args:
          source: the images; finished tasks are forgotten there too.
          schedule: the original ids of each task's classes.
          in_memory: whether a task's images are kept on the device.
          mesh: the devices a batch is split over.
          forgets: finished tasks' images. Without it, a task opens with those of all earlier ones.
        """
        labels = source.labels("train")
        self._forgets = forgets
        self._source = source
        self._schedule = schedule
        self._in_memory = in_memory
        self._mesh = mesh
        self._rows = {c: np.flatnonzero(labels == c) for task in schedule for c in task}
        self._counts = tuple(sum(len(self._rows[c]) for c in task) for task in schedule)
        self._current = 0
        self._open: TaskImages | None = None

    def counts(self) -> tuple[int, ...]:
        """The number of training images of every task."""
        return self._counts

    def class_counts(self) -> dict[int, int]:
        """The number of training images of every class of the schedule that is not forgotten."""
        return {c: len(rows) for c, rows in self._rows.items()}

    def available(self, task: int) -> int:
        """The number of training images that a task opens with."""
        return self._counts[task] if self._forgets else sum(self._counts[: task + 1])

    def open(self, task: int) -> TaskImages:
        """Opens a task, closes the one open before, and forgets the images of all earlier ones.

        Raises:
          RuntimeError: the task lies before the current one.
        """
        if task < self._current:
            raise RuntimeError(
                f"task {task} is over (task {self._current} is open): its images are gone"
            )
        classes = self._schedule[task]
        if self._open:
            self._open.close()
        first_label = sum(len(earlier) for earlier in self._schedule[:task])
        if self._forgets:
            for finished in self._schedule[self._current : task]:
                for c in finished:
                    self._source.forget(self._rows.pop(c))
        else:
            first_label, classes = 0, tuple(c for t in self._schedule[: task + 1] for c in t)
        self._current = task
        rows = [self._rows[c] for c in classes]
        self._open = TaskImages(
            self._source, classes, first_label, rows, self._in_memory, self._mesh
        )
        return self._open


class TestImages:
    """The test images of every task: for evaluation only, so none is ever forgotten."""

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, source: Source, schedule: Schedule):
        """Reads nothing yet.

        Args:
          source: the images.
          schedule: the original ids of each task's classes.
        """
        self._source = source
        self._schedule = schedule
        self._labels = source.labels("test")
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def counts(self) -> list[int]:
        """The number of test images of every task."""
        return [int(np.isin(self._labels, classes).sum()) for classes in self._schedule]

    def task(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        """The test images of one task's classes, read at the first call.

        Returns:
          uint8 [n, S, S, C] images, and int32 [n] labels: positions in the head.
        """
        if task not in self._cache:
            first = sum(len(earlier) for earlier in self._schedule[:task])
            rows = [np.flatnonzero(self._labels == c) for c in self._schedule[task]]
            positions = np.arange(first, first + len(rows), dtype=np.int32)
            labels = np.repeat(positions, [len(r) for r in rows])
            self._cache[task] = self._source.read("test", np.concatenate(rows)), labels
        return self._cache[task]


def epoch_batches(
    seed: int, task: int, phase: int, start: int, stop: int, n: int, batch: int
) -> np.ndarray:
    """The index batches of steps start..stop-1, whichever steps were asked for before.

    An epoch is n // batch steps of a permutation that (seed, task, phase, epoch) determine; the
    n % batch images at its end wait for another epoch.

    Args:
      seed: the run's seed.
      task: the task.
      phase: a number for the phase of training.
      start: first step.
      stop: the step after the last.
      n: images of the task.
      batch: B, images a step; at most n.

    Returns:
      int32 [stop - start, B], indices in 0..n-1.

    Raises:
      ValueError: n images do not fill a batch.
    """
    steps = n // batch
    if steps < 1:
        raise ValueError(f"{n} images do not fill a batch of {batch}")
    batches = np.empty((stop - start, batch), np.int32)
    for row, step in enumerate(range(start, stop)):
        epoch, place = divmod(step, steps)
        order = _permutation(seed, task, phase, epoch, n)
        batches[row] = order[place * batch : (place + 1) * batch]
    return batches


def filled(tree: Any, rows: int) -> Any:
    """Arrays [n, ...] with zeros behind, so that they have at least this many rows."""

    def fill(array: np.ndarray) -> np.ndarray:
        if rows <= len(array):
            return array
        return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])

    return jax.tree.map(fill, tree)


def ordered_batches(start: int, stop: int, n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """The index batches of steps start..stop-1 of one pass over all images, in order.

    Returns:
      int32 [stop - start, B] indices, and bool [stop - start, B]: False where the last batch is
      filled up.
    """
    places = np.arange(start * batch, stop * batch, dtype=np.int32).reshape(-1, batch)
    return np.minimum(places, n - 1), places < n


@functools.lru_cache(maxsize=64)  # one a replica is in use
def _permutation(seed: int, task: int, phase: int, epoch: int, n: int) -> np.ndarray:
    # The legacy generator: the only one whose numbers numpy promises never to change.
    return np.random.RandomState([seed % 2**32, task, phase, epoch]).permutation(n)
