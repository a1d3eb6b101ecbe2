"""What a resume of a script must find unchanged, so that it computes what the undisturbed run would have computed."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash

from lora_kit.errors import ContractError
from lora_kit.integrations import plain
from lora_kit.runs.manifest import Machine, ScriptFacts
from lora_kit.runs.resume import OpenRun
from lora_kit.version import VERSION

PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")
DECIDING = (  # training arguments that decide what is computed; a resume must find them unchanged
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "seed"),
    *("data_seed", "full_determinism", "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("warmup_ratio", "label_smoothing_factor", "bf16", "fp16", "dataloader_drop_last", "neftune_noise_alpha"),
    *("train_sampling_strategy", "max_length", "packing", "padding_free", "beta", "loss_type", "precision"),
)
SAMPLED = 64  # values of a frozen tensor that decide whether it is the same


def facts_of(trainer: Any, run: OpenRun) -> ScriptFacts:
    """Return what the checkpoints of a run record about the run."""
    device = trainer.args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kind = type(trainer)
    return ScriptFacts(
        run_id=run.run_id,
        fencing_token=run.lease.token,
        script=sys.argv[0] or "python",
        trainer=f"{kind.__module__}.{kind.__qualname__}",
        settings=settings_of(trainer),
        versions={"lora_kit": VERSION} | _versions({*PACKAGES, kind.__module__.partition(".")[0]}),
        machine=Machine(trainer.args.world_size, name),
    )


def check(folder: Path, then: ScriptFacts, now: ScriptFacts) -> Iterator[str]:
    """Refuse a resume that would compute something else; yield a warning about each package that has changed.

    Raises:
        ContractError: A setting or the number of processes differs; the message lists all differences.
    """
    before, after = then.settings, now.settings
    rows = [(key, before.get(key), after.get(key)) for key in sorted({*before, *after})]
    rows += [("trainer", then.trainer, now.trainer), ("processes", then.machine.processes, now.machine.processes)]
    changed = [f"  {key}: {was} -> {is_}" for key, was, is_ in rows if was != is_]
    if changed:
        raise ContractError(
            f"{folder}: this start differs from the run:\n" + "\n".join(changed) + "\nA resume computes what the "
            "undisturbed run would have computed; undo the change, or use another folder for a new run"
        )
    for key in sorted({*then.versions, *now.versions}):
        was, is_ = then.versions.get(key, "absent"), now.versions.get(key, "absent")
        if was != is_:
            yield f"{key} {was} -> {is_}: the resume may differ from the undisturbed run by rounding"


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return what a resume must find unchanged: deciding arguments, the data's size, the weights that do not change."""
    arguments = json.loads(json.dumps(trainer.args.to_dict(), default=str))
    settings = {name: arguments[name] for name in DECIDING if arguments.get(name) is not None}
    settings["examples"] = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    settings["steps"] = trainer.state.max_steps
    settings["optimizer"] = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
    settings["frozen weights"] = frozen_digest(trainer.model)
    return settings


def frozen_digest(model: torch.nn.Module) -> str:
    """Return a digest of the frozen weights: their names, shapes and `SAMPLED` values of each."""
    digest = xxhash.xxh3_64()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.device.type != "meta":
            flat = parameter.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(plain.flat_bytes(values).numpy().tobytes())
    return digest.hexdigest()


def _versions(packages: set[str]) -> dict[str, str]:
    found = dict[str, str]()
    for name in sorted(packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
