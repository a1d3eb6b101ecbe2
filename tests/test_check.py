"""What a check says is what training would meet: the counts are exact, the preview marks what is trained."""

import html
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE, write_jsonl
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit.check import check, estimate, preview
from lora_kit.cli import app
from lora_kit.errors import BaseError, DataError, RecipeError
from lora_kit.model.sizes import FAMILIES, estimate_memory, read_config
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

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
    shape, recipe = read_config(tmp_path / "config.json"), load_recipe(recipe_file, ["adapter.rank=4"])
    ours = estimate_memory(shape, recipe, tokens=256, recompute=False)
    assert ours.base_parameters == parameters
    assert ours.trainable_parameters == model.get_nb_trainable_parameters()[0]


def test_named_targets_are_counted_alone(tmp_path, recipe_file, base_folder):
    ours = estimate(load_recipe(recipe_file, ["adapter.targets=[q_proj, v_proj]", "adapter.rank=4"])).memory
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert ours.trainable_parameters == model.get_nb_trainable_parameters()[0]


def test_a_run_prints_the_trainable_parameters_as_a_share_of_the_base(recipe_file, tmp_path, capsys):
    recipe = load_recipe(recipe_file, ["train.steps=1"])
    loop.train(recipe, tmp_path / "run")
    ours, printed = estimate(recipe).memory, capsys.readouterr().out
    share = ours.trainable_parameters / ours.base_parameters
    assert f"{ours.trainable_parameters:,} trainable parameters ({share:.2%} of the base's)" in printed


@pytest.mark.parametrize(
    ("recipe", "parameters", "trainable"),
    [
        ("sft-bf16-1b", 1_235_814_400, 11_272_192),
        *((f"sft-{how}-8b", 8_030_261_248, 41_943_040) for how in ("bf16", "nf4", "int8")),
        *((f"sft-{how}-70b-fsdp", 70_553_706_496, 207_093_760) for how in ("bf16", "nf4")),
    ],
)
def test_the_large_recipes_pass_offline_with_the_known_counts(recipe, parameters, trainable):
    report = check(load_recipe(ROOT / "recipes" / f"{recipe}.yaml"), offline=True, shapes=ROOT / "tests" / "shapes")
    assert not report.problems
    assert (report.estimate.memory.base_parameters, report.estimate.memory.trainable_parameters) == (
        parameters,
        trainable,
    )
    assert any("tokenizer" in part for part in report.unchecked)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_a_check_without_network(path):
    result = CliRunner().invoke(app, ["check", str(path), "--offline"])
    assert result.exit_code == 0, result.output
    assert "the recipe can start" in result.output


@pytest.mark.quick
def test_the_predicted_checkpoint_is_the_written_one(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.steps=1", "adapter.rank=64"])
    run = loop.train(recipe, tmp_path / "run")
    written = sum(path.stat().st_size for path in run.latest.iterdir())
    assert written <= estimate(recipe).memory.checkpoint_bytes <= 1.1 * written


def test_the_preview_marks_exactly_the_trained_tokens(recipe_file, data_file):
    first = json.loads(data_file.read_text().splitlines()[0])["messages"]
    expected = "".join(
        f"<user>{message['content']}" if message["role"] == "user" else f"<assistant>⟦{message['content']}</s>⟧"
        for message in first
    )
    shown = preview(load_recipe(recipe_file), n=1)
    assert str(shown) == expected
    assert html.escape(first[0]["content"]) in shown._repr_html_()
    assert shown._repr_html_().count("background-color") == sum(message["role"] == "assistant" for message in first)


def test_the_preview_keeps_the_blank_before_an_answer(recipe_file, tmp_path, shared_data):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "The end:", "completion": " hi you two"}\n')
    changes = [f"base.repo={shared_data / 'stories260k-hf'}", f"data.train={tmp_path / 'pairs.jsonl'}"]
    assert str(preview(load_recipe(recipe_file, changes))).endswith("The end:⟦ hi you two</s>⟧")


@pytest.mark.parametrize("colours", [None, "truecolor"])
def test_trained_tokens_stand_out_with_and_without_colours(recipe_file, colours):
    console = Console(file=io.StringIO(), color_system=colours, force_terminal=True, no_color=False, soft_wrap=True)
    console.print(check(load_recipe(recipe_file)))
    shown = console.file.getvalue()
    marked = "⟦" in shown and "</s>⟧" in shown
    assert marked is (colours is None)
    assert ("\x1b[30;42m" in shown) is (colours is not None)


def test_a_check_says_how_many_steps_and_tokens_there_will_be(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.steps=null", "train.epochs=2"])
    report = check(recipe)
    run = loop.train(recipe, tmp_path / "run")
    assert report.schedule["steps"] == run.metrics[-1]["step"] == -(-2 * 23 // 5)
    assert report.schedule["examples"] == run.metrics[-1]["examples"] == 46
    assert report.schedule["tokens"] == sum(record["tokens"] for record in run.metrics)


def test_idle_processes_are_told_with_what_would_fill_them(recipe_file):
    report = check(load_recipe(recipe_file, ["train.micro_batch_tokens=4096"]), processes=4)
    assert report.schedule["idle_share"] == 0.75
    assert any("1 micro-batch for 4 processes" in note and "train.batch_size" in note for note in report.notes)


def test_problems_of_the_data_are_all_listed_and_the_exit_code_is_2(recipe_file, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n{"messages": [{"role": "bot", "content": "x"}]}\n')
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--set", f"data.train={bad}"])
    assert result.exit_code == 2
    assert "bad.jsonl:1" in result.output and "bad.jsonl:2" in result.output


def test_examples_beyond_the_bases_context_are_a_problem(recipe_file, tmp_path, base_folder):
    folder = copy_base(base_folder, tmp_path, {"max_position_embeddings": 100})
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]))
    assert any("the base was made for 100;" in problem for problem in report.problems)


