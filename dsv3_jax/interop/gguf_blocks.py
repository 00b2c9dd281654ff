"""GGUF's blocks of 32 numbers, from integer weights without rounding them again.

| type | a block | w |
|---|---|---|
| Q4_0 | f16 d, 16 bytes: code i in the low half of byte i, code i + 16 in its high half | d * (code - 8) |
| Q4_1 | f16 d, f16 m, 16 bytes of the same | d * code + m |
| Q8_0 | f16 d, 32 i8 | d * code |
"""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from dsv3_jax.errors import UserError
from dsv3_jax.interop.quantized import QuantizedTensor, Tensor, as_dense
from dsv3_jax.interop.quantized_modules import described
from pallas_kernels.integer_weight import IntegerFormat

BLOCK = 32


def type_of(format: IntegerFormat, name: str, inputs: int) -> Type:
    """The type that holds an integer format's codes. Raises `UserError` naming the tensor where none does."""
    which = f"{name} has {described(format)}"
    if format.bits == 8 and not format.symmetric:
        raise UserError(f"{which}; GGUF has no type of 8 bits with zero points: use symmetric groups, or at most 4 bits")
    if inputs % BLOCK or format.group % BLOCK:
        raise UserError(f"{which} and {inputs} inputs; GGUF's blocks want both to be multiples of {BLOCK}")
    return Type.Q8_0 if format.bits == 8 else Type.Q4_0 if format.symmetric else Type.Q4_1


def byte_shape(shape: tuple[int, ...], type: Type) -> tuple[int, ...]:
    """The shape of a tensor's bytes."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    return (*shape[:-1], shape[-1] // block * size)


def _halves(codes: np.ndarray) -> np.ndarray:
    """u8[..., 16] of codes u8[..., 32]."""
    return codes[..., :16] | codes[..., 16:] << 4


def _encode_integers(w: QuantizedTensor, type: Type) -> np.ndarray:
    rows, inputs = w.shape
    codes = w.codes.reshape(rows, -1, BLOCK)
    scale, zeros = (np.repeat(x, w.format.group // BLOCK, axis=1)[..., None] for x in (w.scale, w.zeros))
    parts = [scale.view(np.uint8)]
    if type == Type.Q8_0:
        parts += [codes - zeros]  # modulo 256, which is i8
    elif type == Type.Q4_0:
        parts += [_halves(codes + np.uint8(8) - zeros)]
    else:
        parts += [(-scale.astype(np.float32) * zeros).astype(np.float16).view(np.uint8), _halves(codes)]
    return np.concatenate(parts, axis=-1).reshape(byte_shape((rows, inputs), type))


def encode(tensor: Tensor, type: Type) -> np.ndarray:
    """The bytes u8[..., n] of a tensor: integer codes as they are where the type holds them, numbers rounded to it."""
    if isinstance(tensor, QuantizedTensor) and type in (Type.Q4_0, Type.Q4_1, Type.Q8_0):
        return _encode_integers(tensor, type)
    rounded = gguf.quants.quantize(np.ascontiguousarray(as_dense(tensor), dtype=np.float32), type)
    return rounded.view(np.uint8).reshape(byte_shape(tensor.shape, type))
