"""What a check says is what training would meet: the counts are exact, the preview marks what is trained."""

import html
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit import check as checking
from lora_kit import trainer
from lora_kit.check import check, estimate, preview
from lora_kit.cli import app
from lora_kit.recipe import load_recipe
from lora_kit.shapes import FAMILIES, estimate_memory, read_config

ROOT = Path(__file__).parents[1]
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_in_closed_form_equal_those_of_a_real_model(family, silent, tmp_path, recipe_file):
    # `silent`: the configuration leaves out what transformers has a default for
    config = AutoConfig.for_model(family, **SMALL | ({} if silent else {"head_dim": 16, "tie_word_embeddings": True}))
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    if silent:
        for key in ("head_dim", "attention_bias", "mlp_bias"):
            content.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        parameters = sum(parameter.numel() for parameter in base.parameters())
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = estimate_memory(read_config(tmp_path / "config.json"), load_recipe(recipe_file, ["adapter.rank=4"]))
    assert ours.base_parameters == parameters
    assert ours.trainable_parameters == model.get_nb_trainable_parameters()[0]


def test_named_targets_are_counted_alone(tmp_path, recipe_file, base_folder):
    ours = estimate(load_recipe(recipe_file, ["adapter.targets=[q_proj, v_proj]", "adapter.rank=4"]))
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert ours.trainable_parameters == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("recipe", "parameters", "trainable"),
    [("sft-bf16-1b", 1_235_814_400, 11_272_192), ("sft-bf16-8b", 8_030_261_248, 41_943_040)],
)
def test_the_large_recipes_pass_offline_with_the_known_counts(recipe, parameters, trainable):
    report = check(load_recipe(ROOT / "recipes" / f"{recipe}.yaml"), offline=True, shapes=ROOT / "tests" / "shapes")
    assert not report.problems
    assert (report.estimate.base_parameters, report.estimate.trainable_parameters) == (parameters, trainable)
    assert any("tokenizer" in what for what in report.unchecked)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_a_check_without_network(path):
    result = CliRunner().invoke(app, ["check", str(path), "--offline"])
    assert result.exit_code == 0, result.output
    assert "the recipe can start" in result.output


def test_the_predicted_checkpoint_is_the_written_one(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.steps=1", "adapter.rank=64"])
    run = trainer.train(recipe, tmp_path / "run")
    written = sum(path.stat().st_size for path in run.latest.iterdir())
    assert written <= estimate(recipe).checkpoint_bytes <= 1.1 * written


def test_the_preview_marks_exactly_the_trained_tokens(recipe_file, data_file):
    first = json.loads(data_file.read_text().splitlines()[0])["messages"]
    expected = "".join(
        f"<user>{message['content']}" if message["role"] == "user" else f"<assistant>⟦{message['content']}</s>⟧"
        for message in first
    )
    shown = preview(load_recipe(recipe_file), n=1)
    assert str(shown) == expected
    assert html.escape(first[0]["content"]) in shown._repr_html_()
    assert shown._repr_html_().count("<span") == sum(message["role"] == "assistant" for message in first)


def test_a_check_says_how_many_steps_and_tokens_there_will_be(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.steps=null", "train.epochs=2"])
    report = check(recipe)
    run = trainer.train(recipe, tmp_path / "run")
    assert report.schedule["steps"] == run.metrics[-1]["step"] == -(-2 * 23 // 5)
    assert report.schedule["examples"] == run.metrics[-1]["examples"] == 46
    assert report.schedule["tokens"] == sum(record["tokens"] for record in run.metrics)


def test_idle_processes_are_told_with_what_would_fill_them(recipe_file):
    report = check(load_recipe(recipe_file, ["train.micro_batch_tokens=4096"]), processes=4)
    assert report.schedule["idle_share"] == 0.75
    assert any("1 micro-batches for 4 processes" in note and "train.batch_size" in note for note in report.notes)


def test_problems_of_the_data_are_all_listed_and_the_exit_code_is_2(recipe_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": [{"role": "bot", "content": "x"}]}\n')
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--set", f"data.train={bad}"])
    assert result.exit_code == 2
    assert "bad.jsonl:1" in result.output and "bad.jsonl:2" in result.output


def test_examples_beyond_the_bases_context_are_a_problem(recipe_file, tmp_path, base_folder):
    content = json.loads((base_folder / "config.json").read_text()) | {"max_position_embeddings": 100}
    folder = tmp_path / "short"
    folder.mkdir()
    for path in base_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(content))
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]))
    assert any("the base was made for 100" in problem for problem in report.problems)


def test_json_is_json(recipe_file):
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--json"])
    assert json.loads(result.stdout)["estimate"]["trainable_parameters"] == 4096


def test_a_family_that_is_not_counted_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(checking.BaseError, match="family 'mamba' are not counted"):
        read_config(tmp_path / "config.json")
