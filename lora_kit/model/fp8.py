"""Load bases that were published in float8 with a scale for each block, on every device and without dequantising them.

The quantiser of transformers dequantises the whole base where no GPU multiplies in float8. This one keeps the codes and
lets each layer multiply by its dequantised weight (kernels/fp8.py).
"""

from typing import Any

import torch
from torch import nn
from transformers import FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from lora_kit.errors import BaseError
from lora_kit.kernels.fp8 import BlockFp8Linear

METHOD = "lora_kit-fp8"  # the `quant_method` that selects this quantiser


@register_quantization_config(METHOD)
class BlockFp8Config(FineGrainedFP8Config):
    """The settings of a published fp8 base."""


@register_quantizer(METHOD)
class BlockFp8Quantizer(FineGrainedFP8HfQuantizer):
    """Loads codes and scales as they are."""

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Accept every device."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Replace the layers of transformers.

        Raises:
            BaseError: A layer that is not linear is in float8.
        """
        super()._process_model_after_weight_loading(model, **kwargs)
        for name, module in model.named_modules():
            if type(module) is FP8Linear:
                _become(module, BlockFp8Linear)
            elif type(module).__name__.startswith("FP8"):
                raise BaseError(
                    f"base.repo: {name} ({type(module).__name__}) is in fp8, and only linear layers are trained so; "
                    "choose the base in bfloat16"
                )
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, BlockFp8Linear):
                module.weight = nn.Parameter(module.dequantized(dtype or model.dtype), requires_grad=False)
                del module.weight_scale_inv
                _become(module, nn.Linear)
        return model


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a layer, whose tensors stay."""
    module.__class__ = kind
