"""The reader of compiled programs, on programs whose loops and shapes are known."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.plan.hlo import Array, arrays_of, parse


def program(f, *args):
    return parse(jax.jit(f).lower(*args).compile().as_text())


def trips(p) -> list[int | None]:
    return [p.trip_count(i, c) for c in p.computations.values() for i in c if i.opcode == "while"]


@settings(max_examples=12, deadline=None)
@given(begin=st.integers(-3, 9), count=st.integers(2, 40), step=st.integers(1, 5))
def test_a_loop_that_counts_is_counted(begin, count, step):
    end = begin + count * step

    def body(carry):
        i, x = carry
        return i + step, jnp.sin(x) + i

    p = program(lambda x: jax.lax.while_loop(lambda c: c[0] < end, body, (begin, x))[1], jnp.ones(8))
    assert trips(p) == [count]


def test_nested_scans():
    def outer(x, _):
        return jax.lax.scan(lambda y, _: (jnp.cos(y) @ y, None), x, length=7)[0], None

    p = program(lambda x: jax.lax.scan(outer, x, length=5)[0], jnp.ones((4, 4)))
    assert sorted(t for t in trips(p) if t) == [5, 7]


def test_a_loop_over_data_is_not_counted():
    p = program(lambda n, x: jax.lax.fori_loop(0, n, lambda i, y: jnp.sin(y) + i, x), 3, jnp.ones(4))
    assert trips(p) == [None]


# what a compiler may leave of a loop: the counter in an element that other loops share, limits that are carried along
_TEXT = """HloModule m, is_scheduled=true

%body (p: (s32[], s32[], f32[2])) -> (s32[], s32[], f32[2]) {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}, f32[2]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  %x = f32[2]{0:T(256)} get-tuple-element(%p), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[]{:T(128)}, s32[]{:T(128)}, /*index=2*/f32[2]{0:T(256)}) tuple(%next, LIMIT, %x)
}

%condition (p: (s32[], s32[], f32[2])) -> pred[] {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}, f32[2]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=DIRECTION
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0:T(256)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %ten = s32[]{:T(128)} constant(10)
  %kernel = f32[2]{0:T(256)} custom-call(%x), custom_call_target="k", frontend_attributes={kernel_metadata={
"block": "1"
}}, metadata={op_name="jit(f)/kernel"}
  %init = (s32[]{:T(128)}, s32[]{:T(128)}, f32[2]{0:T(256)}) tuple(%zero, %ten, %kernel)
  %loop = (s32[]{:T(128)}, s32[]{:T(128)}, f32[2]{0:T(256)}) while(%init), condition=%condition, body=%body
  ROOT %y = f32[2]{0:T(256)} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize(
    ("direction", "limit", "count"), [("LT", "%n", 5), ("LE", "%n", 6), ("LT", "%next", None), ("GT", "%n", None)]
)
def test_limits_that_are_carried(direction, limit, count):
    p = parse(_TEXT.replace("DIRECTION", direction).replace("LIMIT", limit))
    assert trips(p) == [count]
    assert p.scheduled
    kernel = p.computations["main"].instructions["kernel"]  # whose attributes go over several lines
    assert kernel.op_name == "jit(f)/kernel"
    assert list(p.computations["main"].instructions)[-1] == "y"


def test_shapes():
    found = arrays_of("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f8e4m3fn[3]{0}, s4[5]{0}, pred[], token[])")
    assert found == (
        Array("bf16", (8, 128), 1), Array("f8e4m3fn", (3,)), Array("s4", (5,)), Array("pred", ()), Array("token", ()),
    )  # fmt: skip
    assert [a.bytes for a in found] == [2048, 3, 3, 1, 0]


@pytest.mark.parametrize("text", ["", "module {}", "HloModule m\n\n%f (x: f32[]) -> f32[] {\n}\n"])
def test_what_is_no_program(text):
    with pytest.raises(ValueError, match="HLO"):
        parse(text)


def test_a_kernels_own_program_is_passed_over():
    """In which anything may stand, also what looks like attributes."""
    config = '{module = "body=%loop.1\\00", x = 1}'
    call = f'%k.1 = f32[8]{{0}} custom-call(%x.1), custom_call_target="mosaic_gpu_v2", backend_config={config}'
    text = f"HloModule m\n\nENTRY %main (x.1: f32[8]) -> f32[8] {{\n  %x.1 = f32[8]{{0}} parameter(0)\n  ROOT {call}\n}}\n"
    root = parse(text).computations["main"].root
    assert (root.name, root.called("body")) == ("k.1", None)
    assert "x = 1" in root.attributes
