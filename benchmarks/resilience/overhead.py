"""The seconds of each step of a transformers Trainer, with and without a LiveCheckpoint, in one process."""

import time
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from lora_kit.integrations.transformers import LiveCheckpoint

TOKENS, ROWS = 128, 2
WARM_UP_SECONDS = 3.0  # in which the keeper starts, which competes for the cores once in a run
MOST_STEPS = 10_000


class Clock(TrainerCallback):
    """Takes the time from the begin of each step to that of the next, so all that a step causes is in it.

    The CPU time of the process, all threads together, is taken too: other programs on the machine hardly change it, and
    what a thread does beside the step is in it.
    """

    def __init__(self, steps):
        self.steps, self.moments, self.began = steps, [], None

    def on_step_begin(self, args, state, control, **named):
        now = time.perf_counter()
        self.began = self.began or now
        if now - self.began > WARM_UP_SECONDS:
            self.moments.append((now, time.process_time()))

    def on_step_end(self, args, state, control, **named):
        control.should_training_stop = len(self.moments) > self.steps


def measure(folder: Path, base: Path, *, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds and CPU seconds of the steps of both sides, which train the same in every round."""
    seconds = {"plain": [], "attached": []}
    for number in range(rounds):
        for side in ("plain", "attached") if number % 2 else ("attached", "plain"):
            seconds[side] += one(folder, base, steps, attached=side == "attached", name=f"{side}-{number}")
    return seconds


def one(folder: Path, base: Path, steps: int, *, attached: bool, name: str) -> list[tuple[float, float]]:
    """Train for some steps; return the seconds and CPU seconds of each after the warm-up."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    clock, ids = Clock(steps), list(range(2, 10)) * (TOKENS // 8)
    arguments = TrainingArguments(
        str(folder / f"out-{name}"),
        per_device_train_batch_size=ROWS,
        max_steps=MOST_STEPS,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"input_ids": ids, "labels": ids}] * (ROWS * MOST_STEPS))
    trainer = Trainer(get_peft_model(model, config), arguments, train_dataset=data, callbacks=[clock])
    if attached:
        LiveCheckpoint(trainer, folder / name)
    trainer.train()
    return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(clock.moments)]
