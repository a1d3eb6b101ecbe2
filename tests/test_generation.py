"""A checkpoint answers as the model did that trained it, and answers together equal answers alone."""

import json

import pytest
import torch
from conftest import TEMPLATE, make_base, write_jsonl
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts.answering import Answering, answer
from lora_kit.artifacts.chat import chat
from lora_kit.cli import app
from lora_kit.errors import BaseError, CheckpointError
from lora_kit.kernels.attention import own_attention
from lora_kit.training import loop


@pytest.fixture
def run(recipe_file, copied):
    return lk.Run(copied(recipe_file))


@pytest.mark.quick
def test_a_loaded_checkpoint_has_the_trained_models_logits(recipe_file, tmp_path, monkeypatch):
    jobs = []
    make_job = loop.make_job
    monkeypatch.setattr(loop, "make_job", lambda *a, **k: jobs.append(make_job(*a, **k)) or jobs[-1])
    run = lk.train(lk.load_recipe(recipe_file), tmp_path / "run")
    model, _ = lk.load(run.latest)
    ids = torch.arange(40)[None]
    with torch.no_grad(), own_attention(jobs[0].model):
        loaded, trained = model(ids).logits, jobs[0].model.eval()(ids).logits
    assert (loaded - trained).abs().max() < 1e-5 * trained.abs().max()


def test_answers_in_a_batch_equal_answers_alone(run):
    model, tokenizer = lk.load(run.latest)
    prompts = [
        tokenizer(f"<user>{text}<assistant>")["input_ids"] for text in ("a", "bb cc", "dddd eee ff", "a b c d e")
    ]
    how = Answering(stop_ids=(1,), max_new_tokens=12)
    together = answer(model, tokenizer, prompts, how)
    assert together == [answer(model, tokenizer, [prompt], how)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_an_answer_ends_at_the_stop_token(run):
    model, tokenizer = lk.load(run.latest)
    prompt = tokenizer("<user>a<assistant>")["input_ids"]
    (long,) = answer(model, tokenizer, [prompt], Answering(stop_ids=(1,), max_new_tokens=12))
    third = tokenizer(long)["input_ids"][2]
    (short,) = answer(model, tokenizer, [prompt], Answering(stop_ids=(third,), max_new_tokens=12))
    assert long.startswith(short) and len(short) <= 2


def test_generate_asks_through_the_chat_template(run):
    model, tokenizer = lk.load(run.latest)
    prompt = tokenizer("<user>hello<assistant>")["input_ids"]
    expected = answer(model, tokenizer, [prompt], Answering(stop_ids=(1,), max_new_tokens=8))
    assert lk.generate(model, tokenizer, ["hello"], max_new_tokens=8) == expected


@pytest.mark.parametrize("record", [{"prompt": "ab", "completion": "cd"}, {"text": "ab cd"}])
def test_a_prompt_needs_no_end_of_an_answer(record, recipe_file, tmp_path):
    """As Qwen 2.5's bases have it: their chat template ends a turn with another token than the end of sequence."""
    folder = make_base(tmp_path / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "<unk>"))
    data = write_jsonl(tmp_path / "raw.jsonl", [record] * 8)
    recipe = lk.load_recipe(recipe_file, [f"base.repo={folder}", f"data.train={data}", "train.steps=1"])
    run = lk.train(recipe, tmp_path / "run")
    merging = ["merge", str(run.folder), "--out", str(tmp_path / "merged")]
    for arguments in (["generate", str(run.folder), "ab"], merging):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
    model, tokenizer = lk.load(run.latest)
    said = chat(model, tokenizer, ["ab", "cd"], lambda text: None, max_new_tokens=3)
    assert [message["role"] for message in said] == ["user", "assistant"] * 2


def test_the_command_answers_with_and_without_the_adapter(run):
    arguments = ["generate", str(run.folder), "hello", "--max-new-tokens", "8", "--json"]
    ours = CliRunner().invoke(app, arguments)
    theirs = CliRunner().invoke(app, [*arguments, "--base"])
    assert json.loads(ours.stdout)[0]["prompt"] == "hello"
    assert json.loads(ours.stdout) != json.loads(theirs.stdout)


def test_sampling_is_possible(run):
    model, tokenizer = lk.load(run.latest)
    torch.manual_seed(0)
    answers = {lk.generate(model, tokenizer, ["a"], max_new_tokens=8, temperature=2.0)[0] for _ in range(4)}
    assert len(answers) > 1


def test_a_changed_base_is_refused(recipe_file, tmp_path):
    folder = make_base(tmp_path / "base")
    run = lk.train(lk.load_recipe(recipe_file, [f"base.repo={folder}", "train.steps=1"]), tmp_path / "run")
    make_base(folder, seed=1)
    with pytest.raises(BaseError, match="differs from the base of the training"):
        lk.load(run.latest)


def test_a_damaged_checkpoint_is_not_loaded(run):
    (run.latest / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        lk.load(run.folder / "checkpoints" / "step-00000008")
