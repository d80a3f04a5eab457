"""The configs as shipped, and every way in which one can be wrong."""

import ast
import dataclasses
import importlib
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import common, digits
from skd_jax import config_files, defaults
from skd_jax.config import Config, Model, late_drops, to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import check_same_config
from skd_jax.methods import METHODS, from_config_dict

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("common", "__init__"))


def load(name: str, arg: str | None = None) -> Config:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config(arg))


def message(config: ConfigDict | dict) -> str:
    with pytest.raises(UserError) as error:
        from_config_dict(config)
    return str(error.value)


def changed(path: str, value) -> ConfigDict:
    """The digits config with one value, of any type, put in."""
    config = digits.get_config()
    *sections, field = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    with section.ignore_type(), section.unlocked():
        section[field] = value
    return config


def test_every_config_is_found():
    assert set(NAMES) >= {"cifar100", "caltech101", "flowers102", "imagenet_subset", "digits"}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_hashable_and_plain_json(name):
    config = load(name)
    assert config == load(name) and hash(config) == hash(load(name))
    assert hash(config) != hash(dataclasses.replace(config, seed=config.seed + 1))
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_config_dict(plain) == config
    assert plain["method"]["stage_one"]["terms"] == dict(config.method.stage_one.terms)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tasks", [1, 2, 5, 10])
def test_tasks_are_an_argument_of_every_config(name, tasks):
    assert load(name, f"tasks={tasks}").data.tasks == tasks


@pytest.mark.parametrize(
    ("name", "data_name", "classes", "size", "seed", "tasks", "pseudo_batch", "lambda_"),
    [
        ("cifar100", "cifar100", 100, 32, 1993, 5, 256, 1.0),
        ("caltech101", "caltech101", 101, 128, 1, 10, 256, 1.0),
        ("flowers102", "oxford_flowers102", 102, 128, 1, 10, 1024, 20.0),
        ("imagenet_subset", "imagenet2012", 100, 224, 1993, 5, 1024, 1.0),
    ],
)
def test_the_papers_settings(name, data_name, classes, size, seed, tasks, pseudo_batch, lambda_):
    config = load(name)
    data, one, two = config.data, config.method.stage_one, config.method.stage_two
    assert (data.name, data.image_size, data.order_seed) == (data_name, size, seed)
    assert data.tasks == tasks
    assert classes - data.base_classes == 50  # what 1, 2, 5 and 10 tasks divide
    assert data.max_classes == 0

    assert dict(one.terms) == {
        "exploration": lambda_,
        "category": 1.0,
        "diversity": 1.0,
        "feature_statistics": 1.0,
    }
    assert (one.batch, one.imitate_steps) == (pseudo_batch, 5)
    assert (one.student_lr, one.delegator_lr, one.drop_every) == (0.1, 1e-3, 100)
    assert (one.rounds_per_epoch, one.epochs) == (50, 200)
    assert (one.feature_source, one.feature_distance) == ("teacher", "variance")
    assert one.student_explores == (name != "flowers102")

    for part in (config.base, two):
        assert (part.lr, part.epochs, part.drop_epochs) == (0.1, 160, (80, 120))
        assert (part.batch, part.momentum) == (128, 0.9)
    assert (two.beta, two.adaptive, two.delegator, two.classification) == (5.0, True, True, "all")
    assert one.momentum == 0.9
    assert config.model.bn_momentum == 0.9
    assert config.method.delegator.z_dim == 256
    assert config.method.delegator.helper_bn and config.method.delegator.upsample == "resize"


