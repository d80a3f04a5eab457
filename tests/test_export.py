"""The exported function: alone in a process, it gives what the model gives."""

import dataclasses
import subprocess
import sys

import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from test_files import full_disk

from skd_jax import export
from skd_jax.errors import UserError
from skd_jax.methods import ncm
from skd_jax.model import Model

# Nothing of this package can be imported where this runs, whatever is installed.
ALONE = """
import sys


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("skd_jax", "configs", "flax", "ml_collections"):
            raise ImportError(name)


sys.meta_path.insert(0, Nothing())
flatbuffers, file, images, out = sys.argv[1:]
sys.path.append(flatbuffers)
import jax.export
import numpy as np

exported = jax.export.deserialize(bytearray(open(file, "rb").read()))
images = np.load(images)
np.savez(out, *[exported.call(images[:n]) for n in (3, 8)])
assert not [name for name in sys.modules if name.partition(".")[0] in ("skd_jax", "flax")]
"""


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)


def test_it_runs_where_there_is_nothing_of_ours(small_model, images, tmp_path):
    import flatbuffers

    export.write_export(small_model, tmp_path / "model.stablehlo")
    np.save(tmp_path / "images.npy", images)
    site = str(flatbuffers.__path__[0]).removesuffix("flatbuffers")
    arguments = [site, "model.stablehlo", "images.npy", "scores.npz"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = np.asarray(small_model.scores(images))
    with np.load(tmp_path / "scores.npz") as found:
        assert found["arr_0"].dtype == np.float32
        np.testing.assert_allclose(found["arr_0"], expected[:3], atol=1e-5)
        np.testing.assert_allclose(found["arr_1"], expected, atol=1e-5)
    names = (tmp_path / "labels.txt").read_text("utf-8").splitlines()
    assert tuple(names) == small_model.class_names


def test_one_file_serves_all_platforms_and_batches(small_model):
    found = jax.export.deserialize(bytearray(small_model.export()))
    assert found.platforms == ("cpu", "cuda", "rocm", "tpu")
    assert str(found.in_avals[0]) == "uint8[b,8,8,1]"
    assert str(found.out_avals[0]) == "float32[b,4]"


def test_the_centre_is_cut_out_and_the_rule_is_the_methods_own(small_model, images):
    """Of means, and of images that are stored larger than the network takes them."""
    config, classifier = small_model.config, small_model.kept.classifier
    data = dataclasses.replace(config.data, image_size=6)
    means = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
    kept = ncm.KeptMeans(classifier, means)
    config = dataclasses.replace(config, data=data, method=ncm.Settings(rule="distance"))
    model = Model(config, kept, tuple("abcde"))
    found = jax.export.deserialize(bytearray(model.export())).call(images)
    np.testing.assert_allclose(found, model.scores(images), atol=1e-5)
    harmless = images.copy()
    harmless[:, [0, -1]] = 0  # outside of the centre
    np.testing.assert_array_equal(model.scores(harmless), model.scores(images))


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(small_model, tmp_path, monkeypatch):
    place = tmp_path / "model.stablehlo"
    monkeypatch.setattr(export, "export", lambda model: b"content")
    place.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export.write_export(small_model, place)
    assert place.read_text() == "mine"
    place.unlink()
    (tmp_path / "labels.txt").write_text("others\n")
    with pytest.raises(UserError, match="other class names"):
        export.write_export(small_model, place)
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(UserError, match="no such folder"):
        export.write_export(small_model, tmp_path / "nowhere" / "x")
    broken = dataclasses.replace(small_model, class_names=("a", "b\nc", "d", "e"))
    with pytest.raises(UserError, match="line break"):
        export.write_export(broken, place)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot be written \(full\); name another place"):
        export.write_export(small_model, place)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(export, "export", lambda model: b"content")
    export.write_export(small_model, place)
    export.write_export(small_model, tmp_path / "again")  # beside the same labels
    assert {file.name for file in tmp_path.iterdir()} == {place.name, "again", "labels.txt"}
