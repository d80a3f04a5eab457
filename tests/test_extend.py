"""Extending a trained model: what is refused, what is written, and that a stopped one goes on."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from test_files import full_disk

from skd_jax import cli, defaults, extending, loop, model_folder, train, weights
from skd_jax.data import prepare
from skd_jax.data.extended import extended_source
from skd_jax.errors import Interrupted, UserError
from skd_jax.methods.phases import features
from skd_jax.methods.skd.steps import latent
from skd_jax.model import Model, load
from skd_jax.state import Kept
from skd_jax.steps import eval_mode

TINY = {
    "method.stage_one.epochs": 1,
    "method.stage_one.drop_every": 1,
    "method.stage_one.rounds_per_epoch": 2,
    "method.stage_one.imitate_steps": 1,
    "method.stage_one.batch": 8,
    "method.stage_two.epochs": 1,
    "run.quality_images": 8,
    "run.pseudo_images": 4,
}
FLAGS = ["--mean=0.305", "--std=0.376", "--image-size=8", "--fit=squash"]


def put(folder, count, seed=0, colour=False):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (9, 8, 3) if colour else (9, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_model):
    """A model as a person has it, and images of two new classes and of an old one."""
    folder = tmp_path_factory.mktemp("place")
    weights.write(
        folder / "old.safetensors",
        small_model.kept.classifier,
        weights.names_of(small_model.config.model),
    )
    (folder / "old_labels.txt").write_text("".join(f"{n}\n" for n in small_model.class_names))
    put(folder / "new" / "cow", 10, seed=1)
    put(folder / "new" / "bee", 10, seed=2)
    put(folder / "check" / "dog", 4, seed=3)
    return folder


def loaded(place):
    said = {"mean": (0.305,), "std": (0.376,), "image_size": 8, "fit": "squash"}
    return load(place / "old.safetensors", classes=place / "old_labels.txt", **said)


@pytest.fixture(scope="module")
def extended(place):
    changes = {**TINY, "base.batch": 8, "method.stage_two.batch": 8}
    out = place / "out"
    result = extending.extend(
        loaded(place), place / "new", out, check=place / "check", batch=8, changes=changes
    )
    return out, result


def test_a_model_that_knows_both_is_written(place, extended):
    out, result = extended
    old, new = load_file(place / "old.safetensors"), load_file(out / "model.safetensors")
    assert list(old) == list(new)  # the names that it came with
    assert new["fc.weight"].shape == (6, 8) and old["fc.weight"].shape == (4, 8)
    assert all(old[n].shape == new[n].shape for n in old if not n.startswith("fc."))
    assert (out / "labels.txt").read_text().splitlines() == [
        "cat",
        "dog",
        "größe",
        'a, "b"',
        "bee",
        "cow",
    ]
    again = load(out)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(again.scores(images), result.model.scores(images), rtol=1e-6)
    exported = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(exported.call(images), again.scores(images), atol=1e-5)
    drawn, kept = (m.kept.delegator.variables() for m in (again, result.model))
    assert jax.tree.all(jax.tree.map(np.array_equal, drawn, kept))


def test_what_became_of_it_is_told(extended):
    out, result = extended
    told = result.summary["extension"]
    agreement = told["agreement"]
    assert agreement["images"] == 1000
    assert sum(agreement[k] for k in ("same", "other_old", "called_new")) == pytest.approx(1)
    assert told["before"] is not None and set(told["after"]) == {"old", "new", "all"}
    assert set(told["recall"]) == {"dog", "bee", "cow"}
    assert json.loads((out / "summary.json").read_text())["extension"] == told
    page = (out / "report.html").read_text()
    assert "1x1 convolutions as shortcuts, a last ReLU, a linear head" in page
    assert "data:image/png;base64," in page and "größe" in page and "bee" in page
    assert not re.search(r"""(src|href)=(?!['"]data:)""", page)  # nothing is loaded from anywhere


def test_counts_of_the_new_model_are_those_of_its_predictions(place, extended):
    out, result = extended
    files = sorted((place / "check" / "dog").iterdir())
    found = [p.labels[0] == "dog" for p in load(out).predict(files)]
    assert result.summary["extension"]["after"]["old"] == np.mean(found)


def test_an_extended_model_is_extended_again(place, extended, tmp_path):
    out, _ = extended
    put(tmp_path / "newer" / "ant", 10, seed=4)
    changes = {**TINY, "method.stage_two.batch": 4}
    twice = extending.extend(out, tmp_path / "newer", tmp_path / "out", batch=4, changes=changes)
    assert twice.model.class_names == (*load(out).class_names, "ant")
    told = twice.summary["extension"]
    assert told["before"] is None  # no images to check with
    for road in ("after", "frozen"):  # and none of all classes, by which roads could be compared
        assert told[road]["old"] is told[road]["all"] is None and told[road]["new"] is not None
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"this model \(skd\)</th><td>-</td><td>[\d.]+ %</td><td>-</td>", page)
    assert "neither they nor all classes together were measured" in page
    assert "cannot be said without images of old classes: give <code>--check=folder/" in page
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.bias"].shape == (7,)


def test_a_stopped_extension_goes_on_to_the_same_bits(place, extended, tmp_path, monkeypatch):
    whole, out = extended[0], tmp_path / "out"
    call = {"check": place / "check", "batch": 8}
    call["changes"] = {**TINY, "base.batch": 8, "method.stage_two.batch": 8}

    def stopped(config, workdir, say, given):
        run = dataclasses.replace(config.run, phases=2)
        train.train(dataclasses.replace(config, run=run), workdir, say, given)
        raise Interrupted("stopped", 130)

    monkeypatch.setattr(extending, "train", stopped)
    with pytest.raises(Interrupted):
        extending.extend(loaded(place), place / "new", out, **call)
    assert not (out / "model.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"--out=.* holds a run with config.seed=0, not 1"):
        extending.extend(loaded(place), place / "new", out, seed=1, **call)
    other = dataclasses.replace(
        loaded(place), kept=Kept(jax.tree.map(lambda x: x + 1, loaded(place).kept.classifier))
    )
    with pytest.raises(UserError, match=r"--out=.* went on from another model"):
        extending.extend(other, place / "new", out, **call)
    extending.extend(loaded(place), place / "new", out, **call)
    for name in ("model.safetensors", "delegator.safetensors", "labels.txt", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_the_delegator_and_the_same_command_again(place, repo, tmp_path):
    sets = {**TINY, "method.stage_one.rounds_per_epoch": 300, "run.log_every": 1}
    command = [sys.executable, "-m", "skd_jax", "extend", *FLAGS, "--batch=8"]
    command += [f"--model={place / 'old.safetensors'}", f"--classes={place / 'old_labels.txt'}"]
    command += [f"--images={place / 'new'}", *(f"--set={name}={x}" for name, x in sets.items())]

    def begin(out):
        return subprocess.Popen(
            [*command, f"--out={out}"], cwd=repo, stderr=subprocess.PIPE, text=True
        )

    process, log = begin(tmp_path / "cut"), tmp_path / "cut" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    words = r"^stopped at task 0, delegator, round (\d+), .*goes on from there$"
    stopped = re.search(words, said, re.M)
    assert stopped and 5 <= int(stopped[1]) < 300
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line][-1] == stopped[0]
    for name in ("cut", "whole"):
        process = begin(tmp_path / name)
        assert process.communicate(timeout=400) and process.returncode == 0
    for name in ("model.safetensors", "delegator.safetensors", "labels.txt", "config.json"):
        cut, whole = (tmp_path / n / name for n in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes()


def test_one_that_ended_at_once_goes_on_and_so_does_one_from_elsewhere(
    place, tmp_path, monkeypatch
):
    out, call = tmp_path / "out", {"method": "finetune", "batch": 8, "effort": 0.01}
    call["changes"] = {"method.epochs": 1, "method.drop_epochs": ()}

    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_json", pressed)  # config.json is the first
    with pytest.raises(KeyboardInterrupt):
        extending.extend(loaded(place), place / "new", out, **call)
    assert {path.name for path in (out / "run").iterdir()} == {"lock", "checkpoints"}
    monkeypatch.undo()
    result = extending.extend(loaded(place), place / "new", out, **call)
    assert result.summary["method"] == "finetune"
    assert load(out).class_names == result.model.class_names
    monkeypatch.setattr(extending, "platform", lambda: "gpu")  # where training takes longer
    again = extending.extend(loaded(place), place / "new", out, **call)
    assert again.model.config == result.model.config
    with pytest.raises(UserError, match=r"holds a run with config.seed=0, not 1; give"):
        extending.extend(loaded(place), place / "new", out, seed=1, **call)


def test_what_an_early_end_leaves_is_no_extension(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert not extending.check_free(out)
    (out / "run").mkdir()
    (out / "run" / "lock").touch()
    assert not extending.check_free(out)
    (out / "run" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no extension that was begun"):
        extending.check_free(out)


def test_a_model_that_finds_no_room_asks_for_the_same_command(small_model, tmp_path, monkeypatch):
    """What was trained is there, and in another folder would be trained again."""
    monkeypatch.setattr("os.fsync", full_disk)
    again = r"\(full\); fix that .* run the same command again"
    with pytest.raises(UserError, match=again), extending._as_out(tmp_path):
        small_model.save(tmp_path)


def test_images_are_read_as_the_settings_say(place, tmp_path, monkeypatch):
    def opened(config, given):
        seen.extend((config, given.source))
        raise Interrupted("stopped", 130)

    seen = []
    monkeypatch.setattr(extending, "open_experiment", opened)
    changes = {"data.load_size": 10, "data.augment": "resized_crop", "data.fit": "crop"}
    changes |= {"data.interpolation": "nearest", "data.test_fraction": 0.4, "data.split_seed": 7}
    call = {"method": "finetune", "batch": 8, "changes": changes}
    with pytest.raises(Interrupted):
        extending.extend(loaded(place), place / "new", tmp_path / "out", **call)
    config, source = seen
    assert {name: getattr(config.data, name.removeprefix("data.")) for name in changes} == changes
    expected = extended_source(config.data, source.class_names[:4], place / "new", None)
    for split, count in (("train", 12), ("test", 8)):
        images = source.read(split, range(count))
        assert images.shape == (count, 10, 10, 1) and len(source.labels(split)) == count
        assert np.array_equal(images, expected.read(split, range(count)))


@pytest.mark.parametrize("method", ("lwf", "pseudo_ncm"))
def test_other_methods_that_need_nothing_but_the_model(place, tmp_path, method):
    tiny = {name: x for name, x in TINY.items() if "stage_one" in name}
    if method == "lwf":
        tiny = {"method.epochs": 1}
    result = extending.extend(
        loaded(place), place / "new", tmp_path / "out", method=method, batch=8, changes=tiny
    )
    assert load(tmp_path / "out").class_names == result.model.class_names
    assert result.summary["method"] == method


def test_means_of_pseudo_images_become_the_head(place, tmp_path):
    """Each column is the mean feature, at length 1, of what T_0 takes for the class."""
    tiny = {name: x for name, x in TINY.items() if "stage_one" in name}
    old = loaded(place)
    new = extending.extend(
        old, place / "new", tmp_path / "out", method="pseudo_ncm", batch=8, changes=tiny
    ).model
    nets, generator = new.nets, new.kept.delegator
    from skd_jax.methods.drawn import DRAWN, STEPS
    from skd_jax.methods.phase import phase_keys
    from skd_jax.methods.skd.phases import delegator_module

    _, key = phase_keys(0, 0, DRAWN)
    module = delegator_module(new.config)
    z = np.concatenate(
        [latent(jax.random.fold_in(key, i), np.arange(8), module.z_dim) for i in range(STEPS)]
    )
    pseudo = eval_mode(module, generator, z)
    classifier = old.kept.classifier
    found = np.asarray(features(nets, classifier, pseudo))
    labels = np.asarray(
        eval_mode(nets.classifier(classifier.params), classifier, pseudo)[1]
    ).argmax(1)
    kernel = np.asarray(new.kept.classifier.params["head"]["kernel"])
    for label in np.unique(labels):
        mean = found[labels == label].mean(axis=0)
        np.testing.assert_allclose(kernel[:, label], mean / np.linalg.norm(mean), atol=1e-5)
    files = sorted((place / "new" / "bee").iterdir())
    del files  # the new classes' means are ncm's, whose tests are its own
    assert kernel.shape == (8, 6) and not np.any(new.kept.classifier.params["head"]["bias"])


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Says what one line a command line ends with; nothing may be left behind."""

    def call(*changes, images=None, labels=None):
        out = tmp_path / "out"
        args = [f"--model={place / 'old.safetensors'}", f"--out={out}", *FLAGS]
        args += [f"--images={images or place / 'new'}"]
        args += [f"--classes={labels or place / 'old_labels.txt'}"]
        existed = out.exists()
        assert cli.run(["extend", *args, "--batch=8", *changes]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert out.exists() == existed
        return said

    return call


def test_wrong_numbers_of_labels(refused, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert "2 names for a model of 4 classes" in refused(labels=tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("cat\ndog\ncat\ncow\n")
    assert "'cat' names two classes" in refused(labels=tmp_path / "labels.txt")


def test_a_folder_that_cannot_be_learned_from(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--images" in refused(images=tmp_path / "empty")
    assert "--images" in refused(images=tmp_path / "none")
    put(tmp_path / "one" / "bee", 1)
    assert "one: 'bee' has one image" in refused(images=tmp_path / "one")
    put(tmp_path / "few" / "bee", 3)
    assert "images to learn from" in refused(images=tmp_path / "few")
    put(tmp_path / "known" / "dog", 12)
    assert "the model knows 'dog' already" in refused(images=tmp_path / "known")
    put(tmp_path / "coloured" / "bee", 12, colour=True)
    assert "is in colour" in refused(images=tmp_path / "coloured")
    put(tmp_path / "corrupt" / "bee", 12)
    (tmp_path / "corrupt" / "bee" / "3.png").write_bytes(b"no image")
    assert "3.png cannot be read as an image" in refused(images=tmp_path / "corrupt")


def test_grey_images_that_were_saved_in_colour_are_taken(place, tmp_path):
    folder = tmp_path / "new" / "bee"
    put(folder, 2)
    for file in folder.iterdir():
        Image.open(file).convert("RGB").save(file)
    source = extended_source(loaded(place).config.data, ("cat",), tmp_path / "new", None)
    assert source.class_names == ("cat", "bee")


def test_wrong_flags(refused, place, tmp_path):
    assert "--method=icarl" in refused("--method=icarl")
    assert "'cow' is no class of the model" in refused(f"--check={place / 'new'}").replace(
        "bee', '", ""
    )
    assert "config.method.stage_two.balance: unknown field" in refused(
        "--set=method.stage_two.balance=1"
    )
    assert "--effort" in refused("--effort=0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.png").touch()
    assert "exists, and holds no extension" in refused()


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    (
        ("run.phases", 2, "leave it out"),
        ("run.start_from", "runs/other", "leave it out"),
        ("run.replicas", 2, "one model is to come of it; leave it out"),
        ("data.exclude_classes", ("bee",), "the new classes are the folders of --images"),
        ("data.image_size", 16, "a flag beside it, such as --image-size"),
        ("data.tasks", 2, "learned all at once; leave it out"),
        ("data.held_out", 0.1, "images held out; leave it out"),
        ("data.test_fraction", 0.0, "give the share of them, such as 0.2"),
        ("data.fit", "magic", "choose from"),
        ("model.width", 4, "the model says what it is"),
        ("base.epochs", 4, "config.method says how it learns"),
        ("method.stage_one.finetune_epochs", 1, "as config.method.stage_one.epochs"),
    ),
)
def test_settings_that_mean_nothing_here_are_refused(refused, field, value, fix):
    said = refused(f"--set={field}={value!r}")
    assert f"config.{field}" in said and fix in said


def test_the_delegator_that_a_model_comes_with_stays(small_model, place, tmp_path):
    changes = {"method.delegator.z_dim": 5}
    with pytest.raises(UserError, match=r"config.method.delegator: the model comes with its"):
        extending.extend(small_model, place / "new", tmp_path / "out", batch=8, changes=changes)


def test_a_size_that_no_delegator_draws(refused, place, pictures):
    assert "--image-size=10" in refused("--image-size=9")
    said = {"classes": place / "old_labels.txt", "mean": (0.3,), "std": (0.4,), "image_size": 9}
    odd = load(place / "old.safetensors", **said)  # which need not draw
    assert len(odd.predict(pictures)) == 5
    for method in ("finetune", "lwf"):
        assert defaults.settings(odd.config.model, odd.config.data, method=method)
    with pytest.raises(UserError, match="image size 9: a delegator doubles images"):
        defaults.settings(odd.config.model, odd.config.data, method="pseudo_ncm")


def test_the_rate_of_a_single_epoch_does_not_drop_before_it(small_model):
    model, data = small_model.config.model, small_model.config.data
    base = defaults.settings(model, data, method="lwf", images=1000, effort=0.001).base
    assert (base.epochs, base.drop_epochs) == (1, ())


@pytest.mark.parametrize(
    ("size", "widths"),
    (
        *((8, (128, 128, 64)), (10, (128, 64)), (28, (128, 128, 64)), (32, (128, 128, 64))),
        *((64, (256, 256, 128, 64)), (84, (128, 128, 64)), (96, (256, 256, 128, 64))),
        *((100, (128, 128, 64)), (128, (512, 512, 256, 128, 64))),
        *((224, (512, 512, 256, 128, 64)), (240, (512, 512, 256, 128, 64))),
        (256, (512, 512, 512, 256, 128, 64)),
    ),
)
def test_sizes_that_a_delegator_draws(size, widths):
    assert (
        defaults.delegator_for(defaults.data_settings(size, (0.5,), (0.3,)), 1.0).widths == widths
    )


@pytest.mark.parametrize(
    ("size", "near"),
    (
        (225, 224),
        (226, 224),
        (250, 256),
        (260, 256),
        (299, 304),
        (300, 304),
        (331, 336),
        (4095, 4096),
    ),
)
def test_a_delegator_that_would_start_from_many_pixels_is_refused(size, near):
    data = defaults.data_settings(size, (0.5,), (0.3,))
    with pytest.raises(UserError, match=f"image size {size}: .* give --image-size={near} if"):
        defaults.delegator_for(data, 1.0)


def test_a_model_that_classifies_by_another_rule_is_refused(small_model, place, tmp_path):
    from skd_jax.methods import ncm

    config = dataclasses.replace(small_model.config, method=ncm.Settings())
    model = Model(config, ncm.KeptMeans(small_model.kept.classifier), small_model.class_names)
    with pytest.raises(UserError, match="classifies by ncm, not by a head"):
        extending.extend(model, place / "new", tmp_path / "out")


def test_a_config_beside_the_weights_says_what_flags_say(place, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((place / "old.safetensors").read_bytes())
    says = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4], "crop_pct": 0.8}
    names = ["a", "b", "c", "d"]
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {**says, "crop_mode": "squash"}, "label_names": names})
    )
    for path in (tmp_path, tmp_path / "model.safetensors"):
        data, given = load(path).config.data, load(path, std=[0.5])
        assert (data.image_size, data.load_size, data.mean, data.std) == (8, 10, (0.3,), (0.4,))
        assert data.fit == "squash" and load(path).class_names == tuple(names)
        assert given.config.data.std == (0.5,)  # a flag comes first


@pytest.mark.parametrize(
    ("config", "words"),
    (
        ("{", "is not JSON"),
        ("[1]", "is no config of a model"),
        ('{"pretrained_cfg": 3}', "pretrained_cfg is not an object"),
        ('{"mean": ["a"]}', "mean is .* not a list of numbers"),
        ('{"mean": [NaN]}', "mean is .* not a list of finite numbers"),
        ('{"input_size": [1, 8, 9]}', r"is not \[channels, side, side\]"),
        ('{"crop_pct": 0}', "crop_pct"),
        ('{"interpolation": "magic"}', "interpolation is 'magic', not one of"),
        ('{"skd_jax": {"last_relu": 1}}', "last_relu is 1, not true or false"),
        ('{"label_names": [1]}', "label_names is .* not a list of names"),
        ('{"skd_jax": {"delegator": {"z_dim": 4}}}', "skd_jax.delegator lacks a field"),
        ("[" * 100000, "is not JSON"),
    ),
)
def test_a_wrong_config_is_refused_by_its_field(place, tmp_path, config, words):
    (tmp_path / "model.safetensors").write_bytes((place / "old.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_a_model_folder_reads_nothing_outside_it(extended, place, tmp_path):
    out, _ = extended
    for name in ("labels.txt", "model.safetensors", "delegator.safetensors", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("labels.txt", "model.safetensors", "delegator.safetensors", "config.json"):
            (folder / file).write_bytes((out / file).read_bytes())
        load(folder)
        (folder / name).unlink()
        (folder / name).symlink_to(out / name)
        if name == "labels.txt":  # config.json names the classes, too
            config = json.loads((folder / "config.json").read_text())
            del config["label_names"]
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="outside the folder"):
            load(folder)


def test_a_delegator_of_another_shape_is_refused(extended, tmp_path):
    out, _ = extended
    for file in out.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["skd_jax"]["delegator"]["z_dim"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"delegator.safetensors holds other tensors"):
        load(tmp_path)


def test_a_saved_model_that_is_no_folder(small_model, tmp_path):
    small_model.save(tmp_path / "model.npz")
    small_model.save(tmp_path / "folder")
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
    expected = small_model.scores(images)
    for path in ("model.npz", "folder"):
        np.testing.assert_allclose(load(tmp_path / path).scores(images), expected, rtol=1e-6)
    with pytest.raises(UserError, match="holds its own mean"):
        load(tmp_path / "model.npz", mean=[0.1])
    assert model_folder.LABELS == "labels.txt" and prepare  # names that the README has
