"""Routed experts on a mesh: tokens travel to the experts' devices and back, and none is dropped.

Rows (a token with what it wants from the destination) are sorted by destination and sent in rounds of at most `quota` rows a
pair of devices, so that buffers are bounded; balanced routing takes one round, a hot expert more. A hop is one such exchange:

* flat: one hop over all ranks of `expert`; a row is one choice of a token;
* two-level: a hop across nodes, in which a token travels once to each node that it needs (node-limited routing, section 2.1.2
  of arXiv 2412.19437, keeps these few), then a flat hop inside the node. Rows cross the slow links once, and no group of
  devices is larger than a node or the number of nodes.

Rows move by `ragged_all_to_all`, or on CPU, which has none, by an all-to-all of the same buffers with their padding. The
backward pass sends rows again rather than keeping what arrived, and has the gradient written out.

A device's tokens can travel in several parts, so that one part is under way while another is computed; nothing but their order
in time, and the order of sums, differs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsv3_jax.model.layout import Traffic
from dsv3_jax.parallel.collectives import all_gather, all_reduce, reduce_scatter
from pallas_kernels import grouped_swiglu
from pallas_kernels.scaled import Gemms

# Room for a pair of ranks over its mean number of rows. 2 holds the imbalance of a trained router within a sequence, so that
# a second round is rare; buffers grow in proportion.
SLACK = 2
# Scopes in a program's names: of the rounds, and of a loop over those that balanced routing does not need.
EXCHANGE, MORE_ROUNDS = "exchange", "more_rounds"


class Hop(NamedTuple):
    """An exchange among groups of devices along `expert`."""

    groups: tuple[tuple[int, ...], ...]  # expert ranks that exchange with each other
    experts: int  # that a destination holds
    quota: int  # rows a pair of devices sends in one round
    once: bool  # a token travels once to a destination, with all its choices, rather than once a choice
    parts: int = 1  # N: pieces of a device's tokens, each with rounds of its own

    @property
    def size(self) -> int:
        return len(self.groups[0])


def _quota(rows: float, most: int) -> int:
    """Rows a round for a pair whose mean is `rows` and whose maximum is `most`: a multiple of 8, for the kernels."""
    return -(-min(int(SLACK * rows) + 1, most) // 8) * 8


def hops(
    ranks: int, per_node: int, two_level: bool, experts: int, tokens: int, choices: int, parts: int = 1
) -> tuple[Hop, ...]:
    """How `tokens` tokens a rank reach `experts` experts on `ranks` ranks, `per_node` of them a node, in `parts`."""
    if ranks == 1:
        return ()
    tokens //= parts
    if not two_level or ranks == per_node:
        local = experts // ranks
        most = tokens * min(choices, local)
        return (Hop((tuple(range(ranks)),), local, _quota(tokens * choices / ranks, most), False, parts),)
    nodes = ranks // per_node
    across = tuple(tuple(node * per_node + j for node in range(nodes)) for j in range(per_node))
    inside = tuple(tuple(node * per_node + j for j in range(per_node)) for node in range(nodes))
    first = Hop(across, experts // nodes, _quota(tokens * min(choices, nodes) / nodes, tokens), True, parts)
    most = first.quota * nodes * min(choices, experts // ranks)
    return first, Hop(inside, experts // ranks, _quota(tokens * choices / per_node, most), once=False)


class _Plan(NamedTuple):
    """Where each (token, choice) of a part goes in a hop. R is the number of destinations, P = T*K."""

    dest_TK: Int[Array, "T K"]  # R: nowhere
    rank_TK: Int[Array, "T K"]  # number among the rows to the same destination
    order_P: Int[Array, " P"]  # rows sorted by destination
    first_R: Int[Array, " R"]
    count_R: Int[Array, " R"]  # rows to each destination, in all rounds


def _plan(hop: Hop, expert_TK) -> _Plan:
    R, P_ = hop.size, expert_TK.size
    dest_TK = jnp.where(expert_TK < hop.experts * R, expert_TK // hop.experts, R)
    if hop.once:
        same_TKK = dest_TK[:, :, None] == dest_TK[:, None, :]
        earlier_KK = jnp.tril(jnp.ones(same_TKK.shape[1:], bool), -1)
        dest_TK = jnp.where((same_TKK & earlier_KK).any(-1), R, dest_TK)
    dest_P = dest_TK.reshape(-1)
    order_P = jnp.argsort(dest_P, stable=True)
    count_R = jnp.bincount(dest_P, length=R)
    first_R = jnp.cumsum(count_R) - count_R
    rank_P = (
        jnp.zeros(P_, jnp.int32).at[order_P].set((jnp.arange(P_) - jnp.append(first_R, 0)[dest_P[order_P]]).astype(jnp.int32))
    )
    return _Plan(dest_TK, rank_P.reshape(dest_TK.shape), order_P, first_R, count_R)


class _Round(NamedTuple):
    """One round of a part, as one device sees it."""

    hop: Hop
    slot_C: Int[Array, " C"]  # the t*K + k of each row in the send buffer
    live_C: Array  # which of them are rows, not padding
    sent_R: Int[Array, " R"]
    received_R: Int[Array, " R"]
    row_TK: Int[Array, "T K"]  # where a (token, choice) lies in the send buffer, if `here`
    here_TK: Array

    def send(self, rows_CX: Array, fill: float = 0.0) -> Array:
        """Rows of the send buffer at their destinations; `fill` where a receiver has room left."""
        rows_CX = jnp.where(self.live_C[:, None], rows_CX, jnp.asarray(fill, rows_CX.dtype))
        return _transfer(self.hop, rows_CX, self.sent_R, self.received_R, fill)

    def back(self, rows_CX: Array) -> Array:
        """What was made of the rows that arrived, where their senders know them."""
        return _transfer(self.hop, rows_CX, self.received_R, self.sent_R, 0.0)

    def choice(self, k: int, rows_CX: Array) -> Array:
        """f32[T, X]: the row of each token's k-th choice, zero if it is not in this round."""
        rows_TX = rows_CX[jnp.where(self.here_TK[:, k], self.row_TK[:, k], 0)]
        return jnp.where(self.here_TK[:, k, None], rows_TX, 0).astype(jnp.float32)


