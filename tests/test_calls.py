"""The ways a run may be cut into compiled calls and images be fed: none changes the result."""

import pytest
from test_train import at_row, bits, finished_run, newest, rows, silent, tiny

from skd_jax import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The whole run that other modules look at too."""
    return finished_run(tmp_path_factory)


def test_streamed_images_give_what_images_in_memory_give(finished, tmp_path):
    config = tiny(data__in_memory=False)
    train.train(config, tmp_path, silent)
    here, there = rows(tmp_path, ("time",)), rows(finished.workdir, ("time",))
    assert here == there
    carry, carry_ = newest(config, tmp_path)[1], newest(finished.config, finished.workdir)[1]
    assert bits(carry) == bits(carry_)


@pytest.mark.slow
def test_an_interrupted_run_of_several_steps_a_call_ends_the_same_to_the_bit(tmp_path):
    config = tiny(run__steps_per_call=2, run__log_every=2, run__checkpoint_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(config, whole, silent)
    with at_row(10):
        train.train(config, cut, silent)
    train.train(config, cut, silent)
    assert rows(whole, ("time",)) == rows(cut, ("time",))
    assert bits(newest(config, whole)[1]) == bits(newest(config, cut)[1])
