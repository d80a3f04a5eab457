"""What accelerators are given: the real steps lowered for them, and, with libtpu, compiled."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from configs import digits
from experiments.measure import chips, compile_for, hlo
from skd_jax.errors import UserError
from skd_jax.methods import from_config_dict

TINY = {"model.width": 4, "base.batch": 128, "method.stage_two.batch": 128}
TINY |= {"method.delegator.widths": (8, 8, 4), "method.stage_one.batch": 32}
STEPS = {"round": "skd", "cil": "skd", "base": "skd", "predict": "skd", "means": "ncm"}
# A round scans its imitate steps, and every call its steps; nothing else loops on an accelerator.
LOOPS = {"round": 2, "cil": 1, "base": 1, "predict": 0, "means": 1}
LEARNING = ("round", "cil", "base")
FORWARD = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
WEIGHT_GRADIENT = "[f, 0, 1, b]x[i, 0, 1, o]->[0, 1, b, f]"


def tiny(method: str = "skd", **changes):
    fields = digits.get_config(f"method={method}")
    known = {name: x for name, x in (TINY | changes).items() if name in fields_of(fields)}
    fields.update_from_flattened_dict(known)
    return from_config_dict(fields)


def fields_of(fields, path=""):
    """The paths of a configuration's fields."""
    for name, value in fields.items():
        yield f"{path}{name}"
        if hasattr(value, "items"):
            yield from fields_of(value, f"{path}{name}.")


@functools.cache
def lowered(step: str, platform: str) -> str:
    call = compile_for.call(tiny(STEPS[step]), step)
    return call.lower(platform, (platform,)).as_text()


def convolutions(text: str) -> set[str]:
    """Which dimensions of a convolution's arguments are which."""
    return set(re.findall(r"stablehlo\.convolution.*? dim_numbers = (\[.*?\]->\[.*?\])", text))


def pixels_in_one_row(text: str) -> list[tuple[int, ...]]:
    """Images [B, H, W, C] that are taken as rows of several pixels [B, rows, k C]."""
    size = r"(\d+)x"
    image, rows = rf"tensor<{4 * size}b?f\d+>", rf"tensor<{3 * size}b?f\d+>"
    found = re.findall(rf"stablehlo\.reshape .*: \({image}\) -> {rows}", text)
    shapes = [tuple(map(int, each)) for each in found]
    return [s for s in shapes if s[0] == s[4] and s[6] > s[3] and s[6] % s[3] == 0]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("step", STEPS)
def test_no_cpu_form_reaches_an_accelerator(step, platform):
    text = lowered(step, platform)
    assert not pixels_in_one_row(text)
    assert text.count("stablehlo.while") == LOOPS[step]
    assert FORWARD in convolutions(text)
    assert (WEIGHT_GRADIENT in convolutions(text)) == (step in LEARNING)


@pytest.mark.parametrize("step", STEPS)
def test_a_cpu_has_its_own_forms(step):
    text = lowered(step, "cpu")
    assert pixels_in_one_row(text)
    assert convolutions(text) == {FORWARD}
    # One for each weight gradient, some images at a time.
    assert (text.count("stablehlo.while") > LOOPS[step]) == (step in LEARNING)


@pytest.mark.parametrize(("platform", "more"), [("tpu", 0), ("cuda", 0), ("cpu", 1)])
def test_replicas_of_one_device_take_a_loop_on_a_cpu_alone(platform, more):
    one, two = (
        compile_for.call(tiny("ncm", **{"run.replicas": n}), "means").lower(platform, (platform,))
        for n in (1, 2)
    )
    loops = [text.as_text().count("stablehlo.while") for text in (one, two)]
    assert loops[1] == loops[0] + more


def test_a_step_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--step=rounds: config.method has round, cil, base, "):
        compile_for.call(tiny(), "rounds")


def test_topologies_are_checked():
    assert chips.shape_of("v5e:4x4") == (4, 4)
    assert chips.shape_of("h100:8") == (8,)
    for wrong in ("v5e", "v5e:", "v5e:0", "v5e:4x", "v7:1", "v5e:2x2x2", "h100:2x4"):
        with pytest.raises(UserError, match=f"--topology={wrong}: "):
            chips.shape_of(wrong)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("not here\nand more")

    monkeypatch.setattr(chips.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"v5e:1: not here; .*-e '.\[tpu-compile\]'$"):
        chips.devices("v5e:1")
    with pytest.raises(UserError, match=r"h100:1: not here; .*-e '.\[cuda-compile\]'$"):
        chips.devices("h100:1")


READING = {
    "topology": "v5e:1",
    "config": "cifar100",
    "dtype": "bfloat16",
    "step": "round",
    "steps_a_call": 1,
    "fast": False,
    "versions": {"libtpu": "1"},
    "memory_mib": {"total": 700.0, "temp": 500.0, "generated_code": 170.0},
    "operations": 6000.0,
    "gflop": 1970.0,
    "products": {"bf16 x bf16 -> bf16": 985.0, "f32 x f32 -> f32 highest": 985.0},
    "gb": 8.19,
    "mcycles": {"convolutions": 30.0, "other fusions": 15.0},
    "collectives": {"all-reduce": {"calls": 600, "overlapped": 0, "mb": 20.0}},
    "padding": 1.25,
}


