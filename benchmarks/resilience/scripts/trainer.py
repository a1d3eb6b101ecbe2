"""A script with a transformers Trainer, as its users write it: all weights, SGD with momentum, a random epoch order."""

import argparse

import torch
from datasets import Dataset
from ending import write_outcome
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--out", required=True)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.base)
model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32, attention_dropout=0.1)
texts = ["abc" * (1 + number % 5) + "defgh"[number % 5] for number in range(22)]
data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
arguments = TrainingArguments(
    options.out,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=4,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    optim="sgd",
    optim_args="momentum=0.9",
    logging_steps=2,
    eval_strategy="epoch",
    save_strategy="no",
    report_to=[],
    use_cpu=True,
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, collator, data, data.select(range(4)))
trainer.train()
write_outcome(trainer, options.out)