@pytest.mark.parametrize("name", ["cifar100", "caltech101", "flowers102", "imagenet_subset"])
def test_low_and_high_resolution_have_their_networks_and_augmentation(name):
    config = load(name)
    model = (config.model.family, config.model.depth, config.model.width)
    parts = (config.base, config.method.stage_one, config.method.stage_two)
    decays = {part.weight_decay for part in parts}
    if name == "cifar100":
        assert model == ("cifar", 32, 16)
        assert config.method.delegator.widths == (128, 128, 64)
        assert (config.data.augment, config.data.pad, config.data.flip) == ("crop", 4, True)
        assert decays == {5e-4}
    else:
        assert model == ("imagenet", 18, 64)
        assert config.method.delegator.widths == (512, 512, 256, 128, 64)
        assert (config.data.augment, config.data.flip) == ("resized_crop", True)
        assert decays == {1e-4}


def test_the_splits_of_the_paper():
    caltech, flowers, subset = (
        load(n).data for n in ("caltech101", "flowers102", "imagenet_subset")
    )
    for data in (caltech, flowers):
        assert (data.test_fraction, data.split_seed) == (0.2, 1)
    assert caltech.exclude_classes == ("background_google",)
    assert flowers.exclude_classes == ()
    assert subset.subset == 100
    assert load("cifar100").data.test_fraction == 0  # its own split


def test_beta_keeps_the_first_weight_at_a_tenth_on_fewer_new_classes():
    digits_, mini = load("digits"), load("cifar100", "scale=mini")
    assert digits_.method.stage_two.beta == pytest.approx(0.1 * (10 - digits_.data.base_classes))
    new = mini.data.max_classes - mini.data.base_classes
    assert mini.method.stage_two.beta == pytest.approx(0.1 * new)


def test_the_mini_scale_is_smaller_and_takes_tasks_too():
    mini = load("cifar100", "tasks=2,scale=mini")
    assert (mini.data.tasks, mini.data.image_size, mini.model.depth) == (2, 16, 8)
    assert mini.data.max_classes < 100


def test_the_midi_scale_has_all_classes_and_the_papers_losses():
    midi, paper = (load("cifar100", f"tasks=10,scale={scale}") for scale in ("midi", "full"))
    assert midi.data.max_classes == 0 and midi.data.base_classes == 50 and midi.data.tasks == 10
    assert (midi.data.image_size, midi.model.depth) == (16, 20)
    same = ("terms", "student_lr", "delegator_lr", "imitate_steps", "discrepancy")
    one, whole = midi.method.stage_one, paper.method.stage_one
    assert [getattr(one, field) for field in same] == [getattr(whole, field) for field in same]
    assert one.epochs * one.rounds_per_epoch == 3000
    assert midi.method.stage_two.beta == paper.method.stage_two.beta == 5
    with pytest.raises(ValueError, match="scale=midi: give full or mini"):
        load("caltech101", "scale=midi")


# Arguments of a config


def test_parse_arg_reads_names_over_defaults():
    assert common.parse_arg(None, tasks=5, scale="full").to_dict() == {"tasks": 5, "scale": "full"}
    assert common.parse_arg("", tasks=5).tasks == 5
    both = common.parse_arg("scale=mini,tasks=10", tasks=5, scale="full")
    assert (both.tasks, both.scale) == (10, "mini")


@pytest.mark.parametrize(
    ("arg", "named"),
    [
        ("task=10", "'task=10'.*tasks"),
        ("10", "'10'.*tasks"),
        ("tasks=ten", "'tasks=ten'.*tasks.*int"),
        ("tasks=", "'tasks='.*int"),
        ("tasks", "'tasks'.*int"),
        ("tasks=2.5", "'tasks=2.5'.*int"),
    ],
)
def test_parse_arg_names_what_it_cannot_read(arg, named):
    with pytest.raises(ValueError, match=named):
        common.parse_arg(arg, tasks=5)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale=tiny.*full.*mini"):
        load("cifar100", "scale=tiny")


# Mistakes in a config


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("method.stage_one.imitate_step", "did you mean config.method.stage_one.imitate_steps?"),
        ("data.imagesize", "did you mean config.data.image_size?"),
        ("methud", "did you mean config.method?"),
        ("stage_two", "did you mean config.method.stage_two?"),
        ("method.stage_tow", "did you mean config.method.stage_two?"),
        (
            "model.colour",
            "fields: family, depth, width, bn_momentum, dtype, precision, shortcut, last_relu, "
            "head",
        ),
    ],
)
def test_an_unknown_field_is_named_with_what_was_meant(path, fix):
    assert message(changed(path, 1)) == f"config.{path}: unknown field; {fix}"


