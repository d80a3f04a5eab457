"""What README.md shows of the Python face runs as it is written."""

import os
import re
import subprocess
import sys

from PIL import Image
from test_train import silent, tiny

import skd_jax
from skd_jax import defaults, train, weights


def shown(repo, number: int) -> str:
    """One of the two blocks of Python."""
    blocks = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    return blocks[number]


def test_a_model_of_ones_own_in_python(repo, small_model, tmp_path, monkeypatch, capsys):
    """As it is written, but for how long it trains."""
    network = small_model.kept.classifier
    weights.write(tmp_path / "old.safetensors", network, weights.names_of(small_model.config.model))
    names = "".join(f"{name}\n" for name in small_model.class_names)
    (tmp_path / "old_labels.txt").write_text(names)
    for name in ("bee", "cow"):
        (tmp_path / "new_images" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.effect_noise((30, 28), 10 * i)
            picture.save(tmp_path / "new_images" / name / f"{i}.png")
    Image.effect_noise((28, 28), 9).save(tmp_path / "photo.png")
    short = defaults.Lengths(rounds=2, round_batch=4, steps=2, batch=4, width=0.1)
    monkeypatch.setattr(defaults, "ON_CPU", short)
    monkeypatch.setattr(defaults, "ROUNDS_PER_EPOCH", 1)
    monkeypatch.setattr(defaults, "MIN_EPOCHS", 1)
    monkeypatch.chdir(tmp_path)
    exec(shown(repo, 0), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("photo.png (")
    assert (tmp_path / "new_model" / "report.html").exists()


def test_the_python_in_the_readme_runs(repo, tmp_path):
    train.train(tiny(run__phases=1, model__width=16), tmp_path / "runs" / "teacher", silent)
    (tmp_path / "shown.py").write_text(shown(repo, 1))
    found = subprocess.run(
        [sys.executable, "shown.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not found.returncode, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert all("'roughness'" in line and "'skipped': 0.0" in line for line in lines)
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.size[0] > 64


def test_the_face_has_all_that_it_names():
    for name in skd_jax.__all__:
        assert getattr(skd_jax, name) is not None
