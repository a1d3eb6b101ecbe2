"""Write the model card (README.md) of an adapter on the Hub: how to load it, and how it was trained.

The content comes only from the checkpoint's manifest and the run's scores, so equal checkpoints have equal cards.
Unknown values are left out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from huggingface_hub import ModelCardData

from lora_kit.recipe.load import BUILTIN
from lora_kit.recipe.schema import Hub
from lora_kit.runs.manifest import BaseFingerprint, Manifest, RunFacts

HYPERPARAMETERS = ("adapter", "objective", "optim", "train")


def model_card(
    repo: str, manifest: Manifest, *, revision: str | None = None, scores: Mapping[str, Any] | None = None
) -> str:
    """Return README.md for an adapter on the Hub.

    Args:
        repo: The repository, `user/name`.
        manifest: The manifest to publish, without paths of this machine.
        revision: The branch; None for the default branch.
        scores: The metrics of `base` and `adapter` from result.json; None if this checkpoint was not measured.
    """
    facts, recipe, commit = manifest.run, manifest.run.recipe, manifest.run.fingerprints.base.commit
    base, hub = recipe["base"]["repo"], Hub.model_validate(recipe["hub"])
    data = ModelCardData(
        base_model=base if commit else None,
        base_model_relation="adapter" if commit else None,
        library_name="peft",
        pipeline_tag="text-generation",
        license=hub.licence,
        tags=["lora", "lora_kit", "transformers", *([f"base_model:adapter:{base}"] if commit else [])],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo}",
        f"A LoRA adapter of rank {recipe['adapter']['rank']} for {_base(base, commit)}, after step "
        f"{manifest.progress.step:,} ({manifest.progress.examples_seen:,} examples seen). Trained with lora_kit "
        f"{facts.versions['lora_kit']}; this card was generated from the run's records.",
        _usage(repo, recipe["base"], commit, revision),
        "## Base\n\n" + _table(("", ""), _base_rows(recipe["base"], facts.fingerprints.base)),
        "## Data\n\n" + _table(("", "train", "validation"), _data_rows(facts)),
    ]
    if measured := list(_score_rows(manifest, scores)):
        parts.append("## Validation\n\n" + _table(("", "loss", "perplexity", "exact match", "examples"), measured))
    fields = [(f"`{name}.{key}`", value) for name in HYPERPARAMETERS for key, value in recipe[name].items()]
    fields = [(name, value) for name, value in fields if value is not None]
    parts += [
        "## Hyperparameters\n\n[recipe.yaml](recipe.yaml) has the complete recipe.\n\n"
        + _table(("field", "value"), fields),
        "## Versions\n\n" + _table(("package", "version"), facts.versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _base(base: str, commit: str | None) -> str:
    if commit:
        return f"`{base}` at revision `{commit}`"
    if base.startswith(BUILTIN):
        return f"`{base}`, the tiny base that ships with lora_kit"
    return f"a base from a local folder, `{base}`, that is not on the Hub"


def _base_rows(section: Mapping[str, Any], fingerprint: BaseFingerprint) -> Iterator[tuple[str, Any]]:
    yield "base", f"`{section['repo']}`"
    yield (
        "revision",
        f"`{fingerprint.commit}`"
        if fingerprint.commit
        else ("none: shipped" if section["repo"].startswith(BUILTIN) else "none: a local folder"),
    )
    yield "dtype", section["dtype"]
    for name, digest in fingerprint.files.items():
        if name.endswith(".safetensors"):
            yield f"SHA-256 of {name}", f"`{digest}`"


def _data_rows(facts: RunFacts) -> Iterator[tuple[Any, ...]]:
    section, datasets = facts.recipe["data"], (facts.data.train, facts.data.validation)
    yield "source", f"`{section['train']}`", "-" if section["validation"] is None else f"`{section['validation']}`"
    for key in ("format", "examples", "tokens", "trained_tokens"):
        values = [asdict(counts)[key] if counts else "-" for counts in datasets]
        label = key.replace("_", " ")
        yield label, *(f"{value:,}" if isinstance(value, int) else value for value in values)
    digests = [facts.fingerprints.train, facts.fingerprints.validation]
    yield "SHA-256 of the tokens", *(f"`{digest}`" if digest else "-" for digest in digests)


def _score_rows(manifest: Manifest, scores: Mapping[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    for name, score in (scores or {}).items():
        match = "-" if score["exact_match"] is None else f"{score['exact_match']:.1%} of {score['answered']}"
        yield name, f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", match, score["examples"]
    loss, validation = manifest.progress.held_out_loss, manifest.run.data.validation
    if not scores and loss is not None and validation is not None:
        yield "adapter", f"{loss:.4f}", "-", "-", validation.examples


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _usage(repo: str, section: Mapping[str, Any], commit: str | None, revision: str | None) -> str:
    branch = f', revision="{revision}"' if revision else ""
    where = f'"{section["repo"]}", revision="{commit}"' if commit else '"path/to/the/base"'
    own = "" if commit or section["repo"].startswith(BUILTIN) else ', base="path/to/the/base"'
    return f"""## How to load it

With lora_kit, which verifies the files of adapter and base:

```python
import lora_kit as lk

model, tokenizer = lk.load("{repo}{"@" + revision if revision else ""}"{own})
print(lk.generate(model, tokenizer, ["your prompt"])[0])
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({where}, dtype="{section["dtype"]}")
model = PeftModel.from_pretrained(base, "{repo}"{branch})
tokenizer = AutoTokenizer.from_pretrained("{repo}"{branch})
```"""
