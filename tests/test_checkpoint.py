import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skd_jax.checkpoint import Checkpoints, Damaged
from skd_jax.errors import UserError


@flax.struct.dataclass
class Net:
    params: Any
    optimiser: Any
    step: Any
    exemplars: Any = None


def make_state(features: int = 4) -> dict[str, Net | None]:
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, features))},
        "half": jnp.array([0.1, np.nan, -0.0], jnp.bfloat16),
    }
    optimiser = optax.chain(
        optax.add_decayed_weights(1e-4),  # an EmptyState
        optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.1}), momentum=0.9),
    )
    adam = optax.adam(1e-3).init(params)
    return {
        "teacher": Net(params, optimiser.init(params), jnp.int32(7)),
        "delegator": Net({"mask": jnp.array([True, False])}, adam, jnp.int32(2**31 - 1)),
        "student": None,
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_gives_the_same_bits_and_structure(tmp_path):
    state = make_state()
    meta = {"task": 1, "phase": "delegator", "rows": [[1, 2]], "digest": None}
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(5, state, meta)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.steps() == [5]
        found = checkpoints.read(5)
    assert found.meta == meta
    restored = found.into(shapes(state))
    assert_same_bits(restored, state)
    assert all(isinstance(x, jax.Array) and not x.committed for x in jax.tree.leaves(restored))


def test_arrays_may_be_donated_right_after_save(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def overwrite(x):
        return x - 8

    x = jnp.ones((1000, 1000))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        overwrite(x).block_until_ready()
        restored = checkpoints.read(1).into({"x": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    assert (restored["x"] == 1).all()
    overwrite(restored["x"])


def test_nothing_is_written_before_the_first_save(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    with Checkpoints(directory, keep=1) as checkpoints:
        assert checkpoints.steps() == []
        with pytest.raises(Damaged, match="no such folder"):
            checkpoints.read(3)
        checkpoints.wait()
    assert not list(tmp_path.iterdir())


def test_keeps_the_newest_and_refuses_an_older_step(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.int32(step)}, {"step": step})
        checkpoints.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
        assert checkpoints.read(2).meta == {"step": 2}
        for step in (2, 3):
            with pytest.raises(ValueError, match="not newer"):
                checkpoints.save(step, {"x": jnp.int32(0)}, {})
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: make_state(5), r"kernel is float32\[3, 4\] in it but float32\[3, 5\] here"),
        (
            lambda s: s | {"teacher": s["teacher"].replace(step=jnp.float32(7))},
            r"teacher.step is int32\[\] in it but float32\[\] here",
        ),
        (
            lambda s: s | {"student": s["delegator"]},
            r"student.params.mask is absent in it but bool\[2\] here",
        ),
        (
            lambda s: s | {"delegator": None},
            r"delegator.optimiser.0.count is int32\[\] in it but absent here",
        ),
    ],
)
def test_a_template_that_differs_is_named(tmp_path, change, message):
    state = make_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(UserError, match=message):
            checkpoints.read(1).into(change(state))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2, and the state of 2."""
    folder, state = tmp_path_factory.mktemp("saved"), make_state()
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state, {"a": 1})
        checkpoints.save(2, state, {"a": 2})
    return folder, state


def read_all(folder: Path) -> list[str]:
    """What became of each step, newest first."""
    found = []
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in checkpoints.steps():
            try:
                assert checkpoints.read(step).meta == {"a": step}
                found.append("sound")
            except Damaged as error:
                assert str(error)
                found.append("damaged")
    return found


def test_without_half_a_file_or_all_of_it_the_bits_are_the_same_or_it_is_found_out(saved, tmp_path):
    """Some files are Orbax's own notes, which may be lost."""
    folder, state = saved
    outcomes = {"sound": 0, "damaged": 0}
    for number, name in enumerate(sorted(files(folder / "2"))):
        size = (folder / "2" / name).stat().st_size
        for harm in ("truncated", "missing"):
            copy = shutil.copytree(folder, tmp_path / f"{number}{harm}")
            if harm == "missing":
                (copy / "2" / name).unlink()
            else:
                os.truncate(copy / "2" / name, size // 2)
            newest, before = read_all(copy)
            assert before == "sound"
            outcomes[newest] += 1
            if newest == "sound":
                with Checkpoints(copy, keep=2) as checkpoints:
                    assert_same_bits(checkpoints.read(2).into(shapes(state)), state)
    assert min(outcomes.values()) > 5


def test_one_flipped_bit_anywhere_gives_the_same_bits_or_is_found_out(saved, tmp_path):
    folder, state = saved
    random, outcomes = np.random.default_rng(0), {"same": 0, "damaged": 0}
    names = sorted(name for name, content in files(folder / "2").items() if content)
    for name in names:
        content = (folder / "2" / name).read_bytes()
        for _ in range(12):
            flip(folder / "2" / name, random.integers(len(content)), random.integers(8))
            with Checkpoints(folder, keep=2) as checkpoints:
                try:
                    found = checkpoints.read(2)
                    assert found.meta == {"a": 2}
                    assert_same_bits(found.into(shapes(state)), state)
                    outcomes["same"] += 1
                except Damaged:
                    outcomes["damaged"] += 1
            (folder / "2" / name).write_bytes(content)
    assert min(outcomes.values()) > 20
    assert read_all(folder) == ["sound", "sound"]


@pytest.mark.parametrize("item", ["", "meta", "state"])
def test_an_empty_folder_or_a_missing_item_is_found_out(saved, tmp_path, item):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    shutil.rmtree(copy / "2" / item)
    if not item:
        (copy / "2").mkdir()
    assert read_all(copy) == ["damaged", "sound"]


def test_a_checkpoint_under_another_number_is_found_out(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    (copy / "2").rename(copy / "7")
    assert read_all(copy) == ["damaged", "sound"]


def test_what_is_set_aside_is_kept_and_out_of_the_way(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "checkpoints")
    before = files(copy / "2")
    with Checkpoints(copy, keep=2) as checkpoints:
        assert checkpoints.set_aside(2) == tmp_path / "checkpoints_damaged" / "2"
        checkpoints.save(2, {"x": jnp.int32(3)}, {"a": 2})
        assert checkpoints.read(2).into({"x": jnp.int32(0)}) == {"x": 3}
        assert checkpoints.set_aside(2) == tmp_path / "checkpoints_damaged" / "2_2"
        assert checkpoints.steps() == [1]
    assert files(tmp_path / "checkpoints_damaged" / "2") == before


def test_a_save_that_fails_says_so_and_leaves_the_others(tmp_path):
    """Every write that would make a file longer than 64 KiB fails, as on a full disk."""
    code = f"""
import resource, signal
import numpy as np
from skd_jax.checkpoint import Checkpoints
from skd_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints({str(tmp_path)!r}, keep=2)
checkpoints.save(1, {{"x": np.ones(8)}}, {{"a": 1}})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).bytes(1 << 20)
try:
    checkpoints.save(2, {{"x": np.frombuffer(noise, np.uint8)}}, {{"a": 2}})
    checkpoints.wait()
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot save checkpoint {tmp_path / '2'} (")
    assert len(done.stdout.splitlines()) == 1
    assert read_all(tmp_path) == ["sound"]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(2, {"x": np.ones(8)}, {"a": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module in (pickle, np.lib._format_impl.pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    folder, state = saved
    with Checkpoints(folder, keep=2) as checkpoints:
        assert_same_bits(checkpoints.read(2).into(shapes(state)), state)


def test_orbax_is_quiet(tmp_path, caplog):
    with caplog.at_level(logging.INFO), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(10)}, {})
        checkpoints.wait()
        checkpoints.read(1).into({"x": jnp.arange(10)})
    assert not [r for r in caplog.records if "orbax" in r.pathname]


def test_what_cannot_be_read_just_now_is_not_called_damaged():
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # pytest's own folders are closed to others
        checkpoints = Checkpoints(Path(name) / "run", keep=2)
        checkpoints.save(1, {"x": np.ones(8)}, {"a": 1})
        checkpoints.close()
        for path in (Path(name) / "run" / "1" / "state").rglob("d/*"):
            path.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"cannot read checkpoint .*/run/1 .*PERMISSION"):
                checkpoints.read(1)
        finally:
            os.seteuid(0)


def test_a_failed_save_is_told_once(tmp_path, monkeypatch):
    """Orbax raises the same once more when it is closed."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    for told in (True, False):
        checkpoints = Checkpoints(tmp_path / str(told), 2)
        checkpoints.save(1, {"a": jnp.zeros(2)}, {})
        checkpoints.wait()
        opened = checkpoints._opened
        if told:
            checkpoints.save(2, {"a": jnp.zeros(2)}, {})
            with monkeypatch.context() as patch:
                patch.setattr(opened, "wait_until_finished", fail)
                with pytest.raises(UserError, match="No space left"):
                    checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(opened, "close", fail)
            with nullcontext() if told else pytest.raises(OSError, match="No space left"):
                checkpoints.close()
        opened.close()