def test_json_is_json(recipe_file):
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--json"])
    assert json.loads(result.stdout)["estimate"]["memory"]["trainable_parameters"] == 4096


def test_an_unknown_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(BaseError, match="model type 'mamba' cannot be computed"):
        read_config(tmp_path / "config.json")


def test_a_base_of_an_unknown_model_type_can_start(recipe_file, tmp_path, base_folder):
    folder = copy_base(base_folder, tmp_path, {"model_type": "gpt_neox"})
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]))
    assert not report.problems
    assert any("'gpt_neox' cannot be computed" in part for part in report.unchecked)


def test_a_configuration_without_sizes_is_reported_as_unchecked(recipe_file, tmp_path, base_folder):
    folder = copy_base(base_folder, tmp_path, {"num_attention_heads": None})
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]))
    assert not report.problems
    assert any("the key 'num_attention_heads' is missing" in part for part in report.unchecked)


def copy_base(base_folder, tmp_path, changes):
    """Copy a base, with some keys of its configuration changed or, at None, left out."""
    folder = tmp_path / "changed"
    shutil.copytree(base_folder, folder)
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("name", ["gone.jsonl", "./gone.jsonl", "a/b/gone.jsonl"])
def test_a_missing_file_is_a_problem_and_no_hub_dataset(recipe_file, name, offline):
    report = check(load_recipe(recipe_file, [f"data.train={name}"]), offline=offline)
    assert not report.unchecked
    assert len(report.problems) == 1 and "does not exist" in report.problems[0]


def test_offline_leaves_hub_data_unchecked(recipe_file):
    report = check(load_recipe(recipe_file, ["data.validation=owner/name:config@v1.0[test]"]), offline=True)
    assert not report.problems
    assert report.unchecked == ["data: a Hub dataset or a URL, not read with --offline"]


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{nope", "config.json is not JSON"),
        ("model.safetensors", None, "has no .safetensors weights"),
    ],
)
def test_a_broken_base_that_is_here_is_a_problem_with_and_without_network(
    recipe_file, tmp_path, base_folder, file, content, told, offline
):
    folder = copy_base(base_folder, tmp_path, {})
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]), offline=offline)
    assert any(told in problem for problem in report.problems)


def test_a_base_at_a_path_with_nothing_there_is_a_problem(recipe_file):
    report = check(load_recipe(recipe_file, ["base.repo=./gone"]), offline=True)
    assert any("does not exist; relative paths start" in problem for problem in report.problems)


def test_a_missing_template_is_a_problem(recipe_file):
    report = check(load_recipe(recipe_file, ["data.template=gone.jinja"]))
    assert report.problems == ["data.template: gone.jinja is not a file; expected a Jinja file"]


def test_targets_that_the_base_does_not_have_are_reported(recipe_file, tmp_path):
    for targets in ("[query]", "[q_proj, query]", "[q_proj, 'layers.7.*']"):
        recipe = load_recipe(recipe_file, [f"adapter.targets={targets}"])
        (problem,) = check(recipe).problems
        assert (
            problem.startswith("adapter.targets: ['")
            and "match no layer of the base; choose from ['q_proj'," in problem
        )
        with pytest.raises(RecipeError, match="match no layer of the base"):
            loop.train(recipe, tmp_path / "run")


def small_gpt2(folder, base_folder):
    """Save a tiny GPT-2 with 64 positions."""
    shutil.copytree(base_folder, folder)
    config = AutoConfig.for_model("gpt2", vocab_size=106, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_the_positions_of_gpt2_are_read(recipe_file, tmp_path, base_folder):
    recipe = load_recipe(recipe_file, [f"base.repo={small_gpt2(tmp_path / 'base', base_folder)}"])
    told = "tokens, the base was made for 64; set data.sequence_length=64 and data.overlong"
    assert any(told in problem for problem in check(recipe).problems)
    with pytest.raises(DataError, match=told):
        loop.train(recipe, tmp_path / "run")


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_what_is_no_causal_language_model_is_a_problem(recipe_file, tmp_path, base_folder, family):
    folder = copy_base(base_folder, tmp_path, {"model_type": family})
    report = check(load_recipe(recipe_file, [f"base.repo={folder}"]))
    assert any(f"(model type {family}) is not a causal language model" in problem for problem in report.problems)


def test_an_untrained_stop_token_is_told_once_with_the_way_out_that_works(recipe_file, tmp_path, base_folder, capsys):
    folder = copy_base(base_folder, tmp_path, {})
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][1] = 0  # </s>
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changes = [f"base.repo={folder}", "train.steps=1"]
    told = "base.stop_token: '</s>' looks untrained in the base"
    recipe = load_recipe(recipe_file, changes)
    (note,) = [note for note in check(recipe).notes if "untrained" in note]
    assert note.startswith(told) and "copy the chat template to a file" in note and "data.template" in note
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "ab"}])
    (note,) = [note for note in check(load_recipe(recipe_file, [*changes, f"data.train={text}"])).notes if told in note]
    assert note.endswith("set base.stop_token: 'TOKEN'"), "no template ends a raw text"
    loop.train(recipe, tmp_path / "run")
    assert " ".join(capsys.readouterr().out.split()).count(told) == 1
    changes.append("base.stop_token=<unk>")  # half of the advice: the refusal must not lead back
    problem = check(load_recipe(recipe_file, changes)).problems[0]
    assert "write '<unk>' in its place" in problem and "set base.stop_token" not in problem
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("</s>", "<unk>"))
    report = check(load_recipe(recipe_file, [*changes, f"data.template={tmp_path / 'template.jinja'}"]))
    assert not report.problems and not any("untrained" in note for note in report.notes)
