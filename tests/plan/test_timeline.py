"""What is hidden and what is exposed, in schedules whose answer is known."""

import pytest

from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.links import Links
from dsv3_jax.plan.hlo import parse
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.timeline import RECOMPUTED, Player, Timeline, part_of

SIZE = 8192
WORK_S = 2 * SIZE**3 / 989e12  # of %dot: 1.1 ms
SHARD = "bf16[8192,1024]{1,0}"
GATHER_S = 7 * SIZE * 1024 * 2 / 450e9  # of %gather: 0.26 ms
GROUPS = "replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}"
START = f"%start = ({SHARD}, bf16[8192,8192]{{1,0}}) all-gather-start(%s), {GROUPS}"
DONE = "%done = bf16[8192,8192]{1,0} all-gather-done(%start)"
DOT = "%dot = bf16[8192,8192]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
USE = "%use = bf16[8192,8192]{1,0} dot(%done, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def play(*lines: str, **others) -> Timeline:
    return player(*lines, **others)[0]


def player(*lines: str, extra: str = "", kind: str = "h100", places=None, shape=(), root: str = "%dot"):
    """The timeline of a program of these lines, and the collectives that it misses."""
    body = "\n".join(f"  {line}" for line in lines)
    text = f"""HloModule m, is_scheduled=true
{extra}
ENTRY %main (x: bf16[8192,8192], s: bf16[8192,1024]) -> bf16[8192,8192] {{
  %x = bf16[8192,8192]{{1,0}} parameter(0)
  %s = {SHARD} parameter(1)
{body}
  ROOT %out = bf16[8192,8192]{{1,0}} bitcast({root})
}}
"""
    p = parse(text)
    links = Links(kind, places or [(0, 0, (i,)) for i in range(8)], shape)
    of = Player(p, {"fsdp": 8}, links, CostModel(p, kind, Efficiency(), 1.0), 1.0, 1.0, 1.0, lambda *_: None)
    return of.play(), of.unreached()


def test_work_between_begin_and_end_hides():
    line = play(START, DOT, DONE)
    assert line.hidden == 1
    assert line.seconds == pytest.approx(WORK_S, rel=0.01)
    assert line.communication == pytest.approx(GATHER_S, rel=0.1)  # and a latency


def test_a_dependency_exposes():
    """The same instructions, but the work needs what is gathered."""
    line = play(START, DONE, USE, root="%use")
    assert line.hidden == 0
    assert line.seconds == pytest.approx(WORK_S + line.communication, rel=0.01)


def test_work_that_is_too_short_hides_its_time():
    short = "%dot = bf16[8192,512]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    weight = "%w = bf16[8192,512]{1,0} parameter(2)"
    line = play(weight, START, short, DONE, root="%done")
    work = line.work_seconds
    assert 0 < work < line.communication
    assert line.hidden == pytest.approx(work / line.communication, rel=0.02)
    assert line.seconds == pytest.approx(line.communication, rel=0.02)


def test_one_instruction_hides_nothing():
    line = play(f"%gather = bf16[8192,8192]{{1,0}} all-gather(%s), {GROUPS}", DOT)
    assert line.hidden == 0
    assert line.seconds == pytest.approx(WORK_S + line.communication, rel=0.01)


def test_two_wait_for_one_link():
    second = START.replace("%start", "%start2")
    line = play(START, second, DONE, "%done2 = bf16[8192,8192]{1,0} all-gather-done(%start2)", DOT)
    assert line.exposed == pytest.approx(line.communication, rel=0.01)
    assert line.communication == pytest.approx(2 * GATHER_S, rel=0.1)


def test_waiting_for_a_link_is_no_work():
    """An asynchronous gather, and behind it another that stops the device: nothing is hidden, though the first's end waits for
    nothing any more."""
    second = f"%second = bf16[8192,8192]{{1,0}} all-gather(%s), {GROUPS}"
    line = play(START, second, DONE, DOT)
    assert line.exposed == pytest.approx(line.communication)
    assert line.seconds == pytest.approx(WORK_S + line.communication, rel=0.01)


