"""A script with TRL's DPOTrainer, as its users write it: LoRA with dropout, evaluations between the steps."""

import argparse

import torch
from datasets import Dataset
from ending import write_outcome
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--out", required=True)
options = parser.parse_args()

pairs = [{"prompt": "abc"[: 1 + number % 3], "chosen": "de", "rejected": "gh"} for number in range(17)]
data = Dataset.from_list(pairs)
trainer = DPOTrainer(
    AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32),
    args=DPOConfig(
        options.out,
        per_device_train_batch_size=2,
        max_steps=22,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=data,
    eval_dataset=data.select(range(4)),
    processing_class=AutoTokenizer.from_pretrained(options.base),
    peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
write_outcome(trainer, options.out)