def _round(hop: Hop, plan: _Plan, coming_R, number) -> _Round:
    done, q = number * hop.quota, hop.quota
    sent_R, received_R = (jnp.clip(count_R - done, 0, q).astype(jnp.int32) for count_R in (plan.count_R, coming_R))
    place_Rq = plan.first_R[:, None] + done + jnp.arange(q)
    slot_Rq = plan.order_P[jnp.minimum(place_Rq, plan.order_P.size - 1)]
    live_Rq = jnp.arange(q) < sent_R[:, None]
    rank_TK = plan.rank_TK - done
    here_TK = (plan.dest_TK < hop.size) & (rank_TK >= 0) & (rank_TK < q)
    return _Round(
        hop, slot_Rq.reshape(-1), live_Rq.reshape(-1), sent_R, received_R, plan.dest_TK * q + rank_TK, here_TK
    )  # fmt: skip


def _index_in_group(hop: Hop):
    """This device's index in its group."""
    index = {rank: i for group in hop.groups for i, rank in enumerate(group)}
    return jnp.asarray([index[rank] for rank in range(len(index))])[lax.axis_index("expert")]


def _transfer(hop: Hop, rows_CX, sent_R, received_R, fill: float):
    """Block d of the rows goes to destination d, which finds it at block s of its own, s being the sender."""
    R, q = hop.size, hop.quota

    def ragged(rows_CX, sent_R, received_R):
        out_CX = jnp.full_like(rows_CX, fill)
        begin_R = jnp.arange(R, dtype=jnp.int32) * q
        there_R = jnp.full(R, _index_in_group(hop) * q, jnp.int32)
        return lax.ragged_all_to_all(
            rows_CX, out_CX, begin_R, sent_R, there_R, received_R, axis_name="expert", axis_index_groups=hop.groups
        )

    def padded(rows_CX, _sent_R, _received_R):
        return lax.all_to_all(rows_CX, "expert", 0, 0, axis_index_groups=hop.groups, tiled=True)

    return lax.platform_dependent(rows_CX, sent_R, received_R, cpu=padded, default=ragged)


