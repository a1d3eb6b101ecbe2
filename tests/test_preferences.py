"""DPO, ORPO, SimPO and KTO compute what their papers say, however a step is packed."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import RECIPE, write_jsonl
from plain_loop import relative
from preferences import LIMIT, outcome, preference_records, random_tokens, tuned, with_reference

from lora_kit.artifacts.card import model_card
from lora_kit.errors import DataError, Stopped
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import DpoObjective, KtoObjective, OrpoObjective, SimpoObjective
from lora_kit.runs.store import open_checkpoint
from lora_kit.runs.trackers import curves_of
from lora_kit.training import loop, reference
from lora_kit.training.evaluation import evaluate
from lora_kit.training.objectives.kto import Kto
from lora_kit.training.objectives.log_probs import mismatched
from lora_kit.training.objectives.pairs import PairObjective
from lora_kit.training.reference import Reference, as_reference

STEPS = 4
SETTINGS = {
    "dpo": DpoObjective(kind="dpo", beta=0.3),
    "smoothed": DpoObjective(kind="dpo", beta=0.3, label_smoothing=0.2),
    "normalised": DpoObjective(kind="dpo", beta=3.0, length_normalised=True),
    "hinge": DpoObjective(kind="dpo", beta=0.3, loss="hinge"),
    "ipo": DpoObjective(kind="dpo", beta=0.3, loss="ipo"),
    "with sft": DpoObjective(kind="dpo", beta=0.3, sft_weight=0.7),
    "orpo": OrpoObjective(kind="orpo", beta=0.4),
    "simpo": SimpoObjective(kind="simpo", beta=2.5, gamma=0.6),
}
KTO = KtoObjective(kind="kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.6)


def log_prob(model, ids, trained):
    """The summed log-probability of the trained tokens of one sequence, and their number."""
    ids = torch.from_numpy(ids).long()
    log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    counted = torch.from_numpy(trained[1:].copy())
    return log_probs[counted].sum(), int(counted.sum())


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def by_hand(name, pair, base):
    """The loss of a pair as docs/objectives.md writes it, given (log-probability, tokens) of its sides."""
    (good, n), (bad, m), (good_base, _), (bad_base, _) = *pair, *base
    if name == "orpo":
        odds = [(x / k).exp() / (1 - (x / k).exp()) for x, k in pair]
        return -good / n - 0.4 * torch.log(sigmoid(odds[0].log() - odds[1].log()))
    if name == "simpo":
        return -torch.log(sigmoid(2.5 * (good / n - bad / m) - 0.6))
    h = (good - good_base) - (bad - bad_base)
    if name in ("normalised", "ipo"):
        h = (good - good_base) / n - (bad - bad_base) / m
    return {
        "dpo": lambda: -torch.log(sigmoid(0.3 * h)),
        "smoothed": lambda: -0.8 * torch.log(sigmoid(0.3 * h)) - 0.2 * torch.log(sigmoid(-0.3 * h)),
        "normalised": lambda: -torch.log(sigmoid(3.0 * h)),
        "hinge": lambda: torch.clamp(1 - 0.3 * h, min=0),
        "ipo": lambda: (h - 1 / 0.6) ** 2,
        "with sft": lambda: -torch.log(sigmoid(0.3 * h)) - 0.7 * good / n,
    }[name]()


@pytest.fixture(scope="module")
def plain(base_folder):
    """A model that transformers and peft compute alone, one sequence at a time."""
    return tuned(base_folder, padded=True, kernels=False)


@pytest.fixture(scope="module")
def packed(base_folder):
    return tuned(base_folder, micro_batch_tokens=60)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_of_the_equation_one_sequence_at_a_time(name, plain, packed):
    tokens = random_tokens()
    model, state = plain[0].model, plain[1]
    state.reduced.zero_()
    losses = []
    for index in range(len(tokens)):
        with torch.no_grad(), model.disable_adapter():
            base = [log_prob(model, *side) for side in tokens.sides(index)]
        losses.append(by_hand(name, [log_prob(model, *side) for side in tokens.sides(index)], base))
    expected = torch.stack(losses).mean()
    expected.backward()
    objective = PairObjective(SETTINGS[name])
    known = with_reference(tokens, packed[0], 2) if objective.columns else tokens
    loss, _, gradient = outcome(objective, known, *packed)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient, state.gradient) < 1e-5


def test_the_loss_of_kto_is_that_of_its_equation_with_a_divergence_over_the_whole_step(plain, packed):
    tokens = random_tokens(9, unpaired=True, seed=9)
    model, state = plain[0].model, plain[1]
    others = mismatched(tokens, range(9), LIMIT)
    state.reduced.zero_()

    def ratio(side):
        with torch.no_grad(), model.disable_adapter():
            base, _ = log_prob(model, *side)
        return log_prob(model, *side)[0] - base

    with torch.no_grad():
        kl = max(0.0, float(torch.stack([ratio(others.example(index)) for index in range(9)]).mean()))
    losses, rewards = [], {True: [], False: []}
    for index in range(9):
        good, r = bool(tokens.chosen[index]), ratio(tokens.sides(index)[0])
        losses.append(1.3 * (1 - sigmoid(0.2 * (r - kl))) if good else 0.6 * (1 - sigmoid(0.2 * (kl - r))))
        rewards[good].append(0.2 * r.item())
    expected = torch.stack(losses).mean()
    expected.backward()
    loss, figures, gradient = outcome(Kto(KTO, LIMIT), with_reference(tokens, packed[0], 3), *packed)
    assert loss == pytest.approx(expected.item(), rel=1e-5) and kl > 0
    assert relative(gradient, state.gradient) < 1e-5
    means = {good: sum(each) / len(each) for good, each in rewards.items()}
    assert figures["kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["rewards/chosen"] == pytest.approx(means[True], rel=1e-4)
    assert figures["rewards/rejected"] == pytest.approx(means[False], rel=1e-4)
    assert figures["rewards/margins"] == pytest.approx(means[True] - means[False], rel=1e-4)


def test_a_mismatched_answer_follows_the_prompt_of_another_example():
    tokens = random_tokens(4)
    ids, trained = mismatched(tokens, [1], LIMIT).example(0)
    (own, own_trained), (other, other_trained) = tokens.sides(1)[0], tokens.sides(3)[0]
    assert ids.tolist() == [*own[~own_trained], *other[other_trained]]
    assert trained.sum() == other_trained.sum() and not trained[: (~own_trained).sum()].any()
    assert len(mismatched(tokens, [1], 3).example(0)[0]) == 3


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("layout", [{"micro_batch_tokens": 500}, {"micro_batch_tokens": 128, "padded": True}])
def test_nothing_depends_on_how_a_step_is_packed(kind, layout, packed, base_folder):
    objective = PairObjective(SETTINGS["dpo"]) if kind == "dpo" else Kto(KTO, LIMIT)
    tokens, found = random_tokens(8), []
    for computing, state in (packed, tuned(base_folder, **layout)):
        found.append(outcome(objective, with_reference(tokens, computing, objective.columns), computing, state))
    (loss, figures, gradient), (other_loss, other_figures, other_gradient) = found
    assert other_loss == pytest.approx(loss, rel=1e-5) and relative(other_gradient, gradient) < 1e-5
    assert other_figures == pytest.approx(figures, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder):
    """A DPO run whose steps have several micro-batches."""
    folder = tmp_path_factory.mktemp("recipe")
    data = write_jsonl(folder / "pairs.jsonl", preference_records(23))
    text = RECIPE.format(base=base_folder, data=data).replace("steps: 8", f"steps: {STEPS}")
    (folder / "recipe.yaml").write_text(text.replace("tokens: 256", "tokens: 512") + "objective: {kind: dpo}\n")
    return folder / "recipe.yaml"


def test_the_reference_goes_on_where_it_was_stopped_and_is_not_computed_twice(packed, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2)
    computing, tokens, seen, stop = packed[0], random_tokens(7), [], [False, True]
    computed = Reference.computed

    def counted(self, tokens, examples):
        seen.append([*examples])
        return computed(self, tokens, examples)

    monkeypatch.setattr(Reference, "computed", counted)
    with as_reference(computing.model):
        with pytest.raises(Stopped, match="after 4 of 7 examples of the reference, which are kept"):
            Reference(computing, 2, LIMIT, {}, lambda: stop.pop(0)).of(tokens)
        first = Reference(computing, 2, LIMIT, {}).of(tokens).reference
        again = Reference(computing, 2, LIMIT, {}).of(tokens).reference
    assert seen == [[0, 1], [2, 3], [4, 5], [6]]
    assert np.array_equal(first, again) and np.isfinite(first).all()
    with as_reference(computing.model):
        Reference(computing, 2, LIMIT, {"base": "another"}).of(tokens)
    assert len(seen) == 8


def test_the_first_step_in_bf16_equals_the_reference(recipe, tmp_path):
    changes = ["train.steps=1", "base.dtype=bfloat16", "data.validation=0.3"]
    run = loop.train(load_recipe(recipe, changes), tmp_path / "run")
    (record,) = run.metrics
    assert record["loss"] == pytest.approx(math.log(2), rel=1e-6) and record["rewards/margins"] == 0
    assert run.result["metrics"]["base"]["metrics"]["rewards/accuracies"] == 0.5


def test_the_reference_is_the_adapter_that_a_run_begins_with(recipe, reference, tmp_path, jobs):
    loop.train(load_recipe(recipe, ["train.steps=1"]), tmp_path / "fresh")
    changes = ["train.steps=1", "adapter.dropout=0"]
    loop.train(load_recipe(recipe, changes), tmp_path / "run", start_from=reference(recipe))
    fresh, begun = (job.inputs.data.train.reference for job in jobs)
    assert not np.allclose(fresh, begun, atol=1e-3)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["loss"] == pytest.approx(math.log(2), rel=1e-5) and record["rewards/chosen"] == pytest.approx(
        0, abs=1e-5
    )


def test_held_out_accuracy_and_margin_are_in_the_log_the_result_and_the_table(recipe, tmp_path, capsys):
    changes = ["train.steps=2", "evaluate.every_steps=2", "data.validation=0.3"]
    run = loop.train(load_recipe(recipe, changes), tmp_path / "run")
    adapter, base = (run.result["metrics"][name] for name in ("adapter", "base"))
    assert base["metrics"]["rewards/accuracies"] == 0.5 and base["loss"] == pytest.approx(math.log(2))
    assert base["perplexity"] is None and adapter["metrics"]["rewards/margins"] != 0
    assert run.metrics[-1]["held_out_metrics"] == pytest.approx(adapter["metrics"])
    assert evaluate(load_recipe(recipe, changes), run.folder)["adapter"].metrics == pytest.approx(adapter["metrics"])
    assert (
        curves_of(run.metrics[-1])["held_out/rewards/margins"] == run.metrics[-1]["held_out_metrics"]["rewards/margins"]
    )
    card = model_card("me/own", open_checkpoint(run.latest).manifest, scores=run.result["metrics"])
    assert f"| adapter | {adapter['loss']:.4f} | {adapter['metrics']['rewards/accuracies']:.1%} | " in card
    printed = capsys.readouterr().out
    assert f"preference accuracy {adapter['metrics']['rewards/accuracies']:.1%}, margin" in printed


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_mixture_measures_the_loss_of_each_of_its_sources(kind, recipe, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", preference_records(12)[7:])
    if kind == "kto":  # pairs and labelled answers may be mixed
        answers = [{"prompt": "ab", "completion": "h" * count, "label": count % 2 == 0} for count in range(1, 8)]
        other = write_jsonl(tmp_path / "other.jsonl", answers)
    first = load_recipe(recipe).data.train
    train = f"data.train=[{{source: {first}, weight: 2}}, {{source: {other}, weight: 1}}]"
    changes = [train, "data.validation=0.3", "train.steps=3", "evaluate.every_steps=3", f"objective.kind={kind}"]
    run = loop.train(load_recipe(recipe, changes), tmp_path / "run")
    for record in run.metrics:
        counts = {name: one["pairs" if kind == "dpo" else "answers"] for name, one in record["sources"].items()}
        losses = {name: one["loss"] for name, one in record["sources"].items() if counts[name]}
        total = sum(losses[name] * counts[name] for name in losses)
        assert total / sum(counts.values()) == pytest.approx(record["loss"], rel=1e-5)
    assert all(sum(record["sources"][name].get("loss") is not None for record in run.metrics) for name in counts)
    assert sorted(run.metrics[-1]["held_out_sets"]) == ["other", "pairs"]


def test_a_source_without_preferences_is_refused_with_its_format(recipe, data_file, tmp_path):
    first = load_recipe(recipe).data.train
    changes = [f"data.train=[{first}, {data_file}]"]
    with pytest.raises(DataError, match=r"train\.jsonl.*the columns messages fit the format messages, which needs"):
        loop.train(load_recipe(recipe, changes), tmp_path / "run")