@pytest.mark.parametrize(
    "path", ["seed", "data", "data.mean", "method.stage_one.terms", "run.log_every"]
)
def test_a_missing_field_is_named(path):
    config = digits.get_config()
    *sections, field = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    del section[field]
    assert message(config).startswith(f"config.{path}: missing")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed", 1.5, "int"),
        ("seed", True, "int"),
        ("seed", None, "int"),
        ("data.name", 3, "str"),
        ("data.flip", 1, "bool"),
        ("base.lr", "0.1", "float"),
        ("base.epochs", 10.0, "int"),
        ("data.mean", 0.5, "tuple of float"),
        ("data.exclude_classes", "cat", "tuple of str"),
        ("method.stage_one.terms", (1.0,), "names with weights"),
        ("model", 8, "section"),
    ],
)
def test_a_value_of_another_type_is_named(path, value, expected):
    text = message(changed(path, value))
    assert text.startswith(f"config.{path}: expected") and expected in text
    assert repr(value) in text


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("data.mean", (0.5, "half", 0.5), "config.data.mean[1]: expected float, got 'half'"),
        (
            "method.delegator.widths",
            (8, 4.0),
            "config.method.delegator.widths[1]: expected int, got 4.0",
        ),
        (
            "method.stage_one.terms.category",
            "much",
            "config.method.stage_one.terms.category: expected float, got 'much'",
        ),
    ],
)
def test_an_item_of_another_type_is_named_by_its_place(path, value, where):
    assert message(changed(path, value)) == where


def test_an_int_will_do_for_a_float():
    config = from_config_dict(changed("method.stage_one.terms.exploration", 20))
    weight = dict(config.method.stage_one.terms)["exploration"]
    assert weight == 20.0 and type(weight) is float


@pytest.mark.parametrize(
    ("path", "choices"),
    [
        ("model.family", ("cifar", "imagenet")),
        ("method.delegator.upsample", ("resize", "transposed")),
        ("method.stage_one.feature_source", ("teacher", "student")),
        ("method.stage_one.feature_distance", ("variance", "std", "squared", "kl")),
        ("method.stage_two.classification", ("all", "old_head_fixed")),
    ],
)
def test_a_choice_that_is_none_is_refused_and_every_other_taken(path, choices):
    text = message(changed(path, "other"))
    assert text.startswith(f"config.{path}: 'other'") and all(c in text for c in choices)
    for choice in choices:
        value = from_config_dict(changed(path, choice))
        for name in path.split("."):
            value = getattr(value, name)
        assert value == choice


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("method.delegator.z_dim", 0),
        ("model.width", 0),
        ("base.epochs", 0),
        ("base.batch", -3),
        ("base.lr", 0.0),
        ("base.lr", float("nan")),
        ("base.momentum", -2.0),
        ("model.bn_momentum", 1.0),
        ("method.stage_one.student_lr", float("inf")),
        ("method.stage_two.beta", -1.0),
        ("method.stage_two.balanced", 1.5),
        ("method.stage_two.new_outputs_decay", -1e-4),
        ("method.stage_two.weight_decay", -1e-4),
        ("method.stage_one.terms.category", float("nan")),
        ("method.stage_one.imitate_steps", 0),
        ("method.stage_one.feature_length", -1.0),
        ("method.stage_one.feature_length", float("nan")),
        ("method.stage_one.batch", 0),
        ("method.stage_one.drop_every", 0),
        ("method.stage_one.finetune_epochs", 0),
        ("method.stage_two.batch", 0),
        ("method.stage_two.lr", -0.1),
        ("run.log_every", 0),
        ("run.checkpoint_every", 0),
        ("run.steps_per_call", -1),
        ("run.eval_batch", 0),
    ],
)
def test_a_value_out_of_range_is_named(path, value):
    text = message(changed(path, value))
    assert text.startswith(f"config.{path}: {value}")


