"""How an array travels between replicas: cut into shares, the shares into blocks, codes and scales in one message."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

from dsv3_jax.exchange.codec import SCALE_BYTES, SMALLEST_BLOCK, Codec


def has_shares(shape: tuple[int, ...], replicas: int) -> bool:
    """Whether each replica's share of an array would fill a block."""
    return math.prod(shape) >= replicas * SMALLEST_BLOCK


def split_axis(shape: tuple[int, ...], replicas: int) -> int | None:
    """The first axis that can be cut into a share for each replica, of runs that fill a block; None if there is none."""

    def fits(axis: int) -> bool:
        return shape[axis] % replicas == 0 and math.prod(shape[axis:]) // replicas >= SMALLEST_BLOCK

    return next(filter(fits, range(len(shape))), None)


@dataclass(frozen=True)
class Wire:
    """How an array of `shape` travels: in a share for each replica, cut along axis `cut`.

    A share consists of runs: numbers that lie together in memory. Each run is a whole number of blocks of `codec`, so that
    only codes ever move.
    """

    shape: tuple[int, ...]
    cut: int
    replicas: int
    codec: Codec

    @classmethod
    def of(cls, shape: tuple[int, ...], replicas: int, codec: Codec) -> "Wire":
        """The wire of an array that `split_axis` can cut, in blocks at most as large as those of `codec`."""
        cut = split_axis(shape, replicas)
        assert cut is not None, f"{shape} has no axis to cut in {replicas}"
        return cls(shape, cut, replicas, codec.fitted(math.prod(shape[cut:]) // replicas))

    @property
    def runs(self) -> int:
        """Runs per share."""
        return math.prod(self.shape[: self.cut])

    @property
    def run_size(self) -> int:
        """Elements per run."""
        return math.prod(self.shape[self.cut :]) // self.replicas

    @property
    def blocks(self) -> int:
        """Blocks per run."""
        return -(-self.run_size // self.codec.block)

    @property
    def share_bytes(self) -> int:
        """Bytes of a share's codes and scales."""
        return self.runs * self.blocks * self.codec.block_bytes

    def to_blocks(self, a: Float[Array, "..."], fill: float = 0) -> Float[Array, "rows block"]:
        """The blocks of the array, or of one share of it; the last block of each run is padded with `fill`."""
        rows = a.reshape(-1, self.run_size)
        extra = self.blocks * self.codec.block - self.run_size
        return jnp.pad(rows, ((0, 0), (0, extra)), constant_values=fill).reshape(-1, self.codec.block)

    def from_blocks(self, rows: Float[Array, "rows block"], shares: int) -> Float[Array, "..."]:
        """The array, or one share of it: `shares` is the number of replicas, or 1."""
        runs = rows.reshape(-1, self.blocks * self.codec.block)[:, : self.run_size]
        return runs.reshape(
            *self.shape[: self.cut], self.shape[self.cut] // self.replicas * shares, *self.shape[self.cut + 1 :]
        )

    def message(self, codes: UInt8[Array, "rows code_bytes"], scales: Float[Array, " rows"]) -> UInt8[Array, "shares bytes"]:
        """Codes and scales of the array's blocks, or of one share's, as bytes by share."""

        def by_share(a: UInt8[Array, "rows row_bytes"]) -> UInt8[Array, "shares bytes"]:
            of_runs = jnp.moveaxis(a.reshape(self.runs, -1, self.blocks * a.shape[1]), 1, 0)
            return of_runs.reshape(of_runs.shape[0], -1)

        return jnp.concatenate([by_share(codes), by_share(lax.bitcast_convert_type(scales, jnp.uint8))], 1)

    def read(
        self, sent: UInt8[Array, "shares bytes"]
    ) -> tuple[UInt8[Array, "shares rows code_bytes"], Float[Array, "shares rows"]]:
        """(codes, scales) of a message, a share's blocks being rows."""
        rows = self.runs * self.blocks
        codes, scales = jnp.split(sent, [sent.shape[1] - rows * SCALE_BYTES], 1)
        shares = sent.shape[0]
        scales = lax.bitcast_convert_type(scales.reshape(shares, rows, SCALE_BYTES), jnp.float32)
        return codes.reshape(shares, rows, -1), scales

    def read_in_order(
        self, sent: UInt8[Array, "shares bytes"]
    ) -> tuple[UInt8[Array, "1 all code_bytes"], Float[Array, "1 all"]]:
        """As `read`, but the blocks of all shares in the order that the array has them in."""

        def in_order(a: Shaped[Array, "shares rows ..."]) -> Shaped[Array, "1 all ..."]:
            by_run = a.reshape(a.shape[0], self.runs, self.blocks, *a.shape[2:])
            return jnp.moveaxis(by_run, 0, 1).reshape(1, -1, *a.shape[2:])

        codes, scales = self.read(sent)
        return in_order(codes), in_order(scales)

    def own_share(self, a: Float[Array, "..."], mesh_axis: str) -> Float[Array, "..."]:
        """This replica's share of an array of the shape, where `mesh_axis` is manual."""
        size = self.shape[self.cut] // self.replicas
        return lax.dynamic_slice_in_dim(a, lax.axis_index(mesh_axis) * size, size, self.cut)
