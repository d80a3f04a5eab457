"""The full-scale check itself, on a tiny scale and random images."""

import json
import math

from absl import flags
from absl.testing import flagsaver
from test_train import tiny

from experiments.measure import full_scale


def test_each_kind_of_step_is_timed_and_its_losses_are_finite(tmp_path):
    flags.FLAGS.mark_as_parsed()
    config = tiny()
    with flagsaver.flagsaver(count=1, mock=True):
        full_scale.measure(config, str(tmp_path))
    report = json.loads((tmp_path / f"digits_{config.method.stage_one.batch}.json").read_text())
    for kind, loss in (
        ("supervised", "classification"),
        ("round", "explore"),
        ("cil", "cil"),
    ):
        assert report[kind]["seconds"] > 0
        assert loss in report[kind]["losses"]
        assert all(math.isfinite(value) for value in report[kind]["losses"].values())
    assert report["round"]["temporaries_gib"] > 0
    assert report["peak_memory_gib"] > 0
    assert report["dataset"] == "mocked digits"
