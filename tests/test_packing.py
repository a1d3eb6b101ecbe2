"""Packing loses no token and keeps its limit; gradients are summed by the same tree for any number of processes."""

from fractions import Fraction

import numpy as np
import pytest

from lora_kit.data.packing import IGNORE, collate, cost, pack, reduction_schedule
from lora_kit.data.tokens import Tokens


def random_lengths(seed, count=40, longest=64):
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_micro_batch_and_none_is_too_large(padded, seed):
    lengths = random_lengths(seed)
    groups = pack(lengths, 128, padded=padded)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[index] for index in group]
        assert (len(members) * max(members) if padded else sum(members)) <= 128


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_near_the_best_possible(seed):
    lengths = random_lengths(seed)
    assert len(pack(lengths, 128)) <= 11 / 9 * -(-sum(lengths) // 128) + 1  # the bound of best-fit decreasing


def test_an_example_goes_where_the_least_space_remains():
    assert pack([6, 5, 4, 3], 9) == [[1, 2], [0, 3]] or pack([6, 5, 4, 3], 9) == [[0, 3], [1, 2]]


def test_the_most_expensive_micro_batch_comes_first():
    lengths = random_lengths(1)
    costs = [cost([lengths[index] for index in group]) for group in pack(lengths, 128)]
    assert costs == sorted(costs, reverse=True)


def make_tokens(lengths):
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(0, 50, offsets[-1]).astype(np.int32)
    return Tokens(ids=ids, trained=rng.random(offsets[-1]) < 0.5, offsets=offsets)


def test_a_packed_row_holds_the_examples_end_to_end_with_shifted_labels():
    tokens = make_tokens([3, 5, 2])
    batch = collate(tokens, [0, 2], padded=False)
    (first, first_mask), (third, third_mask) = tokens.example(0), tokens.example(2)
    assert batch.ids.tolist() == [[*first, *third]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask is None
    labels = [first[1] if first_mask[1] else IGNORE, first[2] if first_mask[2] else IGNORE, IGNORE]
    labels += [third[1] if third_mask[1] else IGNORE, IGNORE]
    assert batch.labels.tolist() == [labels]


@pytest.mark.quick
def test_no_label_crosses_from_one_example_into_the_next():
    tokens = Tokens(np.arange(6, dtype=np.int32), np.ones(6, dtype=bool), np.array([0, 3, 6]))
    assert collate(tokens, [0, 1], padded=False).labels.tolist() == [[1, 2, IGNORE, 4, 5, IGNORE]]


def test_padded_rows_hold_the_same_tokens_and_labels():
    tokens = make_tokens([3, 5, 2])
    packed, padded = (collate(tokens, [0, 1, 2], padded=flag) for flag in (False, True))
    real = padded.attention_mask.astype(bool)
    assert padded.ids.shape == (3, 5)
    assert padded.ids[real].tolist() == packed.ids[0].tolist()
    assert padded.labels[real].tolist() == packed.labels[0].tolist()
    assert (padded.labels[~real] == IGNORE).all()
    assert packed.weight == padded.weight == tokens.weight(0) + tokens.weight(1) + tokens.weight(2)


def tree(leaves):
    """The definition, on symbols: T(m) = (T(m[0::2]) + T(m[1::2]))."""
    return leaves[0] if len(leaves) == 1 else (tree(leaves[0::2]), tree(leaves[1::2]))


def run_schedule(leaves):
    stack = []
    deepest = 0
    for index, merges in reduction_schedule(len(leaves)):
        total = leaves[index]
        for _ in range(merges):
            total = (stack.pop(), total)
        stack.append(total)
        deepest = max(deepest, len(stack))
    (result,) = stack
    return result, deepest


@pytest.mark.parametrize("count", range(1, 40))
def test_the_schedule_adds_in_the_order_of_the_tree(count):
    result, deepest = run_schedule(list(range(count)))
    assert result == tree(list(range(count)))
    assert deepest <= (count - 1).bit_length() + 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 11, 16, 23])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_any_power_of_two_of_processes_makes_the_same_tree(count, processes):
    shares = [list(range(count))[process::processes] for process in range(processes)]
    partial_sums = [run_schedule(share)[0] for share in shares if share]
    assert tree(partial_sums) == tree(list(range(count)))


def test_floating_point_sums_differ_in_other_orders():
    # the point of a fixed tree: addition in another order gives other bits
    leaves = np.random.default_rng(0).standard_normal(23).astype(np.float32)
    exact = float(sum(Fraction(float(leaf)) for leaf in leaves))
    in_tree = tree_sum(leaves)
    assert abs(in_tree - exact) < 1e-5
    assert any(tree_sum(np.roll(leaves, shift)) != in_tree for shift in range(1, 23))


def tree_sum(leaves):
    return leaves[0] if len(leaves) == 1 else tree_sum(leaves[0::2]) + tree_sum(leaves[1::2])