def _each_round(hop: Hop, all_axes: tuple[str, ...], expert_TK, body: Callable, carry):
    """(carry, made) = body(part, round, carry) over a hop's parts and their rounds; `made` is what is about to be sent back.

    The first round of each part stands in straight line, where a scheduler can put one part's exchange beside another's
    products. A part sets out when the last but one has been computed, or else all would be sent before anything is computed
    (XLA drops barriers before it schedules, and yet hides more with them: see docs/plan.md). The other rounds, which balanced
    routing does not need, are a loop. As many as the fullest pair of devices needs: one number for all of the mesh, because
    loops with collectives in them must not part ways.
    """
    N = hop.parts
    plans = jax.vmap(functools.partial(_plan, hop))(_split(expert_TK, N))
    coming_NR = lax.all_to_all(plans.count_R, "expert", 1, 1, axis_index_groups=hop.groups, tiled=True)
    rounds = lax.pmax(jnp.max(-(-plans.count_R // hop.quota)), all_axes)

    def step(n, carry, after=None):
        part = n % N
        plan = jax.tree.map(lambda a: a[part], plans)
        if after is not None:
            plan, _ = lax.optimization_barrier((plan, after[:1, :1]))
        return body(part, _round(hop, plan, coming_NR[part], n // N), carry)

    if N == 1:
        with jax.named_scope(EXCHANGE):
            return lax.fori_loop(0, rounds, lambda n, carry: step(n, carry)[0], carry)
    made = [None, None]
    with jax.named_scope(EXCHANGE):
        for n in range(N):
            carry, last = step(n, carry, made[n])
            made.append(last)
    with jax.named_scope(MORE_ROUNDS):
        return lax.fori_loop(N, N * rounds, lambda n, carry: step(n, carry)[0], carry)


def _split(a_TX, parts: int):
    return a_TX.reshape(parts, -1, *a_TX.shape[1:])


class _Rows(NamedTuple):
    """What a hop delivers."""

    x_CX: Array
    expert_CK: Array  # counted from the destination's first; its number of experts where there is none
    weight_CK: Array


def _deliver(round_: _Round, x_TX, expert_TK, weight_TK) -> _Rows:
    hop, K = round_.hop, expert_TK.shape[1]
    token_C = round_.slot_C // K
    if hop.once:
        expert_CK, weight_CK = expert_TK[token_C], weight_TK[token_C]
    else:
        expert_CK, weight_CK = expert_TK.reshape(-1)[round_.slot_C][:, None], weight_TK.reshape(-1)[round_.slot_C][:, None]
    # float32 holds an expert's number exactly; one message instead of two
    wanted = round_.send(jnp.concatenate([expert_CK.astype(jnp.float32), weight_CK], axis=1), fill=-1.0)
    expert_CK, weight_CK = jnp.split(wanted, 2, axis=1)
    expert_CK = expert_CK.astype(jnp.int32) - jnp.where(expert_CK < 0, 0, _index_in_group(hop) * hop.experts)
    elsewhere = (expert_CK < 0) | (expert_CK >= hop.experts)
    return _Rows(round_.send(x_TX[token_C]), jnp.where(elsewhere, hop.experts, expert_CK), weight_CK)


def _forward(
    kernel: Callable, route: tuple[Hop, ...], all_axes, w_gate_up, w_down, x_TD, expert_TK, weight_TK
) -> Float[Array, "T D"]:
    if not route:
        return kernel(x_TD, w_gate_up, w_down, expert_TK, weight_TK)
    hop, K = route[0], expert_TK.shape[1]
    parts = [_split(a, hop.parts) for a in (x_TD, expert_TK, weight_TK)]

    def body(part, round_, y_NTD):
        rows = _deliver(round_, *(a[part] for a in parts))
        made_CD = _forward(kernel, route[1:], all_axes, w_gate_up, w_down, *rows)
        y_CD = round_.back(made_CD)
        return y_NTD.at[part].add(sum(round_.choice(k, y_CD) for k in range(K))), made_CD

    y_NTD = _each_round(hop, all_axes, expert_TK, body, jnp.zeros(parts[0].shape, jnp.float32))
    return y_NTD.reshape(x_TD.shape).astype(x_TD.dtype)


def _backward(kernel: Callable, route: tuple[Hop, ...], all_axes, w_gate_up, w_down, x_TD, expert_TK, weight_TK, dy_TD, dw):
    """(dx, dweight, dw + the weights' gradients), all but dx in float32."""
    if not route:
        _, vjp = jax.vjp(lambda x, w1, w2, g: kernel(x, w1, w2, expert_TK, g), x_TD, w_gate_up, w_down, weight_TK)
        dx_TD, *dw_here, dweight_TK = vjp(dy_TD)
        return dx_TD, dweight_TK, tuple(a + b.astype(jnp.float32) for a, b in zip(dw, dw_here, strict=True))
    hop, K, D = route[0], expert_TK.shape[1], x_TD.shape[1]
    both_TX = jnp.concatenate([x_TD, dy_TD], axis=1)  # travel together, so that one exchange stands before a part's products
    parts = [_split(a, hop.parts) for a in (both_TX, expert_TK, weight_TK)]

    def body(part, round_, carry):
        dx_NTD, dweight_NTK, dw = carry
        rows = _deliver(round_, *(a[part] for a in parts))
        x_CD, dy_CD = jnp.split(rows.x_CX, 2, axis=1)
        made_CD, dweight_CK, dw = _backward(
            kernel, route[1:], all_axes, w_gate_up, w_down, x_CD, rows.expert_CK, rows.weight_CK, dy_CD, dw
        )
        dx_CD, dweight_CK = round_.back(made_CD), round_.back(dweight_CK)
        dweights = [round_.choice(k, dweight_CK) for k in range(K)]
        dweight_NTK = dweight_NTK.at[part].add(sum(dweights) if hop.once else jnp.concatenate(dweights, axis=1))
        return (dx_NTD.at[part].add(sum(round_.choice(k, dx_CD) for k in range(K))), dweight_NTK, dw), made_CD

    init = jnp.zeros((hop.parts, x_TD.shape[0] // hop.parts, D), jnp.float32), jnp.zeros(parts[2].shape, jnp.float32), dw
    dx_NTD, dweight_NTK, dw = _each_round(hop, all_axes, expert_TK, body, init)
    return dx_NTD.reshape(x_TD.shape).astype(x_TD.dtype), dweight_NTK.reshape(weight_TK.shape), dw


def _traffic(route: tuple[Hop, ...], per_node: int, expert_TK, experts: int) -> Traffic:
    """Copies of this device's tokens that leave it, and that leave its node."""
    if not route:
        return Traffic(jnp.float32(0), jnp.float32(0))
    ranks = sum(len(group) for group in route[0].groups)
    me = lax.axis_index("expert")
    rank_TK = expert_TK // (experts // ranks)
    elsewhere = (rank_TK != me).sum(dtype=jnp.float32)
    if not route[0].once:
        return Traffic(elsewhere, (rank_TK // per_node != me // per_node).sum(dtype=jnp.float32))
    plan = _plan(route[0], expert_TK)
    across = jnp.sum(plan.count_R) - plan.count_R[me // per_node]
    # inside a node, a choice moves on unless its expert sits where the first hop put the token: the sender's rank in the node
    moves_on = (rank_TK % per_node != me % per_node).sum(dtype=jnp.float32)
    return Traffic(across + moves_on, across.astype(jnp.float32))


class _Setting(NamedTuple):
    """What forward and backward share: specs, and the axes to gather weights and sum results over."""

    tokens: P
    w_gate_up: P
    w_down: P
    embed: tuple[str, ...]
    ffn: tuple[str, ...]
    all_axes: tuple[str, ...]
    token_axes: tuple[str, ...]


def _setting(layout) -> _Setting:
    shape = layout.mesh.shape
    stored = ("fsdp", "pipe") if layout.is_outside_pipeline else ("fsdp",)  # a stage's weights are not sharded along `pipe`
    embed = tuple(a for a in stored if shape[a] > 1)
    ffn = ("tensor",) if shape["tensor"] > 1 else ()
    return _Setting(
        layout.spec("batch", "sequence", None),
        P("expert", embed or None, None, ffn or None),
        P("expert", ffn or None, embed or None),
        embed,
        ffn,
        tuple(layout.mesh.axis_names),
        layout.axes("batch") + layout.axes("sequence"),
    )


def _weights(s: _Setting, w_gate_up, w_down, x) -> tuple[tuple[Any, Any], Any]:
    """This device's experts, unsharded, and x, which waits for them.

    Gathered behind what computes x, they leave the links to the exchange.
    """
    weights = all_gather(all_gather(w_gate_up, s.ffn, 3), s.embed, 1), all_gather(all_gather(w_down, s.ffn, 1), s.embed, 2)
    return lax.optimization_barrier((weights, x))


def _route(layout, expert_TK, experts: int) -> tuple[Hop, ...]:
    T, K = expert_TK.shape
    parts = math.gcd(layout.expert_parts, T)
    return hops(layout.mesh.shape["expert"], layout.ranks_per_node, layout.two_level, experts, T, K, parts)


def _flat(a):
    return a.reshape(-1, a.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def routed(layout, gemms: Gemms | None, implementation: str, x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK):
    """See `model.layout.Layout.experts`; `layout` is a `MeshLayout`."""
    kernel = functools.partial(grouped_swiglu, gemms=gemms, implementation=implementation)
    s, experts = _setting(layout), w_down_EMD.shape[0]

    def local(x, w_gate_up, w_down, expert, weight):
        weights, x = _weights(s, w_gate_up, w_down, x)
        expert_TK = _flat(expert)
        route = _route(layout, expert_TK, experts)
        y_TD = _forward(kernel, route, s.all_axes, *weights, _flat(x), expert_TK, _flat(weight))
        traffic = _traffic(route, layout.ranks_per_node, expert_TK, experts)
        traffic = all_reduce(traffic, s.token_axes)
        return y_TD.reshape(x.shape), traffic

    in_specs = (s.tokens, s.w_gate_up, s.w_down, s.tokens, s.tokens)
    return layout.on_each_device(local, in_specs, (s.tokens, P()))(x_BLD, w_gate_up_ED2M, w_down_EMD, expert_BLK, weight_BLK)


def _routed_fwd(layout, gemms, implementation, *args):
    return routed(layout, gemms, implementation, *args), args


def _routed_bwd(layout, gemms, implementation, args, cotangents):
    kernel = functools.partial(grouped_swiglu, gemms=gemms, implementation=implementation)
    s, experts = _setting(layout), args[2].shape[0]

    def local(x, w_gate_up, w_down, expert, weight, dy):
        weights, x = _weights(s, w_gate_up, w_down, x)
        expert_TK = _flat(expert)
        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights)
        dx_TD, dweight_TK, (dw_gate_up, dw_down) = _backward(
            kernel,
            _route(layout, expert_TK, experts),
            s.all_axes,
            *weights,
            _flat(x),
            expert_TK,
            _flat(weight),
            _flat(dy),
            zeros,
        )
        E, D, _, M = dw_gate_up.shape
        # as a matrix: XLA:TPU has no reduce-scatter for the layout it gives four axes, and sums everywhere
        dw_gate_up = reduce_scatter(dw_gate_up.reshape(E, D, 2 * M), s.embed, 1).reshape(E, -1, 2, M)
        dw_gate_up = reduce_scatter(dw_gate_up, s.ffn, 3).astype(w_gate_up.dtype)
        dw_down = reduce_scatter(reduce_scatter(dw_down, s.embed, 2), s.ffn, 1).astype(w_down.dtype)
        return dx_TD.reshape(x.shape), dw_gate_up, dw_down, dweight_TK.reshape(weight.shape)

    in_specs = (s.tokens, s.w_gate_up, s.w_down, s.tokens, s.tokens, s.tokens)
    out_specs = (s.tokens, s.w_gate_up, s.w_down, s.tokens)
    dx, dw_gate_up, dw_down, dweight = layout.on_each_device(local, in_specs, out_specs)(*args, cotangents[0])
    return dx, dw_gate_up, dw_down, None, dweight


routed.defvjp(_routed_fwd, _routed_bwd)
