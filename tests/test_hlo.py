"""The reader of compiled programs, on small programs whose costs are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from experiments.measure import hlo


def program(body: str, *computations: str) -> str:
    lines = "\n".join(f"  {line.strip()}" for line in body.strip().splitlines())
    return "\n\n".join(
        ["HloModule m", *computations, f"ENTRY %main (p: f32[2]) -> f32[2] {{\n{lines}\n}}\n"]
    )


LOOP = """%body (b: f32[4,8]) -> f32[4,8] {
  %b = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} constant({...})
  ROOT %d = f32[4,8]{1,0} dot(%b, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (c: f32[4,8]) -> pred[] {
  %c = f32[4,8]{1,0} parameter(0)
  %limit = s32[] constant(7)
  %i = s32[] constant(0)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}"""
FLOPS = 2 * 4 * 8 * 8


def test_a_shape_has_a_layout_that_pads():
    plain, tiled, fast, scalar = hlo.shapes(
        "(f32[2,3]{1,0}, bf16[5,100]{0,1:T(8,128)(2,1)}, f32[8,128]{1,0:T(8,128)S(1)}, s32[])"
    )
    assert (plain.bytes, plain.padded, plain.space) == (24, 24, 0)
    # Its fastest dimension is the first: 5 to 128, and 100 to 104.
    assert (tiled.bytes, tiled.padded) == (1000, 128 * 104 * 2)
    assert fast.space == 1 and fast.padded == fast.bytes
    assert scalar.bytes == scalar.padded == 4


@pytest.mark.parametrize(
    ("told", "trips", "unknown"),
    [('"known_trip_count":{"n":"3"}', 3, 0), ("", 7, 0), ("dynamic", 1, 1)],
)
def test_loops_are_multiplied_out(told, trips, unknown):
    loop = LOOP if told != "dynamic" else LOOP.replace("s32[] constant(7)", "s32[] parameter(1)")
    loop = loop.replace("%i = s32[] constant(0)", "%i = s32[] parameter(2)")
    text = program(
        f"""%p = f32[4,8]{{1,0}} parameter(0)
        ROOT %l = f32[4,8]{{1,0}} while(%p), condition=%condition, body=%body, \
            backend_config={{{told}}}""",
        loop,
    )
    found = hlo.read(text, count=2)
    assert found["unknown_loops"] == unknown
    assert found["gflop"] == pytest.approx(trips * FLOPS / 2 / 1e9)
    assert found["operations"] == trips / 2
    assert found["gb"] == pytest.approx(trips * (2 * 128 + 256) / 2 / 1e9)


CONVOLUTION = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
# Rows of 8 pixels at stride 2 have 4 results; the first sees 2 pixels, the others 3.
TAPS = (2 + 3 + 3 + 3) ** 2
X, W, Y = "bf16[2,8,8,3]{3,2,1,0}", "bf16[3,3,3,5]{3,2,1,0}", "bf16[2,4,4,5]{3,2,1,0}"


@pytest.mark.parametrize(
    ("target", "left", "right", "out"),
    [
        ("", X, W, Y),
        ("__cudnn$convForward", X, W, Y),
        ("__cudnn$convBackwardInput", Y, W, X),
        ("__cudnn$convBackwardFilter", X, Y, W),
    ],
)
def test_a_convolution_and_cudnns_gradients_multiply_what_is_no_padding(target, left, right, out):
    result, op = out, "convolution"
    attributes = CONVOLUTION + ", operand_precision={highest,highest}"
    if target:
        result, op = f"({out}, u8[0]{{0}})", "custom-call"
        attributes += f', custom_call_target="{target}"'
    text = program(
        f"""%x = {left} parameter(0)
        %w = {right} parameter(1)
        ROOT %c = {result} {op}(%x, %w), {attributes}"""
    )
    found = hlo.read(text)
    expected = 2 * TAPS * 2 * 5 * 3 / 1e9
    assert found["products"] == {"bf16 x bf16 -> bf16 highest": pytest.approx(expected)}
    assert found["operations"] == 1
    assert found["gb"] == pytest.approx(2 * (2 * 64 * 3 + 9 * 15 + 2 * 16 * 5) / 1e9)


def test_a_dilated_convolution_leaves_out_the_holes():
    text = program(
        """%x = f32[1,4,1,1]{3,2,1,0} parameter(0)
        %w = f32[4,1,1,1]{3,2,1,0} parameter(1)
        ROOT %c = f32[1,8,1,1]{3,2,1,0} convolution(%x, %w), \
            window={size=4x1 pad=2_2x0_0 lhs_dilate=2x1}, \
            dim_labels=b01f_01io->b01f"""
    )
    # Each result sees two pixels of four taps, the first and the last only one.
    assert hlo.read(text)["gflop"] == pytest.approx(2 * (8 * 2 - 2) / 1e9)


def test_cublas_products_count():
    text = program(
        """%a = f32[4,8]{1,0} parameter(0)
        %b = f32[8,6]{1,0} parameter(1)
        ROOT %c = (f32[4,6]{1,0}, s8[0]{0}) custom-call(%a, %b), \
            custom_call_target="__cublas$lt$matmul", \
            backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}"""
    )
    assert hlo.read(text)["gflop"] == pytest.approx(2 * 4 * 8 * 6 / 1e9)


def test_a_fusion_is_one_operation_and_reads_what_it_slices():
    fused = """%fused (a: f32[100,8], n: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = f32[1,8]{1,0} dynamic-slice(%a, %n, %zero), dynamic_slice_sizes={1,8}
  ROOT %m = f32[1,8]{1,0} multiply(%s, %s)
}"""
    text = program(
        """%p = f32[100,8]{1,0} parameter(0)
        %n = s32[] parameter(1)
        ROOT %f = f32[1,8]{1,0} fusion(%p, %n), kind=kLoop, calls=%fused, \
            backend_config={"estimated_cycles":"50"}""",
        fused,
    )
    found = hlo.read(text)
    assert found["operations"] == 1
    assert found["gb"] == pytest.approx((32 + 4 + 32) / 1e9)
    assert found["mcycles"] == {"other fusions": 50 / 1e6}


@pytest.mark.parametrize(
    ("work", "taken"),
    [
        ("%w = bf16[100,8]{1,0} convert(%a)", 32),  # element by element: of the slice alone
        ("%w = bf16[8,100]{0,1} transpose(%a), dimensions={1,0}", 32),
        ("%w = bf16[100,8]{1,0} reduce-window(%a, %a), to_apply=%add", 3200),  # neighbours too
        ("%w = bf16[100,8]{1,0} dot(%a, %a)", 3200),
        ("%w = bf16[100,800]{1,0} broadcast(%a), dimensions={0,1}", 3200),
        ("%w = bf16[100,8]{1,0} fusion(%a), kind=kLoop, calls=%another", 3200),
        # Used twice, and sliced once.
        ("%n = f32[100,8]{1,0} negate(%a)\n  %w = bf16[100,8]{1,0} multiply(%a, %n)", 32),
    ],
)
def test_what_is_sliced_after_work_on_each_element_is_read_as_far_as_it_is_taken(work, taken):
    another = (
        "%another (b: f32[100,8]) -> bf16[100,8] {\n  ROOT %b = f32[100,8]{1,0} parameter(0)\n}"
    )
    fused = f"""%fused (a: f32[100,8]) -> bf16[1,8] {{
  %a = f32[100,8]{{1,0}} parameter(0)
  {work}
  ROOT %s = bf16[1,8]{{1,0}} slice(%w), slice={{[3:4], [0:8]}}
}}"""
    text = program(
        """%p = f32[100,8]{1,0} parameter(0)
        ROOT %f = bf16[1,8]{1,0} fusion(%p), kind=kLoop, calls=%fused""",
        fused,
        another,
    )
    assert hlo.read(text)["gb"] == pytest.approx((taken + 16) / 1e9)


def test_an_update_in_place_writes_what_is_put():
    fused = """%fused (a: f32[100,8], u: f32[1,8], n: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %s = f32[100,8]{1,0} dynamic-update-slice(%a, %u, %n, %n)
}"""
    arguments = """%p = f32[100,8]{1,0} parameter(0)
        %u = f32[1,8]{1,0} parameter(1)
        %n = s32[] parameter(2)
        """
    inside = "ROOT %f = f32[100,8]{1,0} fusion(%p, %u, %n), kind=kLoop, calls=%fused"
    found = hlo.read(program(arguments + inside, fused))
    assert found["gb"] == pytest.approx((32 + 4 + 32) / 1e9)
    alone = "ROOT %s = f32[100,8]{1,0} dynamic-update-slice(%p, %u, %n, %n)"
    assert hlo.read(program(arguments + alone))["gb"] == pytest.approx((32 + 8 + 32) / 1e9)


def test_vector_memory_is_no_traffic():
    text = program(
        """%p = f32[8,128]{1,0:T(8,128)} parameter(0)
        %c = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
        %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%c)
        ROOT %n = f32[8,128]{1,0:T(8,128)S(1)} negate(%d)"""
    )
    found = hlo.read(text)
    assert found["gb"] == pytest.approx(4096 / 1e9)
    assert found["operations"] == 2


def test_a_slice_reads_what_it_takes_from_where_that_lies():
    text = program(
        """%p = f32[32,128]{1,0:T(8,128)} parameter(0)
        %s = ((f32[32,128]), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), \
            slice={[0:8], [0:128]}
        %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)
        ROOT %t = f32[8,64]{1,0:T(8,128)} slice(%d), slice={[0:8], [0:64]}"""
    )
    found = hlo.read(text)
    assert found["gb"] == pytest.approx((4096 + 4096) / 1e9)  # into vector memory; and out of it
    assert found["operations"] == 2


def test_collectives_are_summed_by_kind():
    text = program(
        """%p = f32[2]{0} parameter(0)
        %q = f32[1000]{0} parameter(1)
        %a = f32[2]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
        %s = (f32[2]{0}, f32[1000]{0}) all-reduce-start(%a, %q), \
            replica_groups={{0,1}}, to_apply=%add
        %n = f32[2]{0} negate(%a)
        %e = (f32[2]{0}, f32[1000]{0}) all-reduce-done(%s)
        %g = f32[2]{0} get-tuple-element(%e), index=0
        %t = f32[2]{0} all-reduce-start(%g), replica_groups={{0,1}}, to_apply=%add
        %d = f32[2]{0} all-reduce-done(%t)
        %m = f32[2]{0} negate(%d)
        ROOT %h = f32[4]{0} all-gather(%g), dimensions={0}"""
    )
    found = hlo.read(text)
    assert found["collectives"] == {
        "all-reduce": {"calls": 3, "overlapped": 1, "mb": (8 + 8 + 4000 + 8) / 1e6},
        "all-gather": {"calls": 1, "overlapped": 0, "mb": 8 / 1e6},
    }
    assert found["operations"] == 6


def test_padding_is_of_all_results():
    text = program(
        """%p = f32[8,128]{1,0:T(8,128)} parameter(0)
        ROOT %s = f32[8,32]{1,0:T(8,128)} slice(%p), slice={[0:8], [0:32]}"""
    )
    assert hlo.read(text)["padding"] == 4


def test_what_xla_writes_here_is_read():
    def thrice(x):
        return jax.lax.scan(lambda x, w: (jnp.dot(x, w), None), x, jnp.ones((3, 8, 8)))[0]

    found = hlo.read(jax.jit(thrice).lower(jnp.ones((4, 8))).compile().as_text())
    assert found["unknown_loops"] == 0
    assert found["gflop"] == pytest.approx(3 * FLOPS / 1e9)
    assert found["operations"] >= 3


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no HLO text"):
        hlo.read("module @jit_f {}")