class Program:
    """A small program, and a chip's memory and more to hold it."""

    def __init__(self, gib: int):
        parts = ("argument", "output", "alias", "temp", "generated_code")
        sizes = {f"{part}_size_in_bytes": gib * 2**30 for part in parts}
        self.memory_analysis = lambda: SimpleNamespace(**sizes)

    def compile(self):
        return self

    def as_text(self) -> str:
        return "ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %p = f32[2]{0} parameter(0)\n}"


def test_memory_counts_what_is_donated_once_and_is_held_against_the_chips():
    found = compile_for.compiled(Program(gib=5), chips.CHIPS["v5e"], 1)
    assert found["memory_mib"]["total"] == 3 * 5 * 1024 and "does_not_fit" not in found
    found = compile_for.compiled(Program(gib=6), chips.CHIPS["v5e"], 1)
    assert found["does_not_fit"] == "needs 18.0 of 16 GiB"


def test_readings_of_several_steps_know_their_loops(monkeypatch):
    """And a program whose loops do not tell is refused, not read as if they went round once."""
    call = compile_for.call(tiny(), "base", count=3)
    text = call.lower("cpu").compile().as_text()
    found = hlo.read(text, 3)
    one = hlo.read(compile_for.call(tiny(), "base").lower("cpu").compile().as_text())
    assert found["unknown_loops"] == 0
    assert found["gflop"] == pytest.approx(one["gflop"], rel=0.05)
    monkeypatch.setattr(hlo, "read", lambda *_: {"unknown_loops": 1})
    with pytest.raises(UserError, match=r"1 loops .* do not tell"):
        compile_for.compiled(Program(gib=1), chips.CHIPS["v5e"], 2)


def test_bounds_are_of_the_chips_peaks():
    found = compile_for.bounds(chips.CHIPS["v5e"], READING)
    assert found == pytest.approx({"flops": 5 + 30, "bytes": 10, "estimated": 30})
    assert "estimated" not in compile_for.bounds(chips.CHIPS["h100"], READING | {"mcycles": {}})


def test_the_table_has_before_and_after_side_by_side(tmp_path):
    def write(when: str, name: str, **changes):
        (tmp_path / when).mkdir(exist_ok=True)
        report = READING | {"bounds_ms": compile_for.bounds(chips.CHIPS["v5e"], READING)} | changes
        (tmp_path / when / f"{name}.json").write_text(json.dumps(report))

    write("before", "a")
    write("after", "a", operations=3000.0)
    write("before", "b", fast=True)
    write("before", "c", does_not_fit="25 GiB")
    write("after", "c")
    _, _, a, b, c = compile_for.table(tmp_path).splitlines()
    assert a.startswith("| cifar100, round, bfloat16 | v5e:1 | 700 → 700 |")
    assert "| 6,000 → 3,000 |" in a and a.endswith("| 30 → 30 |")
    assert b.startswith("| cifar100, round, bfloat16, fast | v5e:1 | 700 |") and b.endswith("|  |")
    assert "does not fit → fits" in c
    assert len({line.count("|") for line in (a, b, c)}) == 1


def test_the_readme_has_the_table_of_what_is_committed(repo):
    text = (repo / "experiments" / "README.md").read_text()
    shown = text.split("<!-- compile_for --table -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == compile_for.table(repo / compile_for.RESULTS)
    assert shown.count("\n") > 5


class TooLarge:
    def __init__(self, words: str):
        self.words = words

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.words)


def test_a_program_that_does_not_fit_is_a_reading_and_other_errors_are_not():
    words = "RESOURCE_EXHAUSTED: Used 25.4G of 15.7G hbm.\nTotal hbm usage"
    found = compile_for.compiled(TooLarge(words), chips.CHIPS["v5e"], 1)
    assert found == {"does_not_fit": "RESOURCE_EXHAUSTED: Used 25.4G of 15.7G hbm."}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_for.compiled(TooLarge("INTERNAL: a bug"), chips.CHIPS["v5e"], 1)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("step", ["round", "cil"])
def test_tpu_programs_are_as_they_should_be(tmp_path, step):
    """Compiled in bfloat16 for 1 and 4 chips, in a process of its own; a minute a program."""
    readings = {}
    for topology in ("v5e:1", "v5e:2x2"):
        command = [sys.executable, "-m", "experiments.measure.compile_for", "--fast"]
        command += [f"--topology={topology}", f"--step={step}", "--dtype=bfloat16"]
        command += ["--config=configs/cifar100.py:scale=mini", f"--out={tmp_path / topology[4:]}"]
        subprocess.run(command, check=True, stdout=subprocess.PIPE)
        (path,) = (tmp_path / topology[4:]).iterdir()
        readings[topology] = json.loads(path.read_text())
    one, four = readings.values()
    assert one["chips"] == 1 and four["chips"] == 4
    for found in (one, four):
        assert 0 < found["memory_mib"]["total"] < 16 * 1024
        assert found["unknown_loops"] == 0
        products = found["products"]
        low = sum(x for types, x in products.items() if types.startswith("bf16 x bf16 -> "))
        assert low > 0.99 * found["gflop"]
    assert not one["collectives"]
    assert set(four["collectives"]) == {"all-reduce"}
    assert four["gflop"] == pytest.approx(one["gflop"] / 4, rel=0.05)
