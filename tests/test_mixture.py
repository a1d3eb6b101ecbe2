"""A mixture takes its sources in exact shares, in an order computed for any step, and measures each of them."""

import json
import os
import random
import re
import signal
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import runs
import torch
from conftest import TEMPLATE, make_records, write_jsonl
from manifests import run_facts, step_facts, step_record
from transformers import AutoModelForCausalLM

from lora_kit.check import check
from lora_kit.data import cache
from lora_kit.data.order import allotted
from lora_kit.data.plan import Plan, prepare_data
from lora_kit.data.tokens import Tokens
from lora_kit.model.source import locate
from lora_kit.model.tokenizer import load_renderer
from lora_kit.randomness import mix
from lora_kit.recipe.load import load_recipe, resolve_path
from lora_kit.recipe.schema import Recipe
from lora_kit.runs.manifest import MANIFEST, Environment, Manifest, manifest_bytes, parse_manifest, read_manifest
from lora_kit.runs.resume import contract
from lora_kit.runs.run import Run
from lora_kit.runs.status import status
from lora_kit.runs.trackers import curves_of
from lora_kit.training.setup import train_fingerprint


def plan_of(sizes, *, weights=None, passes=None, **train):
    """A plan over sources of these sizes; every example has two tokens."""
    entries = [{"source": f"{index}.jsonl"} for index in range(len(sizes))]
    for key, values in (("weight", weights), ("epochs", passes)):
        for entry, value in zip(entries, values or [], strict=False):
            entry[key] = value
    recipe = Recipe.model_validate({"base": {"repo": "x"}, "data": {"train": entries}, "train": train})
    example = (np.array([1, 2], np.int32), np.array([False, True]))
    return Plan(recipe, Tokens.of([example] * sum(sizes)), 512, padded=False, sizes=tuple(sizes))


def sequence_of(plan):
    """The examples of all steps as pairs (source, number inside the source), in the order of their positions."""
    starts = [0, *np.cumsum(plan.sizes).tolist()]
    pairs = []
    for step in range(plan.steps):
        chosen = plan.examples(step)
        pairs += [
            (source, example - starts[source]) for example, source in zip(chosen, plan.sources_of(chosen), strict=True)
        ]
    assert len(pairs) == plan.total
    return pairs