def test_loops_count_as_often_as_they_run():
    extra = f"""
%body (p: (s32[], bf16[8192,8192], bf16[8192,1024])) -> (s32[], bf16[8192,8192], bf16[8192,1024]) {{
  %p = (s32[], bf16[8192,8192]{{1,0}}, {SHARD}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8192,8192]{{1,0}} get-tuple-element(%p), index=1
  %s = {SHARD} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  {START}
  {DOT}
  {DONE}
  ROOT %t = (s32[], bf16[8192,8192]{{1,0}}, {SHARD}) tuple(%next, %dot, %s)
}}

%condition (p: (s32[], bf16[8192,8192], bf16[8192,1024])) -> pred[] {{
  %p = (s32[], bf16[8192,8192]{{1,0}}, {SHARD}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}
"""
    line = play(
        "%zero = s32[] constant(0)", f"%init = (s32[], bf16[8192,8192]{{1,0}}, {SHARD}) tuple(%zero, %x, %s)",
        f"%loop = (s32[], bf16[8192,8192]{{1,0}}, {SHARD}) while(%init), condition=%condition, body=%body",
        "%dot = bf16[8192,8192]{1,0} get-tuple-element(%loop), index=1", extra=extra,
    )  # fmt: skip
    ((moved),) = line.moved.values()
    assert moved.count == 12
    assert line.seconds == pytest.approx(12 * WORK_S, rel=0.01)
    assert line.work.flops["bf16"] == 12 * 2 * SIZE**3


def permute(name: str, to: int) -> str:
    pairs = ",".join(f"{{{i},{(i + to) % 8}}}" for i in range(8))
    return f"%{name} = ({SHARD}, {SHARD}, u32[]) collective-permute-start(%s), source_target_pairs={{{pairs}}}"


@pytest.mark.parametrize(("other", "times"), [(7, 1), (1, 2)])
def test_permutes_both_ways_round_a_ring(other, times):
    """TPU's pairs: two the same way share the links, two that go round opposite ways don't."""
    ends = [f"%{name}.done = {SHARD} collective-permute-done(%{name})" for name in ("a", "b")]
    places = [(0, 0, (i, 0, 0)) for i in range(8)]
    line = play(permute("a", 1), permute("b", other), *ends, DOT, kind="v5p", places=places, shape=(8, 1, 1))
    alone = SIZE * 1024 * 2 / 90e9
    assert line.seconds - line.work_seconds == pytest.approx(times * alone, rel=0.02)


def test_another_thread_works_beside():
    """SparseCores' and asynchronous copies: waited for at their end only, updates in between."""
    extra = f"""
%gathered (p: {SHARD.partition("{")[0]}) -> bf16[8192,1024] {{
  %p = {SHARD} parameter(0)
  ROOT %g = {SHARD} copy(%p)
}}, execution_thread="sparsecore"
"""
    begin = f'%c = (({SHARD}), {SHARD}, u32[]) call-start(%s), async_execution_thread="sparsecore", to_apply=%gathered'
    update = f"%u = (({SHARD}), {SHARD}, u32[]) call-update(%c)"
    line = play(begin, update, DOT, f"%d = {SHARD} call-done(%u)", extra=extra)
    assert line.seconds == pytest.approx(WORK_S, rel=0.01)
    assert not sum(line.waited.values())
    waits = play(begin, f"%d = {SHARD} call-done(%c)", DOT, extra=extra)
    assert waits.seconds == pytest.approx(WORK_S + 2 * SIZE * 1024 * 2 / 3.35e12, rel=0.01)


def test_a_collective_of_a_sparse_core_counts_like_any_other():
    """It stands in a computation of its own, and begins with its operands: at the update, not before."""
    extra = f"""
%offloaded (p: bf16[8192,1024]) -> bf16[8192,8192] {{
  %p = {SHARD} parameter(0)
  ROOT %gather = bf16[8192,8192]{{1,0}} all-gather(%p), {GROUPS}
}}, execution_thread="sparsecore"
"""
    begin = '%c = ((), (), s32[8]{0}) custom-call-start(), custom_call_target="x", called_computations={%offloaded}'
    update = f"%u = (({SHARD}), bf16[8192,8192]{{1,0}}, s32[8]{{0}}) custom-call-update(%c, %s)"
    done = "%done = bf16[8192,8192]{1,0} custom-call-done(%u)"
    hides = play(begin, update, DOT, done, extra=extra)
    waits = play(begin, DOT, update, done, extra=extra)
    plain = play(START, DOT, DONE)
    for line in (hides, waits):
        ((key, moved),) = line.moved.items()
        assert key == ("all-gather", ("fsdp",), "nvlink")
        assert (moved.count, moved.bytes) == (1, plain.moved[key].bytes)
        assert moved.seconds == pytest.approx(plain.moved[key].seconds)
    assert (hides.hidden, waits.hidden) == pytest.approx((1, 0))


