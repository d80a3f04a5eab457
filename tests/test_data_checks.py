"""What is refused before any training."""

import pytest

from skd_jax.data.check import check_tests
from skd_jax.errors import UserError


def test_tasks_without_test_images_are_named():
    names = [["ant", "bee"], ["cat"], [f"c{i}" for i in range(7)]]
    check_tests((3, 1, 2), names)
    for counts, words in (
        ((3, 0, 2), "task 1 cannot be tested, since the test split has no image of class 'cat':"),
        ((0, 1, 2), "task 0 cannot be tested, since the test split has no image of the classes "),
        ((3, 0, 0), "tasks 1, 2 cannot be tested"),
        ((3, 1, 0), "'c0', 'c1', 'c2', 'c3', 'c4' and 2 more: "),
    ):
        with pytest.raises(UserError) as error:
            check_tests(counts, names)
        said = str(error.value)
        assert words in said and "config.data.test_fraction" in said and "\n" not in said
