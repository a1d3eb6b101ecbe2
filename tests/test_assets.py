"""The embedded default is what its script makes: small, learned, read without loss, odd when packed."""

import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kit.assets import build, text
from lora_kit.data.packing import pack
from lora_kit.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "lora_kit" / "assets"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SOURCES = {".py", ".pyc", ".toml", ".template"}  # what builds the assets


def read(name):
    return [json.loads(line)["messages"] for line in (ASSETS / f"quickstart.{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "base")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def conversations():
    return {name: read(name) for name in ("train", "validation")}


@pytest.fixture(scope="module")
def rendered(tokenizer, conversations):
    return [tokenizer.apply_chat_template(one, tokenize=False) for some in conversations.values() for one in some]


@pytest.fixture(scope="module")
def pretraining():
    return list(islice(text.documents(build.SEED), 20_000))  # about a seventh of what the base read


@torch.no_grad()
def loss_of(model, tokenizer, texts):
    rows = [torch.tensor([tokenizer(one)["input_ids"]]) for one in texts]
    sums = [model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows]
    return sum(sums) / sum(row.shape[1] - 1 for row in rows)


def test_a_rejected_answer_has_one_fact_that_its_story_lacks():
    for name, made in text.preferences(build.SEED).items():
        lines = (ASSETS / f"preferences.{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == made
        for pair in made:
            story, right, wrong = pair["prompt"][0]["content"], json.loads(pair["chosen"]), json.loads(pair["rejected"])
            (key,) = (key for key in right if right[key] != wrong[key])
            assert all(fact in story for fact in right.values()) and wrong[key] not in story


def test_all_of_it_is_there_and_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file() and path.suffix not in SOURCES]
    names = {str(path.relative_to(ASSETS)) for path in files}
    base = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {f"base/{name}" for name in base} <= names
    assert {"README.md", "quickstart.train.jsonl", "quickstart.validation.jsonl"} <= names
    assert sum(path.stat().st_size for path in files) < 4_500_000


def test_the_page_says_where_it_comes_from():
    page = (ASSETS / "README.md").read_text()
    command = f"python -m lora_kit.assets.build --seed {build.SEED}`: {sum(map(sum, build.CYCLES)):,} steps"
    assert "synthetic" in page and "Apache-2.0" in page and command in page
    assert "{" not in page and (ASSETS / "base" / "chat_template.jinja").read_text() == build.TEMPLATE


def test_the_shipped_data_is_what_the_script_makes(conversations):
    made = text.dataset(build.SEED)
    assert {name: [one["messages"] for one in some] for name, some in made.items()} == conversations


def test_a_seed_decides_all_text():
    def first(seed):
        return list(islice(text.documents(seed), 300))

    assert first(3) == first(3) != first(4)
    assert text.dataset(3, train=20, validation=10) == text.dataset(3, train=20, validation=10)
    assert text.dataset(3, train=20, validation=10) != text.dataset(4, train=20, validation=10)


def test_no_story_is_in_training_and_validation(conversations, pretraining):
    train, validation = ({one[0]["content"] for one in conversations[name]} for name in ("train", "validation"))
    assert (len(train), len(validation)) == (2000, 200)
    assert not train & validation
    assert not any(story in document for document in pretraining for story in validation if story[:9] in document)


def test_half_of_the_validation_names_are_new(conversations):
    def names(some):
        return [json.loads(answer["content"])["name"] for _, answer in some]

    seen = set(names(conversations["train"]))
    held = names(conversations["validation"])
    assert sum(text.is_reserved(name) for name in held) == len(held) // 2
    assert not any(text.is_reserved(name) for name in seen)


def test_pretraining_never_shows_a_reserved_name():
    rng = Random(0)
    drawn = {text.invented_name(rng) for _ in range(3000)}
    assert not any(text.is_reserved(name) for name in drawn)
    assert all(text.is_reserved(text.invented_name(rng, reserved=True)) for _ in range(50))


def test_answers_are_facts_of_their_story(conversations):
    for user, answer in conversations["train"] + conversations["validation"]:
        facts = json.loads(answer["content"])
        assert list(facts) == ["name", "animal", "place"]
        assert all(user["content"].count(held) >= 1 for held in facts.values()), (user, answer)


def test_the_tokenizer_loses_nothing(tokenizer, rendered, pretraining):
    for one in rendered + pretraining[:2000]:
        ids = tokenizer(one)["input_ids"]
        assert tokenizer.decode(ids) == "".join(text.UNKNOWN if letter in text.FOREIGN else letter for letter in one)
    assert tokenizer.decode(tokenizer(text.ALPHABET)["input_ids"]) == text.ALPHABET
    assert all(tokenizer.unk_token_id not in tokenizer(one)["input_ids"] for one in rendered)


def test_a_token_is_a_character_or_a_mark_of_the_template(tokenizer, rendered):
    assert len(tokenizer) == len(text.SPECIAL) + len(text.ALPHABET)
    for one in rendered[:200]:
        marks = sum(one.count(mark) * (len(mark) - 1) for mark in text.SPECIAL)
        assert len(tokenizer(one)["input_ids"]) == len(one) - marks


def test_every_token_is_frequent_in_pretraining(tokenizer, pretraining):
    counts = Counter(token for one in pretraining for token in tokenizer(one)["input_ids"])
    rare = {
        tokenizer.convert_ids_to_tokens(token): counts[token] for token in range(len(tokenizer)) if counts[token] < 100
    }
    assert not rare


def test_the_template_writes_what_pretraining_read(tokenizer, pretraining):
    conversation = [{"role": role, "content": role[::-1]} for role in ("system", "user", "assistant")]
    written = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert written == "".join(text.turn(one["role"], one["content"]) for one in conversation)
    asked = tokenizer.apply_chat_template(conversation[:2], tokenize=False, add_generation_prompt=True)
    assert written.startswith(asked) and asked.endswith("<|end|><|assistant|>")
    assert sum("<|end|><|assistant|>" in one for one in pretraining) > 1000
    assert tokenizer.eos_token == text.END and all(one.endswith(text.END) for one in pretraining)


def test_pretraining_never_showed_the_task(pretraining):
    assert not any('"animal"' in one or '"place"' in one for one in pretraining)


def test_the_base_has_learned_its_text(model, tokenizer, rendered):
    torch.manual_seed(0)
    random_base = AutoModelForCausalLM.from_config(model.config).eval()
    new = list(islice(text.documents(build.SEED + 2), 60))
    learned, ignorant = (loss_of(one, tokenizer, new) for one in (model, random_base))
    assert ignorant == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    assert learned < 0.4 * ignorant
    # the copying is what the task needs: the second time a phrase comes it is nearly free
    stories = [one.split("<|end|>")[0].removeprefix("<|user|>") + text.END for one in rendered[-60:]]
    assert loss_of(model, tokenizer, stories) < 0.3 * ignorant


@torch.no_grad()
def test_the_base_answers_questions_in_the_form_of_its_template(model, tokenizer):
    rng, right = Random(99), 0
    for _ in range(20):
        one = text.story(rng)
        asked = [{"role": "user", "content": f"{one.text}\nWhich animal is it?"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        right += tokenizer.decode(answer[0, ids.shape[1] :]) == one.facts["animal"] + text.END
    assert right >= 15


def test_the_shape_is_one_that_quantised_kernels_take(model):
    assert all(
        width % 32 == 0 for layer in model.model.layers for weight in layer.parameters() for width in weight.shape
    )
    assert 700_000 < model.num_parameters() < 900_000


def test_every_step_of_the_quickstart_has_an_odd_number_of_micro_batches(tokenizer, rendered):
    train = load_recipe(RECIPE).train
    lengths = [len(tokenizer(one)["input_ids"]) for one in rendered]
    together = train.micro_batch_tokens // max(lengths)
    assert together * max(lengths) <= train.micro_batch_tokens < (together + 1) * min(lengths)
    assert train.batch_size % together == 0
    count = train.batch_size // together
    assert count % 2 == 1 and count >= 5
    assert text.EXAMPLE_TOKENS[0] <= min(lengths) and max(lengths) <= text.EXAMPLE_TOKENS[1]
    starts = range(0, len(lengths), train.batch_size)
    assert all(len(pack(lengths[a:b], train.micro_batch_tokens)) == count for a, b in pairwise(starts))


def test_the_learning_rate_of_a_cycle_rises_and_ends_low():
    for repeat_steps, text_steps in build.CYCLES:
        rates = [build.learning_rate(step, repeat_steps, text_steps) for step in range(repeat_steps + text_steps)]
        assert rates[:repeat_steps] == sorted(rates[:repeat_steps])
        assert max(rates) == pytest.approx(build.PEAK_RATE, rel=1e-3) and rates[-1] < 0.03 * max(rates)


def test_the_script_builds_all_files_from_a_few_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CYCLES", ((1, 1), (0, 1)))
    build.build(tmp_path, seed=5)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {str(path.relative_to(ASSETS)) for path in ASSETS.rglob("*") if path.is_file()}
    assert made == {name for name in shipped if Path(name).suffix not in SOURCES}
    again = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.vocab_size == len(again)
    assert "3 steps of 2,048 tokens in 2 cycles" in (tmp_path / "README.md").read_text()