@pytest.mark.parametrize("changes", [{"augment": "none"}, {"pad": 0, "flip": False}])
def test_augmentation_that_changes_nothing_is_refused(changes):
    fields = importlib.import_module("configs.cifar100").get_config()
    fields.method.stage_one.augment = True
    from_config_dict(fields)
    fields.data.update(changes)
    with pytest.raises(UserError, match=r"^config\.method\.stage_one\.augment=True has no effect"):
        from_config_dict(fields)


def test_a_rate_cannot_have_dropped_before_it_begins():
    for section in ("base", "method.stage_two"):
        text = message(changed(f"{section}.drop_epochs", (2, -1)))
        assert text.startswith(f"config.{section}.drop_epochs: -1 is below 0")


def test_a_run_saved_before_a_field_was_added_goes_on_with_its_default():
    config = load("digits")
    older = json.loads(json.dumps(to_dict(config)))
    for name in ("balanced", "align_head"):
        del older["method"]["stage_two"][name]
    check_same_config(config, older, pathlib.Path("run"))
    aligned = dataclasses.replace(config.method.stage_two, align_head=True)
    method = dataclasses.replace(config.method, stage_two=aligned)
    with pytest.raises(UserError, match="align_head=False, not True"):
        check_same_config(dataclasses.replace(config, method=method), older, pathlib.Path())


def test_a_head_without_gamma_needs_one_that_is_not_zero():
    config = changed("method.stage_two.head_at_full_rate", True)
    assert from_config_dict(config).method.stage_two.head_at_full_rate
    config.method.stage_two.update({"adaptive": False, "gamma": 0.0})
    text = message(config)
    assert text.startswith("config.method.stage_two.head_at_full_rate") and "gamma is 0" in text


def test_every_setting_of_skd_has_a_flag():
    given, typed = digits.get_config().method, load("digits").method
    for name in ("delegator", "stage_one", "stage_two"):
        fields = dataclasses.fields(getattr(typed, name))
        assert set(given[name]) == {field.name for field in fields}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("method.stage_two.delegator", False, "set config.method.stage_two.delegator=True"),
        ("model.head", "cosine", "config.model.head='cosine' has others"),
        ("method.stage_two.align_head", True, "set one of them alone"),
        ("method.stage_two.new_outputs_decay", 1e-6, "give 1e-05 or more, or 0"),
    ],
)
def test_new_outputs_are_learned_anew_of_a_linear_head_beside_a_delegator(path, value, words):
    config = changed("method.stage_two.new_outputs_decay", 1e-4)
    assert from_config_dict(config).method.stage_two.new_outputs_decay == 1e-4
    config.update_from_flattened_dict({path: value})
    text = message(config)
    assert "method.stage_two.new_outputs_decay" in text and words in text


def test_means_are_kept_for_outputs_that_are_learned_anew():
    config = changed("method.stage_two.keep_means", True)
    text = message(config)
    assert text.startswith("config.method.stage_two.keep_means=True")
    assert "set config.method.stage_two.new_outputs_decay" in text
    config.method.stage_two.new_outputs_decay = 1e-4
    assert from_config_dict(config).method.stage_two.keep_means


def test_the_new_outputs_alone_leave_no_place_for_pseudo_labels():
    config = changed("method.stage_two.classification", "new")
    assert message(config).startswith("config.method.stage_two.classification")
    config.method.stage_two.delegator = False
    assert from_config_dict(config).method.stage_two.classification == "new"


@pytest.mark.parametrize("widths", [(64,), (64, 64, 32, 16, 8), ()])
def test_widths_that_cannot_reach_the_image_size_are_refused(widths):
    text = message(changed("method.delegator.widths", widths))
    assert text.startswith("config.method.delegator.widths") and "config.data.image_size=8" in text


