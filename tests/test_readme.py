"""What README.md shows of the Python face runs as it is written."""

import os
import re
import subprocess
import sys

from PIL import Image
from test_train import silent, tiny

import skd_jax
from skd_jax import train


def test_the_python_in_the_readme_runs(repo, tmp_path):
    train.train(tiny(run__phases=1, model__width=16), tmp_path / "runs" / "teacher", silent)
    [code] = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    (tmp_path / "shown.py").write_text(code)
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
