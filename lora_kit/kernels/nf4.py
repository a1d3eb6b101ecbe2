"""A linear layer in 4 bits (nf4) whose codes and scales are plain parameters, so that they can be sharded.

bitsandbytes' own layer keeps the scales in a Python object beside its weight, which FSDP does not see. The numbers are
those of bitsandbytes: blocks of 64 weights with a scale each, and the scales in 8 bits, in blocks of 256.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

PARTS = ("weight", "absmax", "nested_absmax", "offset")  # the parameters of Nf4Linear that hold the quantised weight


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose weight [outputs, inputs] is held in 4 bits.

    Attributes:
        weight: Two codes in each byte, [outputs * inputs / 2, 1].
        absmax: The scale of each block of 64 weights in 8 bits, [blocks, 1].
        nested_absmax: The scale of each block of 256 scales.
        offset: The mean of the scales, which is subtracted before they are quantised.
    """

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        """Make a layer without values on the device `meta`; it computes in `dtype`."""
        super().__init__(inputs, outputs, bias=False, device="meta", dtype=dtype)
        blocks = -(-inputs * outputs // 64)
        self.dtype = dtype
        self.register_parameter("bias", bias)
        self.weight = _frozen((-(-inputs * outputs // 2), 1), torch.uint8)
        self.absmax = _frozen((blocks, 1), torch.uint8)
        self.nested_absmax, self.offset = _frozen((-(-blocks // 256),), torch.float32), _frozen((), torch.float32)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Multiply as bitsandbytes' layer does."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        output: Tensor = _bitsandbytes().matmul_4bit(
            x.to(self.dtype), self.weight, bias=bias, quant_state=self._quant_state()
        )
        return output.to(x.dtype)

    def dequantized(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weight in the layer's dtype."""
        dense: Tensor = _bitsandbytes().functional.dequantize_4bit(self.weight.data, self._quant_state())
        return dense

    @property
    def uncounted(self) -> int:
        """How many weights the layer has more than its parameters have elements."""
        return self.in_features * self.out_features - sum(getattr(self, part).numel() for part in PARTS)

    def _quant_state(self) -> Any:
        functional, maps = _bitsandbytes().functional, _maps(self.weight.device)
        nested = functional.QuantState(
            self.nested_absmax.data, code=maps[1], blocksize=256, dtype=torch.float32, shape=self.absmax.shape[:1]
        )
        return functional.QuantState(
            self.absmax.data.view(-1),
            shape=torch.Size((self.out_features, self.in_features)),
            code=maps[0],
            blocksize=64,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.offset.data,
            state2=nested,
        )


def quantize(weight: Float[Tensor, "outputs inputs"]) -> dict[str, Tensor]:
    """Return the values of `PARTS` for a weight."""
    codes, state = _bitsandbytes().functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = state.absmax.view(-1, 1)
    return dict(zip(PARTS, (codes, scales, state.state2.absmax, state.offset), strict=True))


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


@cache
def _maps(device: torch.device) -> tuple[Float[Tensor, "16"], Float[Tensor, "256"]]:
    """Return bitsandbytes' tables of the values of a 4-bit code and of an 8-bit scale."""
    _, state = _bitsandbytes().functional.quantize_4bit(
        torch.zeros(64, device=device), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return state.code, state.state2.code
