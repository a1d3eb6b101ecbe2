"""Write the model card (README.md) of an adapter on the Hub: how to load it, and how it was trained.

`card.md.jinja` is the card. Its content comes only from the checkpoint's manifest and the run's scores, so equal
checkpoints have equal cards. Unknown values are left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from lora_kit.recipe.load import BUILTIN
from lora_kit.recipe.schema import ANSWER_METRIC, Hub
from lora_kit.runs.certificate import Certificate
from lora_kit.runs.manifest import Manifest
from lora_kit.views.console import number

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(
    repo: str,
    manifest: Manifest,
    *,
    revision: str | None = None,
    scores: Mapping[str, Any] | None = None,
    drill: Certificate | None = None,
) -> str:
    """Return README.md for an adapter on the Hub.

    Args:
        repo: The repository, `user/name`.
        manifest: The manifest to publish, without paths of this machine.
        revision: The branch; None for the default branch.
        scores: The metrics of `base` and `adapter` from result.json; None if this checkpoint was not measured.
        drill: The certificate of a drill of this recipe, in which nothing differed; None if there is none.
    """
    recipe, commit = manifest.run.recipe, manifest.run.fingerprints.base.commit
    base, hub = recipe["base"]["repo"], Hub.model_validate(recipe["hub"])
    metadata = ModelCardData(
        base_model=base if commit else None,
        base_model_relation="adapter" if commit else None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=hub.licence,
        tags=["lora", "lora_kit", "transformers", *([f"base_model:adapter:{base}"] if commit else [])],
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        repo=repo,
        revision=revision,
        metadata=metadata.to_yaml(),
        recipe=recipe,
        train_source=_sources(recipe["data"]["train"]),
        validation_source=_sources(recipe["data"]["validation"]),
        run=manifest.run,
        progress=manifest.progress,
        scores=scores or {},
        preferences=any("rewards/margins" in score.get("metrics", {}) for score in (scores or {}).values()),
        further=_further(scores or {}),
        drill=drill,
        shipped=base.startswith(BUILTIN),
        number=number,
    )


def _further(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return name and format of the figures of the card's second table: those that both base and adapter have."""
    known = dict.fromkeys(get_args(ANSWER_METRIC), ".1%") | {"text_loss": ".4f", "forgetting": "+.4f"}
    metrics = [score.get("metrics", {}) for score in scores.values()]
    return {name: spec for name, spec in known.items() if metrics and all(name in each for each in metrics)}


def _sources(given: Any) -> str:
    """Return a recipe's sources as Markdown: the name of each, with its weight or epochs in a mixture."""
    if given is None:
        return "-"
    if not isinstance(given, list | dict):
        return f"`{given}`"
    entries = given.values() if isinstance(given, dict) else given
    return ", ".join(_source({"source": entry} if isinstance(entry, str) else entry) for entry in entries)


def _source(entry: Mapping[str, Any]) -> str:
    shares = [f"{key} {entry[key]:g}" for key in ("weight", "epochs") if entry.get(key) is not None]
    return f"`{entry['source']}`" + (f" ({', '.join(shares)})" if shares else "")
