"""The time of a step of a transformers Trainer with and without a LiveCheckpoint, in one training.

Blocks of steps with and without it follow each other, so whatever else the machine does meets both alike. The first
step of each block is left out: in it the state of the last step of the block before may still be copied.
"""

import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from lora_kit.integrations.transformers import LiveCheckpoint

TOKENS, ROWS, BLOCK = 128, 2, 5
WARM_UP_SECONDS = 3.0  # in which the keeper starts, which competes for the cores once in a run


class Alternating(LiveCheckpoint):
    """A LiveCheckpoint that does nothing in every second block of steps, and takes the time of all."""

    plain = False

    def on_step_begin(self, args, state, control, **named):
        now = time.perf_counter(), time.process_time()
        self.moments.append((state.global_step, *now))
        self.plain = state.global_step // BLOCK % 2 == 1
        if not self.plain:
            super().on_step_begin(args, state, control, **named)

    def on_pre_optimizer_step(self, args, state, control, **named):
        if not self.plain:
            super().on_pre_optimizer_step(args, state, control, **named)

    def training_step(self, *arguments, **named):
        return (self._original["training_step"] if self.plain else super().training_step)(*arguments, **named)

    def get_batch_samples(self, *arguments, **named):
        return (self._original["get_batch_samples"] if self.plain else super().get_batch_samples)(*arguments, **named)

    def _maybe_log_save_evaluate(self, *arguments, **named):
        name = "_maybe_log_save_evaluate"
        return (self._original[name] if self.plain else super()._maybe_log_save_evaluate)(*arguments, **named)


def measure(folder: Path, base: Path, *, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Train for so many steps; return the seconds and CPU seconds of the steps of both sides."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    ids = list(range(2, 10)) * (TOKENS // 8)
    arguments = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=ROWS,
        max_steps=steps,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"input_ids": ids, "labels": ids}] * (ROWS * steps))
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=data)
    Alternating.moments = []
    Alternating(trainer, folder / "run")
    trainer.train()
    seconds, began = {"plain": [], "attached": []}, Alternating.moments[0][1]
    for (step, before, cpu_before), (_, after, cpu_after) in zip(
        Alternating.moments, Alternating.moments[1:], strict=False
    ):
        if step % BLOCK and before - began > WARM_UP_SECONDS:
            side = "plain" if step // BLOCK % 2 == 1 else "attached"
            seconds[side].append((after - before, cpu_after - cpu_before))
    return seconds
