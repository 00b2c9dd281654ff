"""When a layer's products leave 8 bits for 16, and when they come back.

A class of products leaves as soon as a statistic passes its limit: numbers that are not finite, too many that become zero, too
large an error, or a largest magnitude far above what it has been. It comes back after `cooldown` steps in a row in which all
stood below half of their limits. Everything is arrays inside the training step: decisions are the same in every process,
the memory is in the checkpoint, and a step that is run again decides the same.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.precision.switch import OPERANDS, SLOTS
from pallas_kernels.scaled import Gemms

# What may become zero, and how wrong a sample may be. Of normal numbers e4m3 loses none and errs by 2.6%, e5m2 by 5.2%; int8,
# whose steps are even, makes 1% zero (of gradients, whose tails are long, ten times that) and errs by 0.7%.
LIMITS = {"e4m3": (0.01, 0.08), "e5m2": (0.01, 0.16), "int8": (0.5, 0.08)}
_JUMP = 5.0  # doublings of the largest magnitude over its running mean
_MOMENTUM = 0.9
_RETURN_BELOW = 0.5  # of every limit
CAUSES = ("overflow", "underflow", "error", "jump")


class Memory(NamedTuple):
    """What is remembered of the switches of one module, N of them (layers) if it is stacked; part of checkpoints."""

    eight_bit: Bool[Array, "*N"]
    calm: Int[Array, "*N"]  # steps in a row below what allows a return
    log_amax: Float[Array, "*N slots operands"]  # running mean of the binary logarithm; NaN before the first


class Decision(NamedTuple):
    """What a step decided. `change`: -1 leaves 8 bits, 1 comes back, 0 stays. The cause is what exceeds its limit most."""

    eight_bit: Bool[Array, "*N"]  # from the next step on
    change: Int[Array, "*N"]
    cause: Int[Array, "*N"]  # index into CAUSES
    operand: Int[Array, "*N"]  # index into OPERANDS
    severity: Float[Array, "*N"]


def _update(memory: Memory, statistics: Array, gemms: Gemms, cooldown: int) -> tuple[Memory, Decision]:
    """One module's switches after a step; `statistics` is f32[*N, slots, operands, statistics], summed over microbatches."""
    count, amax, overflow, underflow, error = jnp.moveaxis(statistics, -1, 0)
    seen = count > 0
    amax, overflow, underflow, error = (
        jnp.where(seen, a / jnp.maximum(count, 1), 0) for a in (amax, overflow, underflow, error)
    )
    limits = [LIMITS[gemms.forward], LIMITS[gemms.forward], LIMITS[gemms.dgrad]]  # of x, w and dy
    zeros, errors = jnp.asarray(limits, jnp.float32).T
    log_amax = jnp.where(amax > 0, jnp.log2(amax), memory.log_amax)
    usual = jnp.where(jnp.isnan(memory.log_amax), log_amax, memory.log_amax)
    jump = jnp.where(jnp.isnan(usual), 0, jnp.maximum(log_amax - usual, 0)) / _JUMP
    broken = (overflow > 0) | ~jnp.isfinite(amax)
    parts = [jnp.where(broken, jnp.inf, 0), underflow / zeros, error / errors, jump]
    severity = jnp.nan_to_num(jnp.stack(parts, axis=-1), nan=jnp.inf)  # [*N, slots, operands, causes]

    flat = severity.reshape(*severity.shape[:-3], -1)
    worst, at = flat.max(-1), flat.argmax(-1)
    calm = jnp.where(worst < _RETURN_BELOW, memory.calm + 1, 0)
    leaves = memory.eight_bit & (worst > 1)
    returns = ~memory.eight_bit & (calm >= cooldown)
    change = jnp.where(leaves, -1, jnp.where(returns, 1, 0))
    usual = jnp.where(jnp.isfinite(log_amax), _MOMENTUM * usual + (1 - _MOMENTUM) * log_amax, usual)
    eight_bit = (memory.eight_bit & ~leaves) | returns
    cause, operand = at % len(CAUSES), at // len(CAUSES) % len(OPERANDS)
    return Memory(eight_bit, jnp.where(change != 0, 0, calm), usual), Decision(eight_bit, change, cause, operand, worst)


