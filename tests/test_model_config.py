"""What is said of a model beside its weights."""

import json

import pytest

from skd_jax import model_folder
from skd_jax.errors import UserError
from skd_jax.model_config import Said, read_config


def written(tmp_path, **fields):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"pretrained_cfg": fields}))
    return path


@pytest.mark.parametrize(
    ("crop", "size", "load_size"), [(0.875, 128, 146), (0.875, 224, 256), (1.0, 64, 64)]
)
def test_another_size_of_images_sees_as_much_of_them(tmp_path, crop, size, load_size):
    said = read_config(written(tmp_path, input_size=[3, 224, 224], crop_pct=crop))
    found = Said(image_size=size).over(said)
    assert (found.image_size, found.load_size) == (size, load_size)
    assert Said(image_size=size, load_size=300).over(said).load_size == 300
    assert Said(load_size=300).over(said).load_size == 300
    assert Said(image_size=size).over(Said()).load_size is None


def test_padding_to_a_square_is_refused(tmp_path):
    fields = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "crop_mode": "border"}
    said = read_config(written(tmp_path, **fields))
    with pytest.raises(UserError, match=r"crop_mode 'border', .* give --fit=crop or --fit=squash"):
        model_folder._data(said, 1, 2, tmp_path)
    assert model_folder._data(Said(fit="crop").over(said), 1, 2, tmp_path).fit == "crop"
    for mode, fit in (("center", "crop"), ("squash", "squash")):
        assert read_config(written(tmp_path, crop_mode=mode)).fit == fit
