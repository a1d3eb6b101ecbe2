"""Linear layers whose frozen weight is in float8 with a scale for each block, as DeepSeek and Qwen publish them.

The weight is dequantised where it is multiplied, and activations are not rounded, so training computes what it would
compute with the dequantised weights. transformers' own layer multiplies in float8 and needs an NVIDIA GPU from Ada on.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class BlockFp8Linear(nn.Linear):
    """A frozen linear layer in float8 (e4m3).

    Attributes:
        weight: Codes [outputs, inputs], float8_e4m3fn.
        weight_scale_inv: The factor of each block of codes, [block rows, block columns], or of all codes, [].
        block_size: Rows and columns of a block; None if there is one factor.
    """

    weight_scale_inv: Tensor
    block_size: tuple[int, int] | None

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        """Return the weight that the codes stand for."""
        factors = self.weight_scale_inv.float()
        if self.block_size is not None:
            rows, columns = self.block_size  # the last block of a row or column may be smaller
            factors = factors.repeat_interleave(rows, 0)[: self.out_features]
            factors = factors.repeat_interleave(columns, 1)[:, : self.in_features]
        return self.weight.float().mul_(factors).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantized(input.dtype), self.bias)