def permuted(position, count, key):
    """A permutation of range(count) at one position: the Feistel network again, in plain integers."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = 2**half - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(6):
            mixed = right ^ mix(key, 2, number)
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((mixed ^ mixed >> 31) & mask)
        position = left << half | right
        if position < count:
            return position


def brute_force(sizes, shares, total, seed):
    """The sequence of a mixture by walking through all its positions, with a counter for each source."""

    def counts_until(position):
        found, left, rest = {}, position, sum(shares)
        for source in sorted(range(len(shares)), key=lambda source: (-shares[source], source)):
            found[source] = int(Fraction(left * shares[source], rest) + Fraction(1, 2))
            left, rest = left - found[source], rest - shares[source]
        return found

    taken, pairs = Counter(), []
    for position in range(total):
        wanted = counts_until(position + 1)
        (source,) = (source for source in range(len(sizes)) if wanted[source] > taken[source])
        epoch, number = divmod(taken[source], sizes[source])
        pairs.append((source, permuted(number, sizes[source], mix(seed, 5, source, epoch))))
        taken[source] += 1
    return pairs


@pytest.mark.parametrize(
    ("sizes", "options", "shares"),
    [
        ((40, 7, 300), {"epochs": 3, "batch_size": 16}, (40, 7, 300)),
        ((900, 700), {"epochs": 1.5, "batch_size": 7}, (900, 700)),
        ((60, 45), {"epochs": 2, "batch_size": 4, "passes": [2.5, 1]}, (150, 45)),
        ((50, 600, 3), {"steps": 200, "batch_size": 9, "weights": [0.5, 0.3, 0.2]}, (5, 3, 2)),
        ((50, 60), {"steps": 20, "batch_size": 8}, (50, 60)),
        ((5, 6), {"steps": 20, "batch_size": 8, "weights": [1e30, 1e-20]}, (10**50, 1)),
    ],
)
def test_the_order_is_that_of_a_walk_through_all_positions(sizes, options, shares):
    plan = plan_of(sizes, seed=5, **options)
    assert sequence_of(plan) == brute_force(sizes, shares, plan.total, 5)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"weights": [5, 3, 2], "steps": 33}, {"weights": [5, 3, 2], "steps": 100}),
        ({"passes": [1, 4.5, 1], "epochs": 1.3}, {"passes": [1, 4.5, 1], "epochs": 3}),
        ({"epochs": 1}, {"epochs": 2}),
    ],
)
def test_a_run_that_is_extended_begins_with_the_steps_of_the_shorter_run(short, long):
    before, after = (plan_of([70, 20, 30], batch_size=7, seed=3, **options) for options in (short, long))
    assert sequence_of(before) == sequence_of(after)[: before.total]


@pytest.mark.parametrize("trial", range(8))
def test_each_source_follows_permutations_of_its_own_and_after_each_step_its_share(trial):
    rng = random.Random(trial)
    sizes = [rng.choice([3, 40, 999, 1000, 2500]) for _ in range(rng.randint(2, 6))]
    weights = [round(10 ** rng.uniform(-1, 1), 2) for _ in sizes]
    plan = plan_of(sizes, weights=weights, steps=rng.randint(200, 600), batch_size=rng.choice([5, 16]), seed=trial)
    pairs = sequence_of(plan)
    for source, size in enumerate(sizes):
        own = [number for found, number in pairs if found == source]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))
        if size > 40 and len(own) >= 2 * size:
            assert own[:size] != own[size : 2 * size]
    taken = Counter()
    for position, (source, _) in enumerate(pairs, 1):
        taken[source] += 1
        for source, weight in enumerate(weights):
            assert abs(taken[source] - position * weight / sum(weights)) < 2
    assert [taken[source] for source in range(len(sizes))] == plan.seen()


def test_shares_in_tenths_are_the_same_in_every_ten_examples():
    pairs = sequence_of(plan_of([70, 200, 5], weights=[0.2, 0.7, 0.1], steps=25, batch_size=16))
    for start in range(0, 400, 10):
        assert Counter(source for source, _ in pairs[start : start + 10]) == {0: 2, 1: 7, 2: 1}


def test_an_epoch_of_sources_without_weights_sees_each_example_once():
    plan = plan_of([1234, 8, 501], epochs=3, batch_size=10, seed=2)
    pairs, size = sequence_of(plan), 1234 + 8 + 501
    every = {(source, number) for source, count in enumerate((1234, 8, 501)) for number in range(count)}
    for start in range(0, 3 * size, size):
        assert len(set(pairs[start : start + size])) == size and set(pairs[start : start + size]) == every
    assert plan.seen() == [3 * 1234, 3 * 8, 3 * 501]


def test_a_source_is_seen_as_often_as_its_epochs_say():
    plan = plan_of([100, 30], passes=[1, 4.5], epochs=2, batch_size=9)
    seen = Counter(sequence_of(plan))
    assert plan.seen() == [200, 270]
    assert {seen[0, number] for number in range(100)} == {2} and {seen[1, number] for number in range(30)} == {9}


def test_no_source_is_starved_and_no_count_falls():
    rng = random.Random(0)
    for _ in range(200):
        shares = [int(10 ** rng.uniform(0, 7)) + 1 for _ in range(rng.randint(1, 30))]
        grown = np.diff(allotted(np.arange(500) + rng.randrange(10**6), shares))
        assert (grown >= 0).all() and (grown.sum(axis=0) == 1).all()
        assert allotted(np.array([7 * sum(shares)]), shares)[:, 0].tolist() == [7 * share for share in shares]


def test_a_list_of_one_source_has_the_order_of_that_source():
    listed = plan_of([37], steps=40, batch_size=5, seed=9)
    recipe = Recipe.model_validate(
        {"base": {"repo": "x"}, "data": {"train": "x"}, "train": {"steps": 40, "batch_size": 5, "seed": 9}}
    )
    alone = Plan(recipe, listed.tokens, 512, padded=False)
    assert [listed.examples(step) for step in range(40)] == [alone.examples(step) for step in range(40)]


def test_a_late_step_needs_no_earlier_one():
    sizes = (10_000, 3_000, 70)
    options = {"weights": [5, 3, 2], "batch_size": 16, "seed": 1}
    late, shorter = plan_of(sizes, steps=2_000_000, **options), plan_of(sizes, steps=1_000_100, **options)
    assert late.examples(1_000_000) == shorter.examples(1_000_000)  # and the length of the run does not matter
    position = 16_000_000
    assert late.examples(1_000_000)[0] in late.examples(position // 16)


RECIPE = """
base: {{repo: {base}, dtype: float32}}
data:
  train:
    - {{source: long.jsonl, name: long, weight: 3}}
    - {{source: short.jsonl, weight: 1, format: prompt-completion, columns: {{prompt: asked}}}}
    - {{source: code.jsonl, weight: 2, max_examples: 5, template: other.jinja}}
  validation:
    first: held-out.jsonl
    second: {{source: short.jsonl, columns: {{prompt: asked}}, max_examples: 4}}
  sequence_length: 256