def _switches(template: nnx.State) -> dict[str, nnx.Variable]:
    """A model's `EightBit` variables by the names of their switches, such as moe_blocks/attention."""
    return {"/".join(str(p) for p in path[:-2] if p != "linear"): variable for path, variable in nnx.to_flat_state(template)}


def init(template: nnx.State) -> dict[str, Memory]:
    """The memory at the start: all products in 8 bits. `template` has a model's `EightBit` variables, here and below."""
    kept = (max(SLOTS.values()) + 1, len(OPERANDS))
    shapes = {name: variable.get_value().shape for name, variable in _switches(template).items()}
    return {
        name: Memory(jnp.ones(N, bool), jnp.zeros(N, jnp.int32), jnp.full((*N, *kept), jnp.nan, jnp.float32))
        for name, N in shapes.items()
    }


def flags(template: nnx.State, memory: dict[str, Memory]) -> nnx.State:
    """The model's `EightBit` variables with the choices that the memory holds."""
    values = iter(memory[name].eight_bit for name in _switches(template))
    return nnx.from_flat_state([(path, v.replace(next(values))) for path, v in nnx.to_flat_state(template)])


def update(
    template: nnx.State, memory: dict[str, Memory], probe_grads: nnx.State, cooldown: int
) -> tuple[dict[str, Memory], dict[str, Decision]]:
    """Decide for every module after a step, from the gradients of the probes.

    Args:
        memory: by switch, as `init` or the step before returned it.
        probe_grads: the gradients of the model's `Probe` variables, summed over microbatches, replicas and devices.
        cooldown: calm steps in a row after which a module returns to 8 bits.

    Returns:
        The memory for the next step, and this step's decisions, both by switch.
    """
    statistics = {name: probe.get_value() for name, probe in _switches(probe_grads).items()}
    both = {
        name: _update(memory[name], statistics[name], flag.get_metadata("gemms"), cooldown)
        for name, flag in _switches(template).items()
    }
    return {name: m for name, (m, _) in both.items()}, {name: d for name, (_, d) in both.items()}


def shares(decisions: dict[str, Decision]) -> dict[str, float]:
    """The share of switches that are in 8 bits, for metrics.jsonl; {} without a controller."""
    states = [np.atleast_1d(d.eight_bit) for d in decisions.values()]
    return {"eight_bit_share": float(np.concatenate(states).mean())} if states else {}


def log_lines(step: int, template: nnx.State, decisions: dict[str, Decision]) -> list[dict[str, Any]]:
    """What changed after `step` steps, and why: an object for each line of decisions.jsonl."""
    classes, found = {name: flag.get_metadata("op_class") for name, flag in _switches(template).items()}, []
    for name, decision in decisions.items():
        decision: Any = Decision(*(np.atleast_1d(a) for a in decision))  # type: ignore[arg-type]
        for layer in np.flatnonzero(decision.change):
            severity = float(decision.severity[layer])
            line = {"step": step, "switch": name, "layer": int(layer), "op_class": classes[name]}
            if decision.change[layer] > 0:
                line |= {"bits": 8, "cause": "calm"}
            else:
                operand = OPERANDS[int(decision.operand[layer])]
                line |= {"bits": 16, "cause": CAUSES[int(decision.cause[layer])], "operand": operand}
            # JSON knows no infinity
            found.append(line | {"worst_over_limit": severity if np.isfinite(severity) else None})
    return found


def describe(line: dict[str, Any]) -> str:
    """One of `log_lines` as a sentence."""
    where = f"step {line['step']}  {line['switch']}[{line['layer']}] ({line['op_class']}) to {line['bits']} bits"
    worst = "not finite" if line["worst_over_limit"] is None else f"{line['worst_over_limit']:.3g} of the limit"
    return f"{where}: {line['cause']}{' of ' + line['operand'] if 'operand' in line else ''}, {worst}"
