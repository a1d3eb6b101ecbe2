"""Both sides of a preference pair share the computation of their beginning, and every number stays what it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RECIPE, write_jsonl
from plain_loop import relative
from preferences import outcome, tuned, with_reference
from test_families import BY_SEGMENT, save_family
from test_preferences import preference_records
from transformers import AutoModelForCausalLM

from lora_kit.data.packing import IGNORE, collate
from lora_kit.data.tokens import Tokens
from lora_kit.errors import ContractError
from lora_kit.kernels import blocks
from lora_kit.kernels.attention import use_attention
from lora_kit.kernels.segments import Segments
from lora_kit.model import forward
from lora_kit.model.probe import shares_beginnings
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import DpoObjective, OrpoObjective, SimpoObjective
from lora_kit.training import loop
from lora_kit.training.objectives.pairs import PairObjective

SETTINGS = (
    DpoObjective(kind="dpo", beta=0.3, sft_weight=0.5),
    OrpoObjective(kind="orpo", beta=0.4),
    SimpoObjective(kind="simpo", beta=2.5, gamma=0.6),
)


def pairs(count=7, seed=0):
    """Pairs with prompts of 1 to 29 tokens, of which some are trained, and answers that often begin alike."""
    rng, examples, chosen = np.random.default_rng(seed), [], []
    for number in range(count):
        prompt, common = rng.integers(6, 90, rng.integers(1, 30)), rng.integers(6, 90, number % 3)
        trained, sides = rng.random(len(prompt)) < 0.3, []
        for side in range(2):
            own = np.append(6 + side, rng.integers(6, 90, rng.integers(0, 14)))
            ids = np.concatenate([prompt, common, own])
            sides.append((ids, np.append(trained, np.full(len(common) + len(own), True))))
        if number == 3:  # a side that is the beginning of the other
            sides[1] = tuple(part[: len(prompt) + len(common) + 1] for part in sides[0])
        examples.append(tuple(np.concatenate(parts) for parts in zip(*sides, strict=True)))
        chosen.append(len(sides[0][0]))
    return Tokens.of(examples, chosen)


def one_pair(first, second, trained_first, trained_second):
    trained = np.array([bool(int(each)) for each in trained_first + trained_second])
    return Tokens.of([(np.array(first + second), trained)], [len(first)]).sharing(True)


@pytest.mark.parametrize(
    ("pair", "shared"),
    [
        (([5, 6, 7, 8], [5, 6, 9], "0011", "001"), 2),
        (([5, 6, 7], [5, 6, 7], "001", "001"), 2),  # each keeps a token of its own
        (([5, 6, 7, 8], [5, 6, 7, 9], "0011", "0001"), 2),  # what is trained in one side only is not shared
        (([4, 6], [5, 6, 7], "01", "011"), 0),
    ],
)
def test_the_common_beginning_is_the_same_tokens_trained_alike(pair, shared):
    tokens = one_pair(*pair)
    assert tokens.shared(0) == shared
    assert tokens.places([0], padded=False) == tokens.places(slice(None), padded=False) == [len(tokens.ids) - shared]
    assert tokens.places([0], padded=True) == tokens.sharing(False).places([0], padded=True)


def test_a_token_that_both_sides_share_is_trained_in_both():
    tokens = one_pair([5, 6, 7, 8, 4], [5, 6, 7, 9], "00111", "0011")
    batch = collate(tokens, [0], padded=False)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 4, 9]] and batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8, 4, IGNORE, IGNORE]] and batch.segments == (6,)
    (places, labels), (other_places, other_labels) = batch.sequences()
    assert (places.tolist(), labels.tolist()) == ([1, 2, 3], [7, 8, 4])
    assert (other_places.tolist(), other_labels.tolist()) == ([1, 2], [7, 9])
    apart = collate(tokens.sharing(False), [0], padded=False)
    assert [labels.tolist() for _, labels in apart.sequences()] == [[7, 8, 4], [7, 9]]
    assert apart.sides.tolist() == batch.sides.tolist() == [[0, 1]] and not apart.forks


@pytest.mark.parametrize("family", BY_SEGMENT)
def test_loss_metrics_and_gradient_are_those_of_separate_sequences(family, tmp_path, base_folder, monkeypatch):
    """With blocks of 16 queries, so that long pairs are cut in two as pairs of more than 256 tokens are."""
    monkeypatch.setattr(blocks, "QUERIES", 16)
    monkeypatch.setattr(blocks, "ALIGNED", 4)
    number = list(BY_SEGMENT).index(family)
    settings = BY_SEGMENT[family] | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)  # of GPT-2
    computing, state = tuned(save_family(tmp_path / "base", family, base_folder, settings), micro_batch_tokens=160)
    objective, tokens, found = PairObjective(SETTINGS[number % 3]), pairs(seed=number), []
    for share in (True, False):
        examples = tokens.sharing(share)
        known = with_reference(examples, computing, 2)
        found.append((known.reference, *outcome(objective, known, computing, state)))
    (reference, loss, figures, gradient), (own_reference, own_loss, own_figures, own_gradient) = found
    assert np.allclose(reference, own_reference, rtol=1e-5) and loss == pytest.approx(own_loss, rel=1e-5)
    assert figures == pytest.approx(own_figures, rel=1e-4, abs=1e-5)
    assert relative(gradient, own_gradient) < 1e-5
    assert sum(tokens.sharing(True).places(range(7), padded=False)) < len(tokens.ids)


def test_a_model_in_which_branches_see_each_other_does_not_share(base_folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    use_attention(model, "segment")
    assert shares_beginnings(model, torch.device("cpu"))
    use_attention(model, "sdpa")
    with pytest.raises(ValueError, match="would see each other"):
        shares_beginnings(model, torch.device("cpu"))
    use_attention(model, "segment")
    monkeypatch.setattr(forward, "Segments", lambda lengths, device, forks: Segments(lengths, device))
    assert not shares_beginnings(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder):
    folder = tmp_path_factory.mktemp("recipe")
    data = write_jsonl(folder / "pairs.jsonl", preference_records(23))
    text = RECIPE.format(base=base_folder, data=data).replace("tokens: 256", "tokens: 512")
    (folder / "recipe.yaml").write_text(text + "objective: {kind: orpo}\n")
    return folder / "recipe.yaml"


def layout_of(run):
    return json.loads((run.latest / "manifest.json").read_text())["resolved"]["layout"]


def test_a_run_shares_unless_the_recipe_or_the_base_says_otherwise_and_a_resume_keeps_it(
    recipe, tmp_path, jobs, monkeypatch
):
    changes = ["train.steps=2", "adapter.dropout=0"]
    shared = loop.train(load_recipe(recipe, changes), tmp_path / "shared")
    apart = loop.train(load_recipe(recipe, [*changes, "train.share_prompts=never"]), tmp_path / "apart")
    other = loop.train(load_recipe(recipe, [*changes, "base.attention=sdpa"]), tmp_path / "other")
    assert [layout_of(run) for run in (shared, apart, other)] == ["shared", "packed", "packed"]
    for one, two in zip(shared.metrics, apart.metrics, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["tokens"] == two["tokens"]
        assert one["rewards/margins"] == pytest.approx(two["rewards/margins"], rel=1e-3, abs=1e-5)
    assert jobs[0].inputs.data.train.share and not jobs[1].inputs.data.train.share
    more = [*changes[1:], "train.steps=3"]
    with pytest.raises(ContractError, match=r"train\.share_prompts: never -> auto"):
        loop.train(load_recipe(recipe, more), tmp_path / "apart", accept=["train.steps"])
    accepted = ["train.steps", "train.share_prompts"]
    assert layout_of(loop.train(load_recipe(recipe, more), tmp_path / "apart", accept=accepted)) == "shared"
    monkeypatch.setattr("lora_kit.training.choices.shares_beginnings", lambda *_: pytest.fail("chosen again"))
    assert layout_of(loop.train(load_recipe(recipe, more), tmp_path / "shared", accept=accepted[:1])) == "shared"


def test_labelled_answers_and_padded_rows_are_left_as_they_are():
    tokens = replace(pairs(3), share=True)
    assert not collate(tokens, [0, 1], padded=True).forks
    single = Tokens.of([tokens.sides(0)[0]], [len(tokens.sides(0)[0][0])]).sharing(True)
    assert collate(single, [0], padded=False).forks == () and single.shared(0) == 0
