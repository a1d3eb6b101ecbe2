"""The figures of answers are those of a calculation by hand and of the libraries, for whole runs and for texts."""

import pytest
from conftest import write_jsonl
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts.card import model_card
from lora_kit.cli import app
from lora_kit.errors import LaunchError, RecipeError
from lora_kit.recipe.schema import Evaluate
from lora_kit.runs.store import open_checkpoint
from lora_kit.training import answer_metrics
from lora_kit.training.answer_metrics import Answered, Call, calls_in, figures_of_answers

CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'


def figures(pairs, *metrics, regex=None):
    settings = Evaluate(generate=1, metrics=metrics, regex=regex)
    return figures_of_answers([Answered(*pair) for pair in pairs], settings)


@pytest.mark.quick
def test_texts_and_json_are_compared_as_the_names_say():
    pairs = [("yes", " yes "), ("oh yes", "yes"), ("no", "yes"), (None, "yes"), ('{"a": 1}', "x"), ("{'a': 1}", "y")]
    found = figures(pairs, "contains", "regex", "json", regex=r"^\w+$")
    assert found == pytest.approx({"exact_match": 1 / 6, "contains": 2 / 6, "regex": 2 / 6, "json": 1 / 6})
    assert figures([], "contains", "bleu") == {"exact_match": None, "contains": None, "bleu": None}


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"I look it up.\n<tool_call>\n{CALL}\n</tool_call>",
        f"[TOOL_CALLS] [{CALL}]",
        '{"name": "weather", "parameters": {"days": 2, "city": "Rome"}}',
        f'{{"type": "function", "function": {CALL}}}',
        '{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}',
    ],
)
def test_a_call_is_found_however_a_template_writes_it(text):
    assert calls_in(text) == [Call("weather", {"city": "Rome", "days": 2})]


def test_calls_are_compared_where_one_is_expected():
    other = CALL.replace("Rome", "Oslo")
    pairs = [(CALL, CALL), (other, CALL), ("{broken", CALL), (None, CALL), (CALL + other, CALL), ("hello", "no call")]
    found = figures(pairs, "tool_names", "tool_arguments")
    assert (found["tool_names"], found["tool_arguments"]) == (2 / 5, 1 / 5)
    assert calls_in('{"name": "Tom", "animal": "dog"} { "name": 3, "arguments": {}}' + "{" * 5000) == []
    assert figures([("hello", "no call")], "tool_names")["tool_names"] is None


def test_rouge_and_bleu_are_those_of_their_libraries():
    rouge, sacrebleu = pytest.importorskip("rouge_score.rouge_scorer"), pytest.importorskip("sacrebleu")
    pairs = [("the cat sat on the mat today", "the cat is on the mat today"), ("a dog", "a dog ran far away home")]
    found = figures(pairs, "rouge", "bleu")
    scorer = rouge.RougeScorer(["rougeL"])
    expected = [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    assert found["rouge"] == pytest.approx(sum(expected) / 2)
    answers, references = zip(*pairs, strict=True)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score / 100)


def test_a_missing_package_names_the_extra(monkeypatch, recipe_file, tmp_path):
    monkeypatch.setattr(answer_metrics, "find_spec", lambda name: None)
    told = r"evaluate\.metrics: rouge, bleu: rouge_score and sacrebleu not installed; pip install 'lora_kit\[metrics\]'"
    changes = ["evaluate.metrics=[rouge, json, bleu]", "evaluate.generate=1", "data.validation=0.2"]
    with pytest.raises(LaunchError, match=told):
        lk.train(lk.load_recipe(recipe_file, changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["evaluate.metrics=[json]"], r"metrics \(json\) are of generated answers; set generate"),
        (["evaluate.regex=a"], "regex and the metric regex need each other; set both or neither"),
        (
            ["evaluate.regex='('", "evaluate.metrics=[regex]", "evaluate.generate=1"],
            "not a regular expression: missing",
        ),
        (["evaluate.patience=2"], r"evaluate\.patience counts evaluations; set evaluate\.every_steps"),
        (["evaluate.forgetting=a.txt"], "measured with the validation data; set data.validation"),
        (["evaluate.metric=json"], r"evaluate\.metric is 'json', which this recipe does not measure; it measures loss"),
    ],
)
def test_fields_that_need_others_say_which(recipe_file, changes, told):
    with pytest.raises(RecipeError, match=told):
        lk.load_recipe(recipe_file, changes)


def test_a_run_measures_answers_and_forgetting_and_shows_them(recipe_file, tmp_path, capsys):
    pairs = [("ab", '{"a": 1}'), ("cd", "pq"), ("ef", "m n o")]
    records = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    data = write_jsonl(tmp_path / "few.jsonl", records)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    changes = [f"data.train={data}", f"data.validation={data}", "evaluate.generate=3", "train.steps=60"]
    changes += ["adapter.dropout=0", "optim.learning_rate=2e-2", "evaluate.metrics=[contains, json]"]
    changes += ["evaluate.forgetting=text.txt", "evaluate.every_steps=30", "evaluate.metric=json"]
    recipe = lk.load_recipe(recipe_file, changes)
    run = lk.train(recipe, tmp_path / "run")
    base, adapter = (run.result["metrics"][name] for name in ("base", "adapter"))
    assert adapter["exact_match"] == adapter["metrics"]["contains"] == 1.0
    assert adapter["metrics"]["json"] == pytest.approx(1 / 3)
    assert base["metrics"]["forgetting"] == 0
    change = adapter["metrics"]["text_loss"] - base["metrics"]["text_loss"]
    assert adapter["metrics"]["forgetting"] == pytest.approx(change) and change > 0
    measured = run.metrics[-1]["held_out_metrics"]
    assert measured == pytest.approx({"exact_match": 1.0} | adapter["metrics"])
    printed, changed = capsys.readouterr().out, f"{change:+.4f}"
    assert f"forgetting        │ {changed}: loss on evaluate.forgetting" in printed and "contains 100.0%" in printed
    card = model_card("me/own", open_checkpoint(run.latest).manifest, scores=run.result["metrics"])
    assert f"| adapter | 100.0% | 33.3% | {adapter['metrics']['text_loss']:.4f} | {changed} |" in card
    assert "|  | contains | json | text loss | forgetting |\n| --- | --- | --- | --- | --- |\n| base |" in card
    options = [part for change in changes for part in ("--set", change)]
    told = CliRunner().invoke(app, ["eval", str(recipe_file), str(run.latest), *options])
    assert told.exit_code == 0, told.output
    assert "adapter, contains: 1.0000" in told.output and f"adapter, forgetting: {change:.4f}" in told.output


def test_the_loss_of_a_text_is_that_of_its_pieces_by_transformers(recipe_file, base_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    text = "ab cd ef " * 30
    (tmp_path / "text.txt").write_text(text)
    changes = ["evaluate.forgetting=text.txt", "data.validation=0.2", "train.steps=1", "data.sequence_length=2000"]
    run = lk.train(lk.load_recipe(recipe_file, [*changes, "train.micro_batch_tokens=2000"]), tmp_path / "run")
    _, tokenizer = lk.load(run.latest)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)(ids, labels=ids).loss
    assert run.result["metrics"]["base"]["metrics"]["text_loss"] == pytest.approx(float(loss), rel=1e-2)