def test_an_explore_objective_without_terms_is_refused():
    assert message(changed("method.stage_one.terms", ConfigDict())).startswith(
        "config.method.stage_one.terms"
    )
    terms = changed("method.stage_one.terms", ConfigDict({"category": 0.0, "diversity": 0.0}))
    assert message(terms).startswith("config.method.stage_one.terms: no term has a weight")


def test_lucir_and_sdc_have_their_settings_of_larger_images():
    for name in ("lucir", "mnemonics"):
        assert load("imagenet_subset", f"method={name}").method.weight == 10.0
        assert load("cifar100", f"method={name}").method.weight == 5.0
    assert load("imagenet_subset", "method=sdc").method.sigma == 0.3
    assert load("cifar100", "method=sdc").method.sigma == 0.2


def test_the_paths_of_version_0_1_are_the_same_sections():
    config = digits.get_config()
    config.stage_two.batch = 8
    config.stage_one.terms.category = 0.5
    config.delegator.z_dim = 7
    read = from_config_dict(config).method
    assert (read.stage_two.batch, read.delegator.z_dim) == (8, 7)
    assert dict(read.stage_one.terms)["category"] == 0.5
    config.method.delegator = ConfigDict({**config.method.delegator})  # a section of one's own
    assert from_config_dict(config).method.delegator.z_dim == 7
    with pytest.raises(KeyError):
        digits.get_config("method=lwf")["stage_two"]


@pytest.mark.parametrize(
    ("changes", "field", "better"),
    [
        ({"base.epochs": 20}, "base.drop_epochs", "(10,15)"),
        ({"base.epochs": 30}, "base.drop_epochs", "(15,22)"),  # the second would be missed
        ({"method.stage_two.epochs": 3}, "method.stage_two.drop_epochs", "()"),
        ({"method.stage_one.epochs": 10}, "method.stage_one.drop_every", "5"),
        ({"method.stage_one.finetune_epochs": 1}, "method.stage_one.finetune_drop_every", "1"),
    ],
)
def test_rates_that_never_drop_are_told(changes, field, better):
    fields = digits.get_config()
    fields.update_from_flattened_dict(changes)
    [line] = late_drops(from_config_dict(fields))
    ((lowered, epochs),) = changes.items()
    assert line.startswith(f"config.{field}=") and f"config.{lowered}={epochs}" in line
    assert line.endswith(f'--config.{field}="{better}"')
    fields.update_from_flattened_dict({field: ast.literal_eval(better)})
    assert late_drops(from_config_dict(fields)) == []
    fields.update_from_flattened_dict({"base.drop_epochs": (), "base.epochs": 1})  # none is wanted
    assert not any("base" in line for line in late_drops(from_config_dict(fields)))


def test_a_cosine_has_no_drops_to_miss():
    fields = digits.get_config()
    fields.update_from_flattened_dict({"method.stage_one.epochs": 10})
    assert late_drops(from_config_dict(fields))
    fields.method.stage_one.schedule = "student_cosine"  # D_n's rate has drops
    assert late_drops(from_config_dict(fields))
    fields.method.stage_one.schedule = "cosine"
    assert late_drops(from_config_dict(fields)) == []


def test_no_committed_config_lacks_its_drops(repo):
    for file in sorted((repo / "configs").glob("*.py")):
        if file.name not in ("common.py", "recipes.py"):
            scales = ("full", "mini", *(["midi"] if file.stem == "cifar100" else []))
            for scale in scales:
                for method in METHODS:
                    config = config_files.read(f"{file}:scale={scale},method={method}")
                    assert late_drops(from_config_dict(config)) == [], file
    for effort in (0.01, 0.1, 1.0):  # and what extensions take
        config = defaults.settings(
            Model("cifar", 8, 8, 0.9, "float32"),
            defaults.data_settings(8, (0.5,), (0.5,)),
            images=40,
            effort=effort,
        )
        assert late_drops(config) == []
