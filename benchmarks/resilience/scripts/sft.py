"""A script with TRL's SFTTrainer, as its users write it: LoRA with dropout, accumulated gradients."""

import argparse

import torch
from datasets import Dataset
from ending import write_outcome
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--out", required=True)
options = parser.parse_args()

trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32),
    args=SFTConfig(
        options.out,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=64,
    ),
    train_dataset=Dataset.from_list([{"text": "abcd" * (1 + number % 4)} for number in range(23)]),
    processing_class=AutoTokenizer.from_pretrained(options.base),
    peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
write_outcome(trainer, options.out)
