"""Batches whose examples or whose collator are drawn at random, as in masked language modelling, after a resume.

accelerate fetches one batch ahead, so at the end of a step the next batch has been drawn already, before the generators
had the state that a snapshot has. So the state before the last fetch is part of a snapshot too. After a resume the
first fetch draws from it, and every later one from the generators as they were at the end of the step.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from lora_kit.integrations import plain


class Fetching:
    """Knows the random generators of this process before the last fetch.

    Args:
        again: The generators before the first fetch of a resume and after it, as `plain.random_states` has them; None
            where nothing has been fetched ahead.
    """

    def __init__(self, again: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        self._again = again
        self._before: tuple[Any, Any, torch.Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the fetches of this process from a dataset with an index; those of workers are not seen."""
        original = _MapDatasetFetcher.fetch

        def fetch(fetcher: Any, index: Any) -> Any:
            if get_worker_info() is not None:
                return original(fetcher, index)
            again, self._again = self._again, None
            if again is not None:
                plain.set_random_states(again[0])
            self._before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
            batch = original(fetcher, index)
            if again is not None:
                plain.set_random_states(again[1])
            return batch

        _MapDatasetFetcher.fetch = fetch  # type: ignore[method-assign]
        try:
            yield
        finally:
            _MapDatasetFetcher.fetch = original  # type: ignore[method-assign]

    def forget(self) -> None:
        """Forget the last fetch: it belongs to an epoch that has ended."""
        self._before = None

    def ahead(self) -> dict[str, Any] | None:
        """Return the generators before the last fetch; None if there was none in this epoch."""
        return None if self._before is None else plain.packed_states(*self._before)
