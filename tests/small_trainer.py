"""A small transformers Trainer for the tests of the integrations, and what it ends with."""

import hashlib
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DefaultDataCollator,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

EXAMPLES, LENGTH = 14, 8


class At(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **named):
        if state.global_step == self.step:
            self.do()


class Counting(TrainerCallback):
    """A callback with a state of its own, which decides when training ends."""

    def __init__(self, most=1000):
        self.most, self.counted = most, {"steps": 0}

    def on_step_end(self, args, state, control, **named):
        self.counted["steps"] += 1
        control.should_training_stop |= self.counted["steps"] >= self.most


def rows():
    """Return examples of equal length."""
    generator = random.Random(5)
    ids = [[generator.randint(3, 60) for _ in range(LENGTH)] for _ in range(EXAMPLES)]
    return [{"input_ids": row, "labels": row} for row in ids]


def make(base, folder, *, callbacks=(), data=None, collator=None, lora=True, change=lambda model: None, **arguments):
    """Return a trainer whose epoch has 3 whole steps and a smaller one: 14 examples, 2 a batch, 2 batches a step."""
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attention_dropout=0.1)
    if lora:
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    change(model)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings | arguments),
        data_collator=collator or DefaultDataCollator(),
        train_dataset=data or Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows()[:3]),
        callbacks=list(callbacks),
    )


def outcome(trainer):
    """Return digests of weights, optimizer and generators, and all that was logged but times."""
    weights, moments = hashlib.sha256(), hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        weights.update(name.encode() + parameter.detach().numpy().tobytes())
    for state in trainer.optimizer.state.values():
        for name in sorted(state):
            moments.update(name.encode() + torch.as_tensor(state[name]).numpy().tobytes())
    generators = repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
    logged = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
    ]
    found = {"weights": weights, "optimizer": moments, "random": hashlib.sha256(generators.encode())}
    return {name: digest.hexdigest() for name, digest in found.items()} | {
        "logged": logged,
        "step": trainer.state.global_step,
        "rate": trainer.lr_scheduler.state_dict()["last_epoch"],
    }


def kill_self():
    """End this process as the kernel does for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(base, folder, run, step):
    """Train with a LiveCheckpoint; SIGKILL this process in the middle of a step."""
    from lora_kit.integrations.transformers import LiveCheckpoint

    trainer = make(base, folder, callbacks=[At(int(step), kill_self)])
    LiveCheckpoint(trainer, Path(run))
    trainer.train()
