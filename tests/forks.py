"""Which keys the queries of an example see that forks into two branches, as an oracle."""

import torch

from lora_kit.kernels.attention import visible


def visible_in(length, window, fork):
    """Return which keys (columns) a query (row) sees, composed of the two sequences that share their beginning."""
    if fork is None:
        return visible(length, window, torch.device("cpu"))
    seen, (shared, second) = torch.zeros(length, length, dtype=torch.bool), fork
    for places in (torch.arange(second), torch.cat([torch.arange(shared), torch.arange(second, length)])):
        seen[places[:, None], places] = visible(len(places), window, torch.device("cpu"))
    return seen
