"""LoRA fine-tuning that never loses a step.

    import lora_kit as lk

    recipe = lk.load_recipe("recipes/quickstart.yaml")
    run = lk.train(recipe, "runs/first")            # goes on where runs/first stopped
    model, tokenizer = lk.load(run.latest)
    lk.generate(model, tokenizer, ["..."])

Importing this package imports nothing heavy: each name is fetched from its module when it is first used.
"""

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_kit.check import estimate as estimate
    from lora_kit.check import preview as preview
    from lora_kit.evaluation import evaluate as evaluate
    from lora_kit.generation import generate as generate
    from lora_kit.generation import load as load
    from lora_kit.hub import push as push
    from lora_kit.merging import merge as merge
    from lora_kit.recipe import load_recipe as load_recipe
    from lora_kit.run import Run as Run
    from lora_kit.trainer import train as train

# tqdm says this in every notebook without ipywidgets; nothing of ours wants them
warnings.filterwarnings("ignore", message="IProgress not found")
# peft imports it wherever it is installed, and it tells every process of kernels that it can do without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

_HOME = {
    "load_recipe": "recipe",
    "preview": "check",
    "estimate": "check",
    "train": "trainer",
    "Run": "run",
    "load": "generation",
    "generate": "generation",
    "evaluate": "evaluation",
    "push": "hub",
    "merge": "merging",
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
