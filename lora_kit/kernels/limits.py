"""Sizes of the kernels that also decide how much memory a run needs; `model/sizes.py` estimates from the same numbers.

This module imports nothing, so that an estimate does not have to import torch.
"""

GATED_MLP = ("gate_proj", "up_proj", "down_proj")  # the linear layers that kernels/mlp.py computes in one function
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}  # logits held at once: a GPU reads the head again for each chunk of rows
LOGITS_IN_CACHE = 1 << 18  # on a CPU softmax is computed in chunks of so many logits, which stay in its cache
QUERIES = 256  # most queries of a block: smaller blocks make slow products, larger blocks more masked scores
ROW_MULTIPLE = 32
"""On a CPU the number of rows of a product is rounded up to a multiple of this. oneDNN compiles code for every distinct
number of rows, several MB for the products of a model, and never frees it."""
