"""A prompt is continued with the token ids that training gave it, up to the last position of the base."""

import shutil

import pytest
import torch
from conftest import TEMPLATE, make_records, make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts.answering import Answering, answer, prompt_ids
from lora_kit.artifacts.chat import chat
from lora_kit.cli import app
from lora_kit.data.formats import Completion
from lora_kit.data.plan import prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import prompt, text_tokens, tokenize_all
from lora_kit.errors import DataError
from lora_kit.model.sizes import context_of

END, POSITIONS = 1, 64


def with_specials(folder, single, *, bos="<system>"):
    """A character-level tokenizer without a chat template whose post-processor adds special tokens to a text."""
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token, tokenizer.chat_template = bos, None
    names = [name for name in single.split() if name != "$A"]
    numbers = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=numbers)
    assert tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids or single == "$A"
    return tokenizer


@pytest.mark.parametrize("text", ["ab:", "<system>ab:", "</s>ab:"])
@pytest.mark.parametrize(
    ("single", "bos", "begins"),
    [
        ("$A", "<system>", False),
        ("$A </s>", "<system>", False),
        ("$A </s>", "</s>", False),  # as GPT-2, whose BOS and EOS are the same token
        ("<system> $A", "<system>", True),
        ("<system> $A </s>", "<system>", True),
    ],
)
def test_raw_text_is_continued_with_the_ids_of_training(tmp_path, single, bos, begins, text):
    renderer = Renderer(with_specials(tmp_path, single, bos=bos))
    (example,) = tokenize_all([Completion(text, "cd")], renderer)
    plain = renderer.tokenizer.convert_tokens_to_ids
    expected = [plain("<system>")] * (begins and not text.startswith("<system>"))
    expected += [plain(token) for token in (text[:-3] or None, *"ab:") if token]
    assert text_tokens(text, renderer) == prompt(Completion(text, "cd"), renderer).ids == expected
    assert example.ids == [*expected, plain("c"), plain("d"), END]
    assert prompt_ids(text, renderer) == expected


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}
RAW = [{"prompt": "capital:", "completion": " Rome"}] * 8
KINDS = {
    "prompt-completion": (RAW, "capital:"),
    "text": ([{"text": "capital: Rome"}] * 8, "capital:"),
    "columns": ([{"q": "capital:", "a": " Rome"}] * 8, "capital:"),
    "messages": ([{"prompt": [USER], "completion": [ASSISTANT]}] * 8, "hi"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_begins_as_its_examples_began(kind, recipe_file, tmp_path):
    """The base has a chat template of its own; the run with messages takes another from its recipe."""
    records, asked = KINDS[kind]
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("'<", "'- <"))
    changes = {
        "columns": ["data.columns={prompt: q, completion: a}"],
        "messages": [f"data.template={tmp_path / 'other.jinja'}"],
    }.get(kind, [])
    data = write_jsonl(tmp_path / "data.jsonl", records)
    recipe = lk.load_recipe(recipe_file, [f"data.train={data}", "train.steps=1", *changes])
    run = lk.train(recipe, tmp_path / "run")
    model, tokenizer = lk.load(run.latest)
    renderer = Renderer(AutoTokenizer.from_pretrained(recipe.base.repo), None)
    trained, _ = prepare_data(recipe, renderer if kind != "messages" else Renderer(
        renderer.tokenizer, (tmp_path / "other.jinja").read_text())).train.example(0)  # fmt: skip
    ids = prompt_ids(asked, Renderer(tokenizer))
    assert ids == trained[: len(ids)].tolist() and len(ids) < len(trained)
    raw = kind != "messages"
    assert (tokenizer.chat_template is None) is raw
    (told,) = lk.generate(model, tokenizer, [asked], max_new_tokens=4)
    written = []
    messages = chat(model, tokenizer, [asked], written.append, max_new_tokens=4)
    assert messages[-1]["content"] == told
    if raw:
        with pytest.raises(DataError, match="a conversation cannot be rendered: the run was trained on raw text"):
            lk.generate(model, tokenizer, [lk.question([{"role": "user", "content": asked}])])
        with pytest.raises(DataError, match="each line is continued as text, without the lines before it; leave out"):
            chat(model, tokenizer, [asked], written.append, system="Be brief.")
        result = CliRunner().invoke(app, ["generate", str(run.folder), asked, "--max-new-tokens", "4"])
        assert "note: prompts are continued as text: the run was trained on raw text" in result.stderr
        assert result.stdout == told + "\n"
        merged = CliRunner().invoke(app, ["merge", str(run.folder), "--out", str(tmp_path / "merged")])
        assert merged.exit_code == 0
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE, "the base's own stays"


def test_a_run_on_conversations_continues_text_when_asked(trained_run):
    model, tokenizer = lk.load(trained_run)
    tokenizer.chat_template = None
    expected = lk.generate(model, tokenizer, ["ab"], max_new_tokens=4)[0]
    for command, typed in (["generate", str(trained_run), "ab"], None), (["chat", str(trained_run)], "ab\n"):
        told = CliRunner().invoke(app, [*command, "--raw", "--max-new-tokens", "4"], input=typed)
        assert told.exit_code == 0 and told.stdout.startswith(expected) and "note:" not in told.stderr


def test_chat_keeps_the_blanks_of_a_line_that_it_continues_as_text(trained_run):
    model, tokenizer = lk.load(trained_run)
    tokenizer.chat_template = None
    messages = chat(model, tokenizer, [" ab: \n"], lambda text: None, max_new_tokens=4)
    assert messages[0]["content"] == " ab: "
    assert messages[1]["content"] == lk.generate(model, tokenizer, [" ab: "], max_new_tokens=4)[0]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, base_folder):
    """A tiny GPT-2 with 64 learned positions."""
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    shutil.copytree(base_folder, folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=106, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, initializer_range=0.3
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_answers_end_at_the_last_position_and_do_not_depend_on_each_other(gpt2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2), AutoTokenizer.from_pretrained(gpt2)
    prompts = [list(range(10, 10 + length)) for length in (3, 60, 40, 62, 60, 64, 70)]
    how = Answering(stop_ids=(0,), max_new_tokens=256)
    together = answer(model, tokenizer, prompts, how)
    assert together == [answer(model, tokenizer, [prompt], how)[0] for prompt in prompts]
    model.generation_config.suppress_tokens = list(range(6))  # no end, and nothing that the decoder leaves out
    lengths = [len(tokenizer(text).input_ids) for text in answer(model, tokenizer, prompts, how)]
    assert lengths == [max(0, POSITIONS - len(prompt)) for prompt in prompts]
    tokenizer.chat_template, written = None, []
    chat(model, tokenizer, ["abc"], written.append)
    assert written[-2:] == [" [cut at 61 tokens; the base has 64 positions]", "\n"]


def test_a_prompt_that_fills_the_base_is_told_by_every_command(gpt2, recipe_file, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "ab:", "completion": "cd"}] * 4)
    long = {"prompt": "ab" * 40, "completion": "cd"}
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [long, {"prompt": "ab:", "completion": "cd"}])
    changes = [
        f"base.repo={gpt2}", f"data.train={data}", f"data.validation={held_out}", "data.sequence_length=64",
        "data.overlong=truncate", "objective.train_on=all", "evaluate.generate=2", "evaluate.every_steps=1",
        "train.steps=1",
    ]  # fmt: skip
    run = lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")
    score = run.result["metrics"]["adapter"]
    assert (score["answered"], score["too_long"]) == (2, 1) and score["exact_match"] <= 0.5
    options = [part for change in changes for part in ("--set", change)]
    told = CliRunner().invoke(app, ["eval", str(recipe_file), str(run.folder), *options])
    assert "1 of 2 prompts left no position for an answer and count as no match" in told.stderr and not told.exit_code
    told = CliRunner().invoke(app, ["check", str(recipe_file), *options])
    assert "1 of 2 prompts leave none of the base's 64 positions for an answer" in " ".join(told.stdout.split())
    told = CliRunner().invoke(app, ["generate", str(run.folder), "ab:"])
    assert told.exit_code == 0 and told.stdout.strip(), (told.output, told.exception)
    told = CliRunner().invoke(app, ["generate", str(run.folder), "ab:", "ab" * 40])
    message = "prompt 2: 80 tokens leave none of the base's 64 positions for an answer; shorten it"
    assert told.exit_code == 2 and message in told.stderr and "Traceback" not in told.output
    told = CliRunner().invoke(app, ["chat", str(run.folder)], input="ab" * 40 + "\nab:\n")
    assert told.exit_code == 0 and "note: there is no chat template" in told.stderr
    assert "[80 tokens leave none of the base's 64 positions for an answer; /reset starts" in told.stdout
    assert told.stdout.splitlines()[-1], "the next line is answered"
    merged = CliRunner().invoke(app, ["merge", str(run.folder), "--out", str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output


def test_an_evaluation_counts_the_tokens_of_the_run(recipe_file, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", make_records(5, seed=5))
    changes = [f"data.validation={held_out}", "objective.train_on=all", "train.steps=1"]
    run = lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")
    notes = []
    for change, same in ([], True), (["objective.train_on=assistant"], False):
        scores = lk.evaluate(lk.load_recipe(recipe_file, [*changes, *change]), run.latest, tell=notes.append)
        for name, score in scores.items():
            assert (score.loss == pytest.approx(run.result["metrics"][name]["loss"], rel=1e-6)) is same
    assert notes == [
        "objective.train_on: the loss is measured with 'assistant', as in this recipe; the run was trained with 'all'"
    ]


def test_an_evaluation_takes_stop_token_and_template_of_the_run(recipe_file, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", make_records(5, seed=5))
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("</s>", "<pad>"))
    changes = [f"data.validation={held_out}", "train.steps=1"]
    own = ["base.stop_token=<pad>", f"data.template={tmp_path / 'other.jinja'}"]
    run = lk.train(lk.load_recipe(recipe_file, [*changes, *own]), tmp_path / "run")
    notes = []
    scores = lk.evaluate(lk.load_recipe(recipe_file, changes), run.latest, tell=notes.append)
    assert scores["base"].loss == pytest.approx(run.result["metrics"]["base"]["loss"], rel=1e-6)
    assert notes == [
        "base.stop_token: answers end with '<pad>' as in the run, not as in this recipe",
        "data.template: the chat template is that of the run, not that of this recipe",
    ]


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 64}, 64),
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 32}}, 32),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 8192),
        (
            {"max_position_embeddings": 32768,
             "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),  # Qwen 2.5's instructions for long texts
        (
            {"max_position_embeddings": 163840,
             "rope_parameters": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
            163840,
        ),  # DeepSeek 3, whose configuration has the stretched number already
        (
            {"max_position_embeddings": 131072,
             "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": "x"}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": float("nan")}}, 64),
        ({"model_type": "mamba"}, None),
    ],
)  # fmt: skip
def test_the_positions_of_a_base_include_its_scaling(config, positions):
    assert context_of(config) == positions
