"""The peer: the same base, tokens and adapter with transformers' Trainer and peft, resumed the documented way.

Beside the checkpoints it leaves steps.<rank>.jsonl (a line a step: when it ended, how long it took) and
seen.<rank>.jsonl (a line a batch: which examples).
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--base", type=Path)
parser.add_argument("--data", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--epochs", type=int)
parser.add_argument("--steps", type=int, default=-1)
parser.add_argument("--save-steps", type=int, default=5)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--dtype", default="float32")
asked = parser.parse_args()
rank = os.environ.get("RANK", "0")
asked.out.mkdir(parents=True, exist_ok=True)
ids = json.loads(asked.data.with_suffix(".ids").read_text())


class Steps(TrainerCallback):
    """Notes every step with its times."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        self._note(state.global_step, self.began)

    def on_save(self, args, state, control, **kwargs):
        self._note(state.global_step, None)

    def _note(self, step, began):
        with (asked.out / f"steps.{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "began": began, "time": time.time()}) + "\n")


def collate(batch):
    """Return a batch and note which examples are in it."""
    with (asked.out / f"seen.{rank}.jsonl").open("a") as file:
        file.write(json.dumps([one["number"] for one in batch]) + "\n")
    tokens = torch.tensor([one["input_ids"] for one in batch])
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


base = AutoModelForCausalLM.from_pretrained(asked.base, dtype=asked.dtype)
settings = LoraConfig(r=asked.rank, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
torch.manual_seed(0)
model = get_peft_model(base, settings)
trainer = Trainer(
    model,
    TrainingArguments(
        str(asked.out),
        per_device_train_batch_size=asked.batch,
        gradient_accumulation_steps=asked.accumulate,
        max_steps=asked.steps,
        num_train_epochs=asked.epochs or 1,
        learning_rate=1e-3,
        save_steps=asked.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        remove_unused_columns=False,
        disable_tqdm=True,
        bf16=asked.dtype == "bfloat16",
    ),
    train_dataset=[{"number": number, "input_ids": tokens} for number, tokens in enumerate(ids)],
    data_collator=collate,
    callbacks=[Steps()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(asked.out)))
if rank == "0":
    model.save_pretrained(asked.out / "final")
