"""The benchmark takes turns, compares medians, and runs its own steps at any task."""

import pytest

from experiments.measure import benchmark, sweep


class Fake:
    """A contender whose units of work take the seconds given, one after the other."""

    def __init__(self, log: list[str], name: str, seconds: list[float]):
        self.log, self.name, self.seconds = log, name, iter(seconds)

    def ask(self, method: str, unit: str, count: int) -> dict:
        assert (method, unit) == ("run", "round")
        self.log.append(self.name)
        return {"seconds": next(self.seconds) * count}


def test_contenders_take_turns_and_the_median_counts():
    log: list[str] = []
    running = {"a": Fake(log, "a", [9, 3, 1, 2]), "b": Fake(log, "b", [4, 5, 5, 8])}
    found = benchmark.in_turns(running, "round", turns=3, count=2)
    assert log == ["a", "b"] * 4
    assert found["a"] == {
        "first_seconds": 18,
        "seconds": 2,
        "fastest_seconds": 1,
        "slowest_seconds": 3,
        "compile_seconds": 14,
    }
    assert found["b"]["seconds"] == 5 and found["b"]["compile_seconds"] == 0


def test_a_report_names_every_contender_and_point():
    row = {"batch": 128, "unit": "cil", "contender": "skd_jax float32", "seconds": 0.5}
    row |= {"images_per_second": 512.0, "compile_seconds": 9.0, "peak_memory_gib": 1.25}
    lines = benchmark.table([row, {**row, "unit": "round", "seconds": 0.25}]).splitlines()
    assert len(lines) == 4 and "| round | skd_jax float32 | 0.25 |" in lines[2]
    cost = {"seconds": 1.0, "compile_seconds": 10.0}
    point = {"sweep": "task", "value": 5, "round": cost, "cil": cost}
    last = sweep.table([{**point, "arrays_gib": 0.5, "peak_memory_gib": 2.0}]).splitlines()[-1]
    assert last == "| task | 5 | 1.00 | 1.00 | 20 | 512.0 | 2.00 |"


@pytest.mark.slow
def test_our_steps_run_at_a_later_task_and_hold_little_more():
    first, later = [
        benchmark.Ours(batch=8, dtype="float32", tasks=10, task=task) for task in (1, 10)
    ]
    for unit in benchmark.UNITS:
        later.run(unit, 2)
    heads = 4 * 9 * 10 * (64 + 1)  # bytes: nine tasks' outputs more in T_n, T_{n+1}, momentum
    assert 0 < later.arrays - first.arrays <= 4 * heads
