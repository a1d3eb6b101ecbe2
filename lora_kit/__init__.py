"""LoRA fine-tuning that never loses a step.

    import lora_kit as lk

    recipe = lk.load_recipe("recipes/quickstart.yaml")
    run = lk.train(recipe, "runs/first")            # resumes if runs/first was interrupted
    model, tokenizer = lk.load(run.latest)
    lk.generate(model, tokenizer, ["..."])

Importing this package is fast: a name is imported from its module when it is first used.
"""

import logging
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_kit.version import VERSION

if TYPE_CHECKING:
    from lora_kit.artifacts.answering import generate as generate
    from lora_kit.artifacts.hub import push as push
    from lora_kit.artifacts.load import load as load
    from lora_kit.artifacts.merging import merge as merge
    from lora_kit.check import estimate as estimate
    from lora_kit.check import preview as preview
    from lora_kit.data.messages import question as question
    from lora_kit.recipe.load import load_recipe as load_recipe
    from lora_kit.runs.run import Run as Run
    from lora_kit.training.evaluation import evaluate as evaluate
    from lora_kit.training.loop import train as train

if sys.platform != "linux":
    warnings.warn(
        f"lora_kit is made for Linux and is not tested on {sys.platform}: `lora-kit train` does not start there; on "
        "Windows use WSL 2. The README's last list of limits says what else to expect",
        stacklevel=2,
    )
# tqdm warns in every notebook without ipywidgets, which lora_kit does not use
warnings.filterwarnings("ignore", message="IProgress not found")
# peft imports bitsandbytes if it is installed, and bitsandbytes logs about missing optional kernels in every process
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = VERSION

_HOME = {
    "load_recipe": "recipe.load",
    "preview": "check",
    "estimate": "check",
    "train": "training.loop",
    "Run": "runs.run",
    "load": "artifacts.load",
    "generate": "artifacts.answering",
    "question": "data.messages",
    "evaluate": "training.evaluation",
    "push": "artifacts.hub",
    "merge": "artifacts.merging",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_kit' has no attribute {name!r}")
    value = getattr(import_module(f"lora_kit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
