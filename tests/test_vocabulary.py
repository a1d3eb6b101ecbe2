"""A token without an embedding is refused, and one whose embedding was never trained is found."""

import json

import numpy as np
import pytest
from conftest import labels_of, make_tokenizer
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from lora_kit.data.tokens import Tokens
from lora_kit.data.vocabulary import check_tokenizer_fits, untrained_labels
from lora_kit.errors import BaseError


def tokens_of(*ids):
    return Tokens.of([(np.array([0, *ids], np.int32), np.ones(len(ids) + 1, np.bool_))])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.quick
def test_a_tokenizer_that_fits_passes(tokenizer):
    for spare in (0, 1, 64):  # bases round their embeddings up
        check_tokenizer_fits(tokenizer, len(tokenizer) + spare, used=tokens_of(len(tokenizer) - 1))


def refusal(tokenizer, size, **used):
    with pytest.raises(BaseError) as error:
        check_tokenizer_fits(tokenizer, size, **used)
    return str(error.value)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tokenizer):
    assert refusal(tokenizer, 20) == (
        "base.repo: its tokenizer has 106 tokens and the base only 20 embeddings; use the tokenizer of this base"
    )


def test_a_nearly_empty_tokenizer_is_refused(tokenizer):
    assert refusal(tokenizer, 32_000).startswith(
        "base.repo: its tokenizer has 106 tokens and the base 32,000 embeddings; tokenizer files are missing"
    )


def test_a_marker_beyond_the_embeddings_is_refused_only_when_used(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    check_tokenizer_fits(tokenizer, size, used=tokens_of(size - 1))
    found = refusal(tokenizer, size, used=tokens_of(3, size))
    assert found.startswith(
        f"base.repo: the data uses the token '<image>' ({size}), but the base has only {size} embed"
    )


def embedding(rows=1000, width=48, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_trained_rows_raise_no_alarm():
    rows = embedding()
    rows += 3  # however far from zero all of them are
    assert untrained_labels(tokens_of(*range(1, 500)), rows) == []


def test_rows_of_zero_of_the_mean_and_of_a_crowd_are_found():
    rows = embedding()
    noise = embedding(seed=1) * 0.01
    rows[7] = noise[7]
    rows[8] = rows.mean(axis=0) + noise[8]
    rows[20:24] = rows[20] + noise[20:24]
    rows[30:32] = rows[30] + noise[30:32]  # two alike may be two spellings
    assert sorted(untrained_labels(tokens_of(5, 6, 7, 8, 21, 23, 30, 31, 40), rows)) == [7, 8, 21, 23]


def test_the_most_frequent_come_first_and_prompts_do_not_count():
    rows = embedding()
    rows[10:14] = 0
    made = Tokens.of([(np.array([0, 10, 11, 12, 12], np.int32), np.array([False, False, True, True, True]))])
    assert untrained_labels(made, rows) == [12, 11]


@pytest.mark.parametrize("untrained", [0.5, 0.9])
def test_it_works_when_most_rows_are_untrained(untrained):
    rows = embedding()
    edge = int(len(rows) * untrained)
    rows[:edge] = rows[0] + embedding(seed=1)[:edge] * 0.01
    assert set(untrained_labels(tokens_of(3, 5, edge + 1, edge + 2), rows)) == {3, 5}


def test_a_wide_embedding_and_a_tensor_give_the_same():
    import torch

    rows = embedding(width=1000)
    rows[3:6] = rows[3]
    expected = untrained_labels(tokens_of(1, 2, 3), rows)
    assert expected == [3] == untrained_labels(tokens_of(1, 2, 3), torch.tensor(rows).to(torch.bfloat16))


def test_the_base_s_own_memory_is_left_alone():
    import torch

    rows = embedding()
    weights = torch.tensor(rows)
    untrained_labels(tokens_of(1, 2), weights)
    assert np.array_equal(weights.numpy(), rows)


@pytest.mark.parametrize("base", ["stories260k-hf", "babyllama361-hf"])
def test_a_real_base_knows_its_stories_and_not_its_end_of_sequence(shared_data, base):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / base)
    rows = load_file(shared_data / base / "model.safetensors")["model.embed_tokens.weight"]
    stories = json.loads((shared_data / "tinystories-sample" / "tinystories_1000.json").read_text())
    clean = [story for story in stories if story.isascii()]
    made = Tokens.of(
        [
            (np.array([*ids, 2], np.int32), np.ones(len(ids) + 1, np.bool_))
            for ids in tokenizer(clean, verbose=False).input_ids
        ]
    )
    found = untrained_labels(made, rows)
    assert found[0] == tokenizer.eos_token_id == 2
    counts = np.bincount(labels_of(made))
    assert [token for token in found if token != 2 and counts[token] > 2] == []
