"""The peers as their documentation runs them: transformers' Trainer with peft, and TRL's SFTTrainer."""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measured import ALPHA, LEARNING_RATE, RANK, Measured
from sizes import IGNORE, LONGEST, Counts, Work
from systems import Setting

Row = dict[str, Any]


class Counted:
    """A collator that notes what is in each batch."""

    def __init__(self, inner: Callable[[list[Row]], Any]) -> None:
        self.inner = inner
        self.batches: list[Counts] = []

    def __call__(self, rows: list[Row]) -> Any:
        lengths = [length for row in rows for length in row.get("seq_lengths") or [len(row["input_ids"])]]
        supervised = sum(label != IGNORE for row in rows for label in row["labels"])
        self.batches.append(Counts(tuple(lengths), supervised))
        return self.inner(rows)


def run_trainer(work: Work, setting: Setting) -> Measured:
    """Train with transformers' Trainer on a model of peft's."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work.base, dtype="auto")
    return _with_trainer(
        get_peft_model(base, _adapter(), autocast_adapter_dtype=not setting.adapter_in_bf16), work, setting
    )


def run_unsloth(work: Work, setting: Setting) -> Measured:
    """Train with transformers' Trainer on a model of Unsloth's."""
    from unsloth import FastLanguageModel

    base, _ = FastLanguageModel.from_pretrained(str(work.base), max_seq_length=LONGEST, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        base, r=RANK, lora_alpha=ALPHA, lora_dropout=0, use_gradient_checkpointing=False
    )
    return _with_trainer(model, work, setting)


def _with_trainer(model: Any, work: Work, setting: Setting) -> Measured:
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(work.base)
    collator = DataCollatorWithFlattening() if setting.flat else DataCollatorForSeq2Seq(tokenizer)
    with tempfile.TemporaryDirectory(dir=work.folder) as out:
        trainer = Trainer(
            model,
            TrainingArguments(out, **_arguments(work, setting)),
            train_dataset=Dataset.from_list(_rows(work, setting)),
            data_collator=collator,
        )
        return _train(trainer)


def run_trl(work: Work, setting: Setting) -> Measured:
    """Train with TRL's SFTTrainer, which makes the adapter itself."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(work.base, dtype="auto")
    own = setting.adapter_in_bf16
    arguments = {"max_length": LONGEST} | _arguments(work, setting)
    with tempfile.TemporaryDirectory(dir=work.folder) as out:
        trainer = SFTTrainer(
            get_peft_model(model, _adapter(), autocast_adapter_dtype=False) if own else model,
            SFTConfig(out, **arguments),
            train_dataset=Dataset.from_list(_rows(work, setting)),
            processing_class=AutoTokenizer.from_pretrained(work.base),
            peft_config=None if own else _adapter(),
        )
        return _train(trainer)


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _rows(work: Work, setting: Setting) -> list[Row]:
    examples = work.examples()
    if setting.by_length:
        steps = [examples[start : start + work.batch] for start in range(0, len(examples), work.batch)]
        examples = [one for step in steps for one in sorted(step, key=lambda example: -len(example.ids))]
    return [{"input_ids": one.ids, "labels": one.labels} for one in examples]


def _arguments(work: Work, setting: Setting) -> dict[str, Any]:
    """Return what TrainingArguments needs to train the same thing, then what the setting is about."""
    rows = min(setting.rows, work.batch)
    packed = setting.arguments.get("packing")
    step = Counts.of(work.examples()).tokens / work.all_steps  # tokens
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": max(1, round(step / LONGEST)) if packed else work.batch // rows,
        **same_training(),
        **setting.arguments,
    }


def same_training() -> dict[str, Any]:
    """Return the arguments of a Trainer that every system and setting has."""
    return {
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def _train(trainer: Any) -> Measured:
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step has ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.data_collator = counted = Counted(trainer.data_collator)
    began = time.perf_counter()
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    many = trainer.args.gradient_accumulation_steps
    return Measured(began, losses, ends, _steps(counted.batches, many), torch.get_num_threads())


def _steps(batches: Sequence[Counts], many: int) -> list[Counts]:
    return [sum(batches[start : start + many], Counts((), 0)) for start in range(0, len(batches), many)]