adapter: {{rank: 4, alpha: 8, dropout: 0.1}}
optim: {{learning_rate: 1e-2}}
train: {{steps: 8, batch_size: 6, micro_batch_tokens: 256, seed: 1}}
checkpoint: {{every_steps: 3}}
evaluate: {{every_steps: 4}}
"""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, base_folder):
    """A recipe over three sources, each with something of its own, and two named validation sets."""
    folder = tmp_path_factory.mktemp("mixture")
    pairs = [{"asked": f"q {number}", "completion": f"an answer {number % 3}"} for number in range(7)]
    write_jsonl(folder / "long.jsonl", make_records(23))
    write_jsonl(folder / "short.jsonl", pairs)
    write_jsonl(folder / "code.jsonl", make_records(9, seed=3))
    write_jsonl(folder / "held-out.jsonl", make_records(6, seed=5))
    (folder / "other.jinja").write_text("# " + TEMPLATE)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base_folder))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(mixture):
    """The folder of a run of this recipe that nothing disturbed, and what it printed."""
    out = mixture.parent / "run"
    return out, runs.train(mixture, out)


def mean_loss(base_folder, tokens, examples):
    """The loss of the base over some prepared examples, by transformers alone, one example at a time."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    total, weight = 0.0, 0
    for example in examples:
        ids, trained = (torch.tensor(array) for array in tokens.example(example))
        with torch.no_grad():
            logits = model(ids[None].long()).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
        total, weight = total + float(losses[trained[1:]].sum()), weight + int(trained[1:].sum())
    return total / weight, weight


def prepared(recipe_file):
    recipe = load_recipe(recipe_file)
    source = locate(recipe.base, resolve_path(recipe, recipe.base.repo))
    data = prepare_data(recipe, load_renderer(source, recipe))
    return data, Plan(recipe, data.train, 256, padded=False, sizes=data.counts.sizes)


def test_the_loss_of_a_source_is_that_of_its_examples(mixture, finished, base_folder):
    """Before the first update the adapter changes nothing, so the base alone gives the losses of the first step."""
    data, plan = prepared(mixture)
    (first, *_), members = Run(finished[0]).metrics, plan.examples(0)
    owners = plan.sources_of(members)
    assert [*first["sources"]] == ["long", "short", "code"] == [*data.counts.sources]
    for index, name in enumerate(first["sources"]):
        own = [example for example, owner in zip(members, owners, strict=True) if owner == index]
        loss, weight = mean_loss(base_folder, data.train, own)
        assert first["sources"][name] == {"loss": pytest.approx(loss, rel=1e-5), "trained_tokens": weight}


def test_the_losses_of_the_sources_add_up_to_the_loss_of_the_step(finished):
    for record in Run(finished[0]).metrics:
        parts = [source for source in record["sources"].values() if source["trained_tokens"]]
        total = sum(source["trained_tokens"] for source in parts)
        mean = sum(source["loss"] * source["trained_tokens"] for source in parts) / total
        assert mean == pytest.approx(record["loss"], rel=1e-5)


def test_each_validation_set_is_measured_alone_and_the_mean_counts_their_tokens(mixture, finished, base_folder):
    data, _ = prepared(mixture)
    run, sizes = Run(finished[0]), [counts.examples for counts in data.counts.sets.values()]
    assert sizes == [6, 4]
    measured = [mean_loss(base_folder, data.validation, part) for part in (range(6), range(6, 10))]
    base = run.result["metrics"]["base"]
    assert base["sets"] == pytest.approx({"first": measured[0][0], "second": measured[1][0]}, rel=1e-5)
    assert base["loss"] == pytest.approx(mean_loss(base_folder, data.validation, range(10))[0], rel=1e-5)
    at_steps = [record for record in run.metrics if "held_out_loss" in record]
    assert [record["step"] for record in at_steps] == [4, 8]
    adapter = run.result["metrics"]["adapter"]
    assert at_steps[-1]["held_out_sets"] == pytest.approx(adapter["sets"], rel=1e-6)
    assert status(run.folder).held_out["sets"] == at_steps[-1]["held_out_sets"]


def test_the_table_before_training_and_the_end_name_every_source(finished):
    _, printed = finished
    assert re.search(r"source +records +examples +tokens +share +seen +epochs\n", printed)
    assert re.search(r"long +23 +23 +[\d,]+ +50\.0% +24 +1\.04\n", printed)
    assert re.search(r"short +7 +7 +[\d,]+ +16\.7% +8 +1\.14\n", printed)
    assert re.search(r"code +5 +5 +[\d,]+ +33\.3% +16 +3\.20\n", printed)
    assert "trained, code" in printed and "held-out, adapter, second" in printed
    assert re.search(r"first of 4 validation examples \([\d.]+%\) whose tokens are also in the training data", printed)


