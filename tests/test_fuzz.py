"""Malformed input, at random: a plain line or the right result, never a hang or a lost file."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from test_command_line import parse
from test_train import LAST, finished_run, snapshot

from configs import digits
from skd_jax import train
from skd_jax.checkpoint import _digest_json
from skd_jax.config import Config, to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import Experiment
from skd_jax.loop import no_images
from skd_jax.measured import scalars
from skd_jax.methods import from_config_dict

# Instead of .hypothesis here; conftest.py removes it.
set_hypothesis_home_dir(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "hypothesis")

pytestmark = [
    pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning"),  # of long examples
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),  # Python's, of a value such as 1if
]


@pytest.fixture(autouse=True)
def in_repository(repo, monkeypatch):
    monkeypatch.chdir(repo)


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """How many mutations: 10,000 in all of this file where it is many."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


def mutations(number: int, *phases: Phase) -> settings:
    """The same ones every time, and nothing kept between two runs."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )


def assert_plain(message: str) -> None:
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000, message
    assert "Traceback" not in message and " object at 0x" not in message, message


class Hang(BaseException):
    """No Exception: one of those would be taken for a damaged checkpoint."""


@contextlib.contextmanager
def time_limit(seconds: int = 60) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Names and values

# What a command line can hold: no NUL, and bytes that are no UTF-8 as lone surrogates.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.sampled_from(
    ["", " ", "\n", "a\nb", "\r", "\x1b[31m", "\u2028", "\udcff", "٣", "☃", "'", '"', "x" * 5000]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([*range(-1, 6), 1.0, 2.5, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PLACES = st.integers(0, 2**20)  # taken modulo how many there are


def mostly(usual: st.SearchStrategy, *others: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 5).flatmap(lambda n: usual if n < 5 else st.one_of(others))


def nodes(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all that a tree of dictionaries and lists holds, its own first."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from nodes(value, (*path, key))


# Command lines

FIELDS = sorted(
    ".".join(path)
    for path in nodes(to_dict(from_config_dict(digits.get_config())))
    if path and isinstance(path[-1], str)
)
ODD_NAMES = [
    *("", ".", "..", "a b", "__class__", "keys", "lock", "to_dict", "items", "base.keys", "seed.x"),
    *("base.__class__", "base.lr.real", "seed[0]", "['seed']", "base['lr']", "base[lr]", "a=b"),
    *(
        "base.drop_epochs[0]",
        "data.mean[7]",
        "data.mean[-1]",
        "method.stage_one.terms.x",
        "base.lr.lr",
    ),
    *(
        "method.stage_one.terms['a b']",
        "base[:]",
        "lambda",
        "1",
        "base.1",
        "x" * 5000,
        "a.b.c.d.e.f",
    ),
]
SOUND_VALUES = [*"12348", "0.5", "1e-3", "True", "False", "(1, 2)", "(8, 8)", "(0.5,)", "all"]
ODD_VALUES = [
    *("nan", "inf", "-inf", "1e999", "-1", "1.5", "1_000", "0b1", "٣", "1" + "0" * 400, "9" * 5000),
    *("0x" + "f" * 5000, "-0x" + "f" * 5000, "(0x" + "f" * 5000 + ",)", "(1" + "0" * 400 + ",)"),
    *("(" * 10000, "[" * 10000, "-" * 10000 + "1", "(" + "8, " * 10000 + ")", "(8," * 50, "..."),
    *("()", "(1,", "('a', 2)", "((1,),)", "(nan,)", "(1e999,)", "(1,) * 3", "''", "b'a'", "None"),
    *("{}", "{'a': 1}", "{1: 2}", "{'a': {'b': 1}}", "{'a': 1" + "0" * 400 + "}", "[1]", "abc"),
]
WORDS = st.sampled_from(SOUND_VALUES) | st.one_of(
    st.sampled_from(ODD_VALUES), VALUES.map(repr), NUMBERS.map(str), TEXT
)
OTHER_ARGUMENTS = [
    *("--workdir", "--workdir=", "--distributed=perhaps", "--distributed", "--processes=x"),
    *("--process=-1", "--coordinator=", "--config", "--config=", "--noconfig", "--noworkdir"),
    *("--confg=configs/digits.py", "--flagfile=nowhere", "--undefok=a", "--verbosity=x", "--v=1"),
    *("--", "-", "---", "--=", "--=1", "--no", "--\n=1", "now", ""),
]


@st.composite
def config_file(draw: st.DrawFn) -> list[str]:
    file = draw(st.sampled_from(["digits.py", "cifar100.py", "common.py", "nowhere.py", ""]))
    before = draw(st.sampled_from(["", ":", ":tasks=", ":tasks=2,", ":scale=", "::"]))
    return [f"--config=configs/{file}{before}{draw(WORDS) if before else ''}"]


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    name, place = draw(st.sampled_from(FIELDS)), draw(st.integers(0, 20))
    return name[:place] + draw(TEXT) + name[place + draw(st.integers(0, 2)) :]


@st.composite
def override(draw: st.DrawFn) -> list[str]:
    name = draw(mostly(st.sampled_from(FIELDS), misspelt(), st.sampled_from(ODD_NAMES), TEXT))
    value = draw(WORDS)
    usual, *others = (
        [f"--config.{name}={value}"],
        [f"-config.{name}={value}"],
        [f"--config.{name}", value],
        [f"--config.{name}"],
        [f"--noconfig.{name}"],
    )
    return draw(mostly(st.just(usual), st.sampled_from(others)))


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """A config and a workdir, and more or less after them."""
    other = st.sampled_from(OTHER_ARGUMENTS) | TEXT | st.builds("--{}={}".format, TEXT, TEXT)
    parts = [
        draw(mostly(st.just(["--config=configs/digits.py"]), config_file())),
        ["--workdir=w"],
        *draw(st.lists(mostly(override(), other.map(lambda arg: [arg])), min_size=1, max_size=3)),
    ]
    order = draw(mostly(st.just(parts), st.permutations(parts)))
    return [arg for part in order for arg in part]


@few_or_many(300, 9000)
def test_command_lines(number):
    found = Counter()

    @mutations(number, Phase.generate, Phase.shrink)
    @given(commands())
    def check(args):
        try:
            with time_limit():
                config, _ = parse(*args)
        except UserError as error:
            assert_plain(str(error))
            found["refused"] += 1
        else:
            assert isinstance(config, Config)
            found["accepted"] += 1

    check()
    assert found.total() >= number
    assert min(found["accepted"], found["refused"]) > number / 10


# What a run has written


class Started(BaseException):
    """The run was accepted, and would train on."""


IMAGES = {f"{label}/{n}.png": [64, n] for label in "ab" for n in range(3)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A finished run; a start of it opens no data and never trains."""
    finished = finished_run(tmp_path_factory)
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(finished.workdir, folder / "sound")
    (folder / "sound" / "files.json").write_text(json.dumps(IMAGES))
    experiment = train.open_experiment(finished.config)
    data = experiment.data()

    def shapes_of(phase: Any) -> Any:
        left = quick(lambda state, kept: phase.finish(state, kept, no_images))

        finish = lambda state, kept, take: left(state, kept)  # noqa: E731
        return dataclasses.replace(phase, init=quick(phase.init), finish=finish)

    phases = [shapes_of(phase) for phase in experiment.phases]
    experiment = dataclasses.replace(experiment, phases=phases)

    def would_train(self: Any, phase: Any, images: Any) -> None:
        at = self.at
        assert type(at.phase) is int and type(at.step) is int
        assert at.phase >= 0 and 0 <= at.step <= phase.steps
        # What training does with the rest.
        for replica, steps in zip(self.replicas, at.window.each(), strict=True):
            scalars(steps)
            replica.measured.count_skipped(np.ones(1), "", 1, 10)
            replica.measured.add_seconds(phase.name, 0.0)
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_experiment", lambda config, given: experiment)
        patch.setattr(Experiment, "files", lambda self: IMAGES)  # as if from a folder of images
        patch.setattr(Experiment, "data", lambda self: data)
        patch.setattr(train.Run, "_train", would_train)
        yield SimpleNamespace(
            sound=folder / "sound",
            workdir=folder / "run",
            config=finished.config,
            summary=finished.summary,
        )


