"""Every epoch visits every example once, in an order that is computed, not stored, and independent of processes."""

from collections import Counter

import numpy as np
import pytest

from lora_kit.data.order import micro_batch_seed, permute
from lora_kit.data.plan import Plan
from lora_kit.data.tokens import Tokens
from lora_kit.randomness import mix
from lora_kit.recipe.schema import Recipe


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 1000, 4097])
def test_a_permutation_is_a_permutation(count):
    for key in range(5):
        assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


def test_a_position_does_not_depend_on_the_other_positions():
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.array([position]), 1000, 7)[0]) for position in (0, 1, 500, 999)] == whole[
        [0, 1, 500, 999]
    ].tolist()


def test_a_billion_examples_need_no_memory():
    assert 0 <= permute(np.array([123_456_789]), 10**9, 1)[0] < 10**9


def test_the_order_is_close_to_uniform():
    # over many keys every element should land in every place about equally often; chi-square with 8*7 cells
    landings = Counter()
    keys = 4000
    for key in range(keys):
        for place, example in enumerate(permute(np.arange(8), 8, mix(key)).tolist()):
            landings[place, example] += 1
    expected = keys / 8
    chi_square = sum(
        (landings[place, example] - expected) ** 2 / expected for place in range(8) for example in range(8)
    )
    assert chi_square < 95  # 49 degrees of freedom: 95 is passed once in 10,000


def test_neighbouring_epochs_are_unrelated():
    first, second = (permute(np.arange(10_000), 10_000, mix(0, 0, epoch)) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert (first == second).sum() < 10


def plan_of(examples, **train):
    recipe = Recipe.model_validate({"base": {"repo": "x"}, "data": {"train": "x"}, "train": train})
    example = (np.array([1, 2], np.int32), np.array([False, True]))
    return Plan(recipe, Tokens.of([example] * examples), micro_batch_tokens=512, padded=False)


def sequence_of(plan):
    """The examples of all steps of a plan, one after the other."""
    train = plan.recipe.train
    found = []
    for step in range(plan.steps):
        chosen = plan.examples(step)
        assert len(chosen) == min(train.batch_size, plan.total - step * train.batch_size)
        assert sorted(chosen) == sorted(example for group in plan.micro_batches(step) for example in group)
        found += chosen
    return found


@pytest.mark.parametrize(("examples", "batch_size", "epochs"), [(10, 3, 2), (7, 7, 3), (5, 8, 4), (100, 16, 1)])
def test_each_epoch_shows_each_example_exactly_once(examples, batch_size, epochs):
    found = sequence_of(plan_of(examples, batch_size=batch_size, epochs=epochs, seed=3))
    assert len(found) == examples * epochs
    for start in range(0, len(found), examples):
        assert sorted(found[start : start + examples]) == list(range(examples))


@pytest.mark.quick
def test_a_run_counted_in_steps_reads_over_the_end_of_an_epoch():
    plan = plan_of(10, batch_size=4, steps=5)
    assert (plan.total, plan.steps) == (20, 5)
    found = sequence_of(plan)
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]


@pytest.mark.parametrize(("epochs", "total", "steps"), [(0.5, 5, 2), (1.26, 13, 5), (0.01, 1, 1)])
def test_a_part_of_an_epoch_is_rounded_to_whole_examples(epochs, total, steps):
    plan = plan_of(10, batch_size=3, epochs=epochs)
    assert (plan.total, plan.steps) == (total, steps)


def test_seeds_differ_between_steps_and_micro_batches():
    seeds = {micro_batch_seed(seed, step, index) for seed in range(3) for step in range(50) for index in range(9)}
    assert len(seeds) == 3 * 50 * 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixing_matches_a_calculation_by_hand():
    def splitmix(state):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        return state ^ (state >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mix(5) == splitmix((golden + 5 * 0xD1342543DE82EF95 + golden) % 2**64)