def test_a_source_of_which_nothing_is_seen_is_told_by_check_too(mixture):
    changes = ["train.steps=1", "train.batch_size=1"]
    notes = check(load_recipe(mixture, changes)).notes
    why = "the run is so short, or the source's share so small, that none of its examples is seen"
    assert [note for note in notes if why in note] == [f"short: {why}", f"code: {why}"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_killed_and_resumed_ends_with_the_same_bytes_on_any_number_of_processes(
    mixture, finished, tmp_path, processes
):
    process = runs.start(mixture, tmp_path / "run", processes=processes)
    runs.wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs.train(mixture, tmp_path / "run", processes=3 - processes)
    assert runs.state_hash(tmp_path / "run", 8) == runs.state_hash(finished[0], 8)
    numbers = [[record["loss"], record["sources"]] for record in Run(tmp_path / "run").metrics]
    assert numbers == [[record["loss"], record["sources"]] for record in Run(finished[0]).metrics]


def test_a_changed_weight_needs_an_accept_and_a_changed_source_is_refused(mixture, finished):
    data, _ = prepared(mixture)
    recorded = read_manifest(Run(finished[0]).latest / MANIFEST).run
    text = mixture.read_text()
    verdicts = {}
    for old, new in (
        ("weight: 3", "weight: 4"),
        ("name: long", "name: novels"),
        ("max_examples: 5", "max_examples: 6"),
    ):
        other = mixture.with_name("other.yaml")
        other.write_text(text.replace(old, new))
        for row in contract(recorded, load_recipe(other), environment_of(recorded)):
            verdicts[row.key] = row.verdict
    assert verdicts["data.train.long.weight"] == "accept"
    assert verdicts["data.train.code.max_examples"] == "harmless"  # the fingerprint of the tokens decides
    moved = replace(data, counts=replace(data.counts, sources=dict(reversed(data.counts.sources.items()))))
    assert train_fingerprint(moved) != train_fingerprint(data) == recorded.fingerprints.train
    alone = replace(data, counts=replace(data.counts, sources={}))
    assert train_fingerprint(alone) == data.train.fingerprint


def environment_of(recorded):
    return Environment(recorded.fingerprints, recorded.versions, recorded.machine, recorded.computed_by)


def test_a_held_out_fraction_is_taken_from_each_source(mixture, tmp_path):
    other = mixture.with_name("fraction.yaml")
    begin, end = mixture.read_text().split("  validation:\n")
    other.write_text(begin + "  validation: 0.25\n" + end[end.index("  sequence_length") :])
    data, _ = prepared(other)
    assert [counts.examples for counts in data.counts.sets.values()] == [6, 2, 1]
    assert [counts.examples for counts in data.counts.sources.values()] == [17, 5, 4]


def test_a_template_of_a_source_changes_its_tokens_and_the_key_of_the_cache(mixture):
    recipe = load_recipe(mixture)
    renderer = load_renderer(locate(recipe.base, resolve_path(recipe, recipe.base.repo)), recipe)
    key = cache.key_of(recipe, renderer)
    template = mixture.with_name("other.jinja")
    before, text = prepare_data(recipe, renderer), template.read_text()
    template.write_text("#" + text)
    assert cache.key_of(recipe, renderer) != key
    after = prepare_data(recipe, renderer)
    template.write_text(text)
    first = sum(before.counts.sizes[:2])
    for example in range(len(before.train)):
        same = np.array_equal(before.train.example(example)[0], after.train.example(example)[0])
        assert same == (example < first)


def test_a_manifest_from_before_mixtures_is_read():
    content = json.loads(manifest_bytes(Manifest(run_facts(), step_facts(3), {}).to_dict()))
    del content["data"]["sources"], content["data"]["sets"]
    data = parse_manifest(manifest_bytes(content), "here").run.data
    assert data == run_facts().data and data.sources == {}


def test_a_tracker_gets_a_curve_for_each_source_and_each_set():
    record = step_record(
        3, sources={"a": {"loss": 1.5, "trained_tokens": 7}}, held_out_loss=2.0, held_out_sets={"b": 2.5}
    )
    curves = curves_of(record)
    assert (curves["loss/a"], curves["held_out_loss/b"], curves["held_out_loss"]) == (1.5, 2.5, 2.0)
    assert not {"sources", "held_out_sets"} & curves.keys()