def quick(function: Callable) -> Callable:
    """A function of the same shapes that takes no time to trace; checkpoints need no more."""
    seen: dict[str, Any] = {}

    def call(*args: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        if str(shapes) not in seen:
            seen[str(shapes)] = jax.eval_shape(function, *shapes)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), seen[str(shapes)])

    return call


def outcome(run: SimpleNamespace, harm: Callable[[Path], None]) -> dict | str:
    """Starts a harmed copy of the run: its summary, "refused", or "started" to train on."""
    shutil.rmtree(run.workdir, ignore_errors=True)
    shutil.copytree(run.sound, run.workdir)
    harm(run.workdir)
    before, said = snapshot(run.workdir), []
    try:
        with time_limit():
            return train.train(run.config, run.workdir, said.append)
    except UserError as error:
        assert_plain(str(error))
        return "refused"
    except Started:
        return "started"
    finally:
        assert_nothing_lost(before, snapshot(run.workdir))
        for line in said:
            if line.startswith("warning"):
                assert_plain(line)


def assert_nothing_lost(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Checkpoints may move, but stay what they are; any other file is still there."""

    def contents(files: dict[str, bytes]) -> Counter[bytes]:
        return Counter(files[name] for name in files if name.startswith("checkpoints"))

    assert not contents(before) - contents(after)
    assert {name for name in before if not name.startswith("checkpoints")} <= after.keys()


DEEP = [f"{a * n}1{b * n}" for a, b in ("[]", ('{"a":', "}")) for n in (100, 900, 990, 5000, 10000)]
ODD_JSON = [
    *("", " ", "{", "[]", "{}", "null", "NaN", "1e999", '""', '"\\ud800"', "9" * 5000, "\0" * 99),
    *('{"a": NaN}', "[{}]", '{"seed": "a\\nb"}', '{"global_step": null}', '{"global_step": 1e999}'),
]
CONTENTS = st.binary(max_size=40) | st.sampled_from([text.encode() for text in DEEP + ODD_JSON])


@dataclasses.dataclass(frozen=True)
class Change:
    """One change to a file's content."""

    how: str
    place: int
    data: bytes
    value: Any

    def __call__(self, content: bytes) -> bytes:
        place = self.place % (len(content) + 1)
        before, after = content[:place], content[place:]
        match self.how:
            case "flip":
                return before + bytes(byte ^ 1 << self.place % 8 for byte in after[:1]) + after[1:]
            case "cut":
                return before
            case "insert":
                return before + self.data + after
            case "overwrite":
                return before + self.data + after[len(self.data) :]
            case "replace":
                return self.data
        with contextlib.suppress(ValueError, RecursionError):  # a JSON file, unless harmed already
            return self._grafted(content)
        lines = content.splitlines() or [b""]
        with contextlib.suppress(ValueError, RecursionError):
            lines[place % len(lines)] = self._grafted(lines[place % len(lines)])
        return b"\n".join(lines)

    def _grafted(self, content: bytes) -> bytes:
        return json.dumps(graft(json.loads(content), self.place, self.value)).encode()


def graft(tree: Any, place: int, value: Any) -> Any:
    """Puts ``value`` somewhere in a tree, or moves or removes what is there."""
    paths = list(nodes(tree))
    path = paths[place // 7 % len(paths)]
    if not path:
        return value
    *way, last = path
    parent = tree
    for key in way:
        parent = parent[key]
    match place % 7:
        case 0:
            del parent[last]
        case 1 if isinstance(parent, dict):
            parent[str(value)] = parent.pop(last)
        case 2:
            parent[last] = [parent[last]]
        case _:
            parent[last] = value
    return tree


KINDS = ["flip", "cut", "insert", "overwrite", "replace", "graft", "graft"]
CHANGES = st.builds(Change, st.sampled_from(KINDS), PLACES, CONTENTS, VALUES)


@few_or_many(20, 400)
def test_files_of_a_run(run, number):
    found = Counter()
    names = st.sampled_from(["summary.json", "config.json", "metrics.jsonl", "files.json"])

    @mutations(number, Phase.generate)
    @given(
        st.lists(st.tuples(names, mostly(CHANGES, st.none())), min_size=1, max_size=3),
        st.booleans(),
    )
    def check(changes, finished):
        def harm(workdir):
            for name, change in changes:
                file = workdir / name
                if change is None:
                    file.unlink(missing_ok=True)
                elif file.exists():
                    file.write_bytes(change(file.read_bytes()))
            if not finished:
                shutil.rmtree(workdir / "checkpoints" / str(LAST))

        result = outcome(run, harm)
        if isinstance(result, dict):
            result["device"] = run.summary["device"]  # the run may have ended on another
        assert result in ("refused", run.summary if finished else "started")
        found[str(result)] += 1

    check()
    assert found.total() >= number
    assert len(found) >= 2


# No "orbax-checkpoint-tmp" among them: what a killed save has left is cleared away.
STRAYS = [
    *("7", "21", "20_2", "007", "020", "-1", "1e3", "9" * 21, "٣", "٣٠", "²", "meta", ".writable")
]
PLACES_OF_STRAYS = ["checkpoints", "checkpoints/19", "checkpoints/20", "checkpoints_damaged", "."]


@few_or_many(20, 300)
def test_checkpoints(run, number):
    found = Counter()

    def inside(workdir: Path, step: str) -> list[Path]:
        """All files and folders of a checkpoint, those of random names by their size."""
        paths = (workdir / "checkpoints" / step).rglob("*")
        return sorted(paths, key=lambda path: (path.parent, path.stat().st_size, path.name))

    def harm_one(workdir: Path, how: str, step: str, one: int, two: int, change: Change) -> None:
        folder, paths = workdir / "checkpoints" / step, inside(workdir, step)
        where = workdir / PLACES_OF_STRAYS[one % len(PLACES_OF_STRAYS)]
        stray = where / STRAYS[two % len(STRAYS)]
        files = [path for path in paths if path.is_file()]
        if how == "change" and files:
            file = files[one % len(files)]
            file.write_bytes(change(file.read_bytes()))
        elif how == "remove" and paths:
            path = paths[one % len(paths)]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif how == "swap" and files:
            file, other = files[one % len(files)], files[two % len(files)]
            content = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        elif stray.exists() or where.is_file():
            return
        elif how == "stray file":
            where.mkdir(exist_ok=True)
            stray.write_bytes(change.data)
        elif how == "stray folder":
            stray.mkdir(parents=True)
            (stray / "file").write_bytes(change.data)
        elif how == "copy" and folder.exists():
            shutil.copytree(folder, stray)
        elif how == "file for a folder" and not where.exists():
            where.write_bytes(change.data)

    others = ["remove", "swap", "stray file", "stray folder", "copy", "file for a folder"]
    hows = st.sampled_from(["change"] * 6 + others)
    harms = st.tuples(hows, st.sampled_from([str(LAST - 2), str(LAST)]), PLACES, PLACES, CHANGES)

    @mutations(number, Phase.generate)
    @given(st.lists(harms, min_size=1, max_size=4))
    def check(harms):
        def harm(workdir):
            for how, step, one, two, change in harms:
                harm_one(workdir, how, step, one, two, change)

        result = outcome(run, harm)
        assert result in ("refused", "started", run.summary)
        found[str(result)] += 1

    check()
    assert found.total() >= number
    assert len(found) >= 2


@few_or_many(20, 300)
def test_strangers_checkpoints(run, number):
    """They agree with their digests, but mean nothing."""
    found = Counter()
    parts = st.sampled_from(["phase", "step", "window", "measured", "measured", "data", "config"])

    @mutations(number, Phase.generate)
    @given(
        st.lists(st.tuples(mostly(parts, st.none()), PLACES, VALUES), min_size=1, max_size=2),
        st.sampled_from([str(LAST - 2), str(LAST)]),
        st.booleans(),
    )
    def check(grafts, step, reported):
        def harm(workdir):
            file = workdir / "checkpoints" / step / "meta" / "metadata"
            meta = json.loads(file.read_text())
            for part, place, value in grafts:
                saved = meta["meta"]
                if isinstance(saved, dict) and part in saved:
                    saved[part] = graft(saved[part], place, value)
                else:
                    meta["meta"] = graft(saved, place, value)
            meta["sha256"]["meta"] = _digest_json(meta["meta"])
            file.write_text(json.dumps(meta))
            if step == str(LAST - 2):
                shutil.rmtree(workdir / "checkpoints" / str(LAST))
            if not reported:
                (workdir / "summary.json").unlink()

        result = outcome(run, harm)
        assert result in ("refused", "started") or result.keys() == run.summary.keys()
        found["finished" if isinstance(result, dict) else result] += 1

    check()
    assert found.total() >= number
    assert found["refused"] > number / 4
