"""On real pretrained bases and real data the held-out loss falls and the metric rises."""

import json
import random

import pytest
from runs import train
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.cli import app

RECIPE = """
base: {{repo: {base}, dtype: float32, stop_token: <s>}}
data: {{train: train.jsonl, validation: validation.jsonl, sequence_length: 256}}
adapter: {{rank: 8, alpha: 16}}
optim: {{learning_rate: 5e-3}}
train: {{steps: 60, batch_size: 16, micro_batch_tokens: 512}}
evaluate: {{generate: 40}}
"""


def snips(folder, kind):
    """Requests to a voice assistant with the intent as the completion; one file is not UTF-8."""
    rows = []
    for path in sorted(folder.glob(f"{kind}_*.json")):
        intent = path.stem.split("_")[1]
        for one in json.loads(path.read_bytes().decode("latin-1"))[intent]:
            text = "".join(part["text"] for part in one["data"]).strip()
            rows.append({"prompt": f"{text} =", "completion": f" {intent}"})
    random.Random(0).shuffle(rows)
    return "".join(json.dumps(row) + "\n" for row in rows[: 1500 if kind == "train" else 40])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["stories260k-hf", "babyllama361-hf"])
def test_a_story_teller_learns_to_tell_intents(shared_data, tmp_path, base):
    for name, kind in (("train", "train"), ("validation", "validate")):
        (tmp_path / f"{name}.jsonl").write_text(snips(shared_data / "snips", kind))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=shared_data / base))
    recipe = lk.load_recipe(tmp_path / "recipe.yaml")
    train(tmp_path / "recipe.yaml", tmp_path / "run")
    run = lk.Run(tmp_path / "run")
    before, after = run.result["metrics"]["base"], run.result["metrics"]["adapter"]
    assert before["exact_match"] < 0.05
    assert after["exact_match"] > 0.7
    assert after["loss"] < 0.2 * before["loss"]
    again = lk.evaluate(recipe, run.latest)
    assert again["adapter"].exact_match == after["exact_match"]
    assert again["adapter"].loss == pytest.approx(after["loss"], rel=1e-5)


def test_a_stop_token_that_the_base_never_saw_is_warned_of(shared_data, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(snips(shared_data / "snips", "train"))
    text = RECIPE.format(base=shared_data / "stories260k-hf").replace(", stop_token: <s>", "")
    text = text.replace("validation: validation.jsonl, ", "").replace("generate: 40", "generate: 0")
    (tmp_path / "recipe.yaml").write_text(text)
    lk.train(lk.load_recipe(tmp_path / "recipe.yaml", ["train.steps=1"]), tmp_path / "run")
    warning = capsys.readouterr().out
    assert "'</s>'" in warning and "base.stop_token" in warning


@pytest.mark.slow
def test_real_instructions_train_and_answer(shared_data, tmp_path):
    records = json.loads((shared_data / "instruct-rasbt" / "instruction-data.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}<s>{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"base: {{repo: {shared_data / 'stories260k-hf'}, dtype: float32, stop_token: <s>}}\n"
        "data: {train: train.json, validation: 0.05, template: chat.jinja, sequence_length: 512, overlong: drop}\n"
        "optim: {learning_rate: 3e-3}\ntrain: {steps: 30, batch_size: 16, micro_batch_tokens: 1024}\n"
    )
    train(tmp_path / "recipe.yaml", tmp_path / "run")
    metrics = lk.Run(tmp_path / "run").result["metrics"]
    assert metrics["adapter"]["loss"] < 0.8 * metrics["base"]["loss"]
    answered = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "Name a fruit.", "--max-new-tokens", "20"])
    assert answered.exit_code == 0, answered.output
