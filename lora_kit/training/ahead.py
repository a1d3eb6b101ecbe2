"""A process that prepares a run's data while another process still imports torch; it needs no torch itself.

The tokens go into the cache, where the training process finds them. The keeper ends this process as soon as training
processes start, so it only saves time where the data is small, and there it is half of a start.
"""

import signal
import sys
from contextlib import suppress

from lora_kit.data import sources
from lora_kit.data.plan import prepare_data
from lora_kit.data.urls import is_url
from lora_kit.host import end_with_parent
from lora_kit.model.source import Source
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import resolve_path
from lora_kit.training.request import TrainRequest


def prepare(request: str) -> None:
    """Prepare the data of a `TrainRequest`, given as JSON, if its base and its data are local files."""
    recipe = TrainRequest.from_json(request).recipe
    folder = resolve_path(recipe, recipe.base.repo)
    names = [source.source for source in recipe.data.sources]
    if (
        folder is None
        or recipe.base.trust_remote_code
        or any(map(is_url, names))  # two processes would download the same
        or None in [sources.files(name, recipe.folder) for name in names]
    ):
        return
    prepare_data(recipe, load_renderer(Source(recipe.base.repo, folder, None, {}), recipe))


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    with suppress(Exception):  # the training process meets the same error and reports it
        prepare(sys.argv[1])