def fused(name: str, collective: str, result: str = "bf16[8192,8192]") -> str:
    return f"""
%{name} (p: bf16[8192,1024]) -> {result} {{
  %p = {SHARD} parameter(0)
  {collective}
}}
"""


def test_a_v5e_fuses_collectives_with_kernels_in_steps():
    """The begin, a kernel in between and the end each hold the collective; it is one."""
    gather = f"ROOT %gNUMBER = bf16[8192,8192]{{1,0}} all-gather(%p), channel_id=7, {GROUPS}"
    extra = "".join(fused(f"f{n}", gather.replace("NUMBER", str(n))) for n in (1, 2, 3))
    begin = "%async-collective-start = bf16[8192,8192]{1,0} fusion(%s), kind=kCustom, calls=%f1"
    step = "%step = bf16[8192,8192]{1,0} fusion(%s), kind=kCustom, calls=%f2"
    done = "%async-collective-done = bf16[8192,8192]{1,0} fusion(%s), kind=kCustom, calls=%f3"
    line, missed = player(begin, step, DOT, done, extra=extra)
    ((_, moved),) = line.moved.items()
    assert (moved.count, missed, line.hidden) == (1, [], 1)
    assert player(begin, done, DOT, extra=extra)[0].hidden == 0


def test_a_sum_of_which_a_part_is_kept_scatters():
    parts = f"""%sum = {SHARD} all-reduce(%p), channel_id=7, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[1024,1024]{{1,0}} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={{1024,1024}}"""
    line, missed = player(
        "%f = bf16[1024,1024]{1,0} fusion(%s), kind=kCustom, calls=%scattered", DOT, extra=fused("scattered", parts)
    )  # fmt: skip
    ((key, moved),) = line.moved.items()
    assert (key[0], moved.bytes, missed) == ("reduce-scatter", 7 / 8 * 8192 * 1024 * 2, [])


def test_slices_exchange_by_their_runtime():
    names = '_xla_host_transfer_rendezvous="r0",_xla_megascale_transfer_type="ALL_REDUCE"'
    send = (
        f"%send = ({SHARD}, u32[], token[]) send(%s, %t), channel_id=1, is_host_transfer=true, frontend_attributes={{{names}}}"
    )
    recv = f"%recv = ({SHARD}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={{{names}}}"
    ends = "%sent = token[] send-done(%send)", f"%received = ({SHARD}, token[]) recv-done(%recv)"
    places = [(i // 4, 0, (i % 4, 0, 0)) for i in range(8)]
    line = play("%t = token[] after-all()", send, recv, DOT, *ends, kind="v5p", places=places, shape=(4, 1, 1))
    ((key, moved),) = line.moved.items()
    assert key == ("all-reduce", ("fsdp",), "network")
    assert moved.bytes == 8192 * 1024 * 2  # of two slices: each sends all of it once
    assert moved.exposed == pytest.approx(moved.seconds - line.work_seconds, rel=0.01)


def test_a_collective_that_nothing_calls_is_said():
    extra = f"""
%forgotten (p: bf16[8192,1024]) -> bf16[8192,8192] {{
  %p = {SHARD} parameter(0)
  ROOT %lost = bf16[8192,8192]{{1,0}} all-gather(%p), {GROUPS}
}}
"""
    assert player(START, DOT, DONE, extra=extra)[1] == ["lost"]
    assert player(START, DOT, DONE)[1] == []


def test_parts_of_the_model():
    assert part_of("jit(train_step)/transpose(jvp())/while/body/checkpoint/attention/dot_general") == "attention"
    assert part_of("jit(train_step)/jvp(mtp_head)/shard_map/while/body/x") == "mtp_head"
    assert part_of("jit(train_step)/add") == "rest"


def test_what_is_done_again():
    """The forward pass within the experts' own backward one, in a loop or in parts; not the backward pass itself."""
    inside = "jit(f)/transpose(jvp())/while/body/checkpoint/ffn/shard_map"
    again = [f"{inside}/{rest}jvp()/dot" for rest in ("exchange/", "exchange/while/body/", "exchange/exchange/while/body/")]
    again += [f"{inside}/more_rounds/while/body/jvp()/dot", "jit(f)/transpose(jvp())/rematted_computation/attention/dot"]
    once = [f"{inside}/exchange/transpose(jvp())/dot", f"{inside}/more_rounds/while/body/transpose(jvp())/dot"]
    once += ["jit(f)/jvp()/while/body/ffn/shard_map/exchange/while/body/dot"]
    assert [bool(RECOMPUTED.search(name)) for name in again + once] == [True] * 5 + [False] * 3
