"""Bad input gets a clear message and exit code 2, before anything is trained, and loses nothing."""

import shutil

import pytest
from conftest import make_records, write_jsonl
from typer.testing import CliRunner

from lora_kit.cli import app
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop


@pytest.fixture
def told(recipe_file, tmp_path, monkeypatch):
    """Run `lora-kit train` with changes, expect exit code 2, and return what was told; nothing may be left behind."""

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher does: trained in this process

    def run(*changes, recipe=recipe_file, code=2):
        options = [part for change in changes for part in ("--set", change)]
        out = tmp_path / "out"
        result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out), *options])
        assert result.exit_code == code, (result.output, result.exception)
        assert not list(out.glob("checkpoints/step-*"))
        return result.stderr

    return run


def test_a_missing_recipe(told, tmp_path):
    assert "nowhere.yaml" in told(recipe=tmp_path / "nowhere.yaml")


def test_an_unknown_key_with_what_was_meant(told):
    message = told("optim.lerning_rate=1")
    assert "optim.lerning_rate" in message and "did you mean 'learning_rate'" in message


def test_a_wrong_type_names_what_was_found_and_expected(told):
    message = told("train.batch_size=many")
    assert "train.batch_size" in message and "many" in message


def test_a_duplicate_key(told, recipe_file, tmp_path):
    recipe_file.write_text(recipe_file.read_text() + "checkpoint: {every_steps: 9}\n")
    assert "checkpoint" in told(recipe=recipe_file) and "duplicate" in told(recipe=recipe_file)


def test_a_missing_data_file(told, tmp_path):
    assert "gone.jsonl" in told(f"data.train={tmp_path / 'gone.jsonl'}")


def test_an_empty_dataset(told, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: the file is empty" in told(f"data.train={tmp_path / 'empty.jsonl'}")


def test_a_line_that_is_not_json_is_named(told, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", make_records(5))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{not json", *lines[3:]]))
    assert "bad.jsonl:4" in told(f"data.train={path}")


def test_a_wrong_role_is_named_with_those_that_exist(told, tmp_path):
    records = make_records(5)
    records[3]["messages"][0]["role"] = "bot"
    message = told(f"data.train={write_jsonl(tmp_path / 'bad.jsonl', records)}")
    assert "bad.jsonl:4" in message and "'bot'" in message and "assistant" in message


@pytest.mark.quick
def test_several_bad_records_are_told_at_once(told, tmp_path):
    records = make_records(6)
    for place in (1, 4):
        records[place]["messages"][0]["role"] = "bot"
    message = told(f"data.train={write_jsonl(tmp_path / 'bad.jsonl', records)}")
    assert "bad.jsonl:2" in message and "bad.jsonl:5" in message


def test_a_conversation_that_trains_nothing(told, tmp_path):
    records = make_records(4)
    records[2]["messages"] = records[2]["messages"][:1]
    assert "bad.jsonl:3" in told(f"data.train={write_jsonl(tmp_path / 'bad.jsonl', records)}")


def test_a_tokenizer_without_a_chat_template(told, tmp_path, base_folder):
    folder = tmp_path / "plain"
    shutil.copytree(base_folder, folder)
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in told(f"base.repo={folder}")


def test_a_tokenizer_that_does_not_fit_the_base(told, tmp_path, base_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "misfit"
    shutil.copytree(base_folder, folder)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    message = told(f"base.repo={folder}")
    assert "106" in message and "20" in message


def test_an_example_longer_than_the_limit_is_named(told):
    message = told("data.sequence_length=40")
    assert "train.jsonl:" in message and "overlong" in message


def test_a_target_that_is_not_there(told):
    assert "q_proj" in told("adapter.targets=[query]")


def test_the_output_folder_of_another_recipe_is_left_as_it_is(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    out = tmp_path / "run"
    loop.train(load_recipe(recipe_file, ["train.steps=3"]), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lease.json"}
    arguments = ["train", str(recipe_file), "--out", str(out), "--set", "adapter.rank=8"]
    result = CliRunner().invoke(app, arguments)
    assert (
        result.exit_code == 2
        and "this start differs from the run's checkpoint" in result.stderr
        and "adapter.rank: 4 -> 8" in result.stderr
    )
    assert before == {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lease.json"
    }


def test_another_launcher_and_processes_contradict(recipe_file, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # as torchrun sets them
        monkeypatch.setenv(name, "0")
    arguments = ["train", str(recipe_file), "--out", str(tmp_path / "run"), "--processes", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "another launcher already started this process" in result.stderr


def test_verify_of_a_folder_without_checkpoints(tmp_path):
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1 and "no checkpoint here" in result.stderr
