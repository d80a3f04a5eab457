"""A loss term that somebody wrote: what is wrong with it is one line before anything starts."""

import sys

import jax
import pytest
from test_data_sources import DIGITS
from test_train import tiny

from skd_jax import experiment
from skd_jax.data import open_source
from skd_jax.errors import UserError
from skd_jax.experiment import open_experiment
from skd_jax.methods.skd import terms

HEAD = "import jax\nimport jax.numpy as jnp\nfrom skd_jax import parallel\n"
HEAD += "from skd_jax.methods.skd.terms import term\n\n"
WRONG = [  # the body, the line that is wrong, and words
    ("return jnp.mean(e.image)", 9, "AttributeError: 'Explored' object has no attribute 'image'"),
    ("return jnp.mean(e.images @ e.teacher_logits)", 9, "TypeError: dot_general"),
    ("x = 1.0\n    return jnp.mean(e.imagse) + x", 10, "AttributeError"),
    ("return helper(e)", 13, "NameError: name 'nowhere' is not defined"),
    ("return float(jnp.mean(e.images))", 9, "ConcretizationTypeError"),
    ("if jnp.mean(e.images) > 0:\n        return 1.0", 9, "TracerBoolConversionError"),
    ("return jnp.mean(e.images, axis=0)", 6, "returns float32 of shape (8, 8, 1)"),
    ("return jnp.argmax(e.teacher_logits)", 6, "returns int32 of shape ()"),
    ("jnp.mean(e.images)", 6, "returns NoneType"),
    ("return jnp.mean(e.images), 0.0", 6, "returns tuple"),
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module ``my_terms`` with a term ``mine`` of that body."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(body: str) -> str:
        helper = "\n\n\ndef helper(e):\n    return nowhere\n"
        text = f'{HEAD}@term\ndef mine(e):\n    """Of mine."""\n    {body}{helper}'
        (tmp_path / "my_terms.py").write_text(text)
        return str(tmp_path / "my_terms.py")

    yield written
    sys.modules.pop("my_terms", None)


@pytest.fixture(scope="module")
def source():
    return open_source(DIGITS)


def opened(source, weight: float = 0.5):
    config = tiny(
        stage_one__terms={"category": 1.0, "mine": weight},
        stage_one__term_modules=("skd_jax.methods.skd.terms", "my_terms"),
    )
    return open_experiment(config, source)


@pytest.mark.parametrize(("body", "line", "words"), WRONG)
def test_a_wrong_term_is_named_with_its_file_and_line(write, source, body, line, words):
    file = write(body)
    with pytest.raises(UserError) as error:
        opened(source)
    said = str(error.value)
    assert said.startswith("config.method.stage_one.terms.mine ") and "\n" not in said
    assert f"{file}:{line}" in said and words in said, said


def test_a_wrong_term_is_named_before_the_images_are_opened(write, monkeypatch):
    write("return e.nothing")
    monkeypatch.setattr(experiment, "open_source", None)
    with pytest.raises(UserError, match=r"^config\.method\.stage_one\.terms\.mine fails"):
        opened(None)


@pytest.mark.parametrize(
    "body",
    [
        "return jnp.mean(jnp.abs(e.images[:, 1:] - e.images[:, :-1]))",
        "return sum(jnp.mean(m) for m, v in e.student_moments)",
        "return jnp.mean(jax.lax.top_k(e.teacher_logits, 4)[0])",  # as many as there are classes
        "return jnp.mean(parallel.mean(e.teacher_features, e.axis_name) * e.config.student_lr)",
    ],
)
def test_a_sound_term_is_traced_and_nothing_is_computed(write, source, body, monkeypatch):
    write(body)
    traced = []
    real = jax.eval_shape
    monkeypatch.setattr(jax, "eval_shape", lambda f, *a: traced.append(f) or real(f, *a))
    opened(source)
    assert sum(getattr(f, "__name__", "") == "mine" for f in traced) == 2  # for each D_n


def test_terms_of_ours_and_those_without_weight_cost_nothing(write, source, monkeypatch):
    write("return nowhere")
    monkeypatch.setattr(terms.jax, "eval_shape", None)
    opened(source, weight=0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def mine(e):\n    return (", ":2: SyntaxError: '(' was never closed"),
        ("import jax\nx = nowhere", ":2: NameError: name 'nowhere' is not defined"),
        ("1 / 0", ":1: ZeroDivisionError"),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(write, source, tmp_path, text, words):
    file = write("return 0.0")
    (tmp_path / "my_terms.py").write_text(text)
    with pytest.raises(UserError) as error:
        opened(source)
    said = str(error.value)
    assert "term_modules: cannot import 'my_terms'" in said and f"{file}{words}" in said
    assert "\n" not in said
