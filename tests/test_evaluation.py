"""What is measured on held-out examples is what a plain loop measures, on one process and on two."""

import json
import math

import pytest
import torch
from conftest import make_records, write_jsonl
from runs import train
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.cli import app
from lora_kit.errors import DataError
from lora_kit.training import evaluation


@pytest.fixture
def changes(shared):
    folder = shared("held-out", lambda folder: write_jsonl(folder / "validation.jsonl", make_records(9, seed=5)))
    return [f"data.validation={folder / 'validation.jsonl'}", "evaluate.generate=5", "train.steps=3"]


def plain_loss(base_folder, tokenizer, records):
    """The loss of the base by transformers alone, one example at a time, assistant messages trained."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    total, weight = 0.0, 0
    for record in records:
        ids, trained = [], []
        for message in record["messages"]:
            end = "</s>" if message["role"] == "assistant" else ""
            some = tokenizer(f"<{message['role']}>{message['content']}{end}")["input_ids"]
            ids += some
            trained += [message["role"] == "assistant" and place > 0 for place in range(len(some))]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        mask = torch.tensor(trained[1:])
        total += float(losses[mask].sum())
        weight += int(mask.sum())
    return total / weight


@pytest.mark.quick
def test_the_bases_loss_is_that_of_a_plain_loop(recipe_file, base_folder, reference, changes):
    run = lk.Run(reference(recipe_file, *changes))
    _, tokenizer = lk.load(run.latest)
    base = run.result["metrics"]["base"]
    assert base["loss"] == pytest.approx(plain_loss(base_folder, tokenizer, make_records(9, seed=5)), rel=1e-5)
    assert base["perplexity"] == pytest.approx(math.exp(base["loss"]))
    assert (base["examples"], base["answered"]) == (9, 5)
    assert base["exact_match"] == 0.0


def test_two_processes_measure_what_one_does(recipe_file, tmp_path, reference, changes):
    options = [part for change in changes for part in ("--set", change)]
    train(recipe_file, tmp_path / "two", *options, processes=2)
    one, two = (lk.Run(run).result["metrics"] for run in (reference(recipe_file, *changes), tmp_path / "two"))
    for name in ("base", "adapter"):
        assert one[name] == pytest.approx(two[name], rel=1e-6)


def test_an_overfitted_adapter_matches_exactly(recipe_file, tmp_path):
    pairs = [("ab", "xyz"), ("cd", "pq"), ("ef", "m n o")]
    records = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]}
        for asked, told in pairs
    ]
    data = write_jsonl(tmp_path / "few.jsonl", records)
    changes = [f"data.train={data}", f"data.validation={data}", "evaluate.generate=3", "train.steps=60"]
    recipe = lk.load_recipe(recipe_file, [*changes, "adapter.dropout=0", "optim.learning_rate=2e-2"])
    run = lk.train(recipe, tmp_path / "run")
    assert run.result["metrics"]["adapter"]["exact_match"] == 1.0
    assert run.result["metrics"]["base"]["exact_match"] < 1.0
    model, tokenizer = lk.load(run.latest)
    assert lk.generate(model, tokenizer, [asked for asked, _ in pairs]) == [told for _, told in pairs]


def test_the_command_and_the_function_agree_with_the_run(recipe_file, reference, changes):
    run = lk.Run(reference(recipe_file, *changes))
    options = [part for change in changes for part in ("--set", change)]
    result = CliRunner().invoke(app, ["eval", str(recipe_file), str(run.folder), "--json", *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    for name in ("base", "adapter"):
        assert told[name] == pytest.approx(run.result["metrics"][name], rel=1e-6)


def test_an_evaluation_without_held_out_data_says_what_to_add(recipe_file, trained_run):
    run = lk.Run(trained_run)
    with pytest.raises(DataError, match=r"data\.validation: the recipe names none; add"):
        lk.evaluate(lk.load_recipe(recipe_file), run.latest)


def test_a_held_out_example_longer_than_the_context_is_refused(trained_run, recipe_file, changes, monkeypatch):
    monkeypatch.setattr(evaluation, "positions_of", lambda model: 8)
    with pytest.raises(DataError, match=r"the longest example has \d+ tokens, the base was made for 8; set"):
        lk.evaluate(lk.load_recipe(recipe_file, changes), trained_run)
