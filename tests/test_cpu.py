"""The kernels in C: right in every number wherever tiles, lanes and threads begin and end, the same bits at a replay,
nothing written outside the results, and wrong arguments refused.
"""

import ctypes
import mmap
from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import need_c
from forks import visible_in

from lora_kit.kernels.cpu import build, ops
from lora_kit.kernels.cpu.backend import Cpu
from lora_kit.kernels.cpu.buffers import BufferPool
from lora_kit.kernels.segments import Segments

BF16, EXACT = torch.bfloat16, torch.float64
LENGTHS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 300)
WIDTHS = (1, 8, 24, 64, 80, 128, 136, 256)
WINDOWS = (None, 1, 5, 33, 64, 65, 95, 127, 128, 130, 1000)
HEADS = ((2, 2), (4, 2), (4, 1), (3, 1))  # and those of keys
BOUND = 2**-7
GUARD = mmap.PAGESIZE  # bytes on either side


@pytest.fixture
def c():
    """The operators in C; skip the test where they cannot be compiled."""
    need_c()
    return ops


@pytest.fixture(params=["avx512", "amx"])
def products(c, request):
    """The operators, which multiply with these instructions."""
    library = build.library()
    if request.param == "amx" and not library.in_tiles:
        pytest.skip("this CPU has no AMX")
    library.kernels.use_tiles(request.param == "amx")
    yield c
    library.kernels.use_tiles(library.in_tiles)


@pytest.fixture
def guarded(monkeypatch):
    """Put all memory that the kernels allocate between guards, filled with NaN; return the function that allocates it.

    Reading or writing what comes after ends the process.
    """
    made, libc = [], ctypes.CDLL(None)

    def guarded(shape, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        end = (-(-size // GUARD) + 1) * GUARD
        whole = np.frombuffer(mmap.mmap(-1, end + GUARD), np.uint8)
        assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + end), GUARD, 0) == 0  # not even to be read
        made.append(torch.from_numpy(whole[end - size - GUARD : end]).fill_(0xFF))
        return made[-1][GUARD:].view(dtype).view(shape)

    monkeypatch.setattr(ops.pool, "empty", lambda *shape: guarded(shape, BF16))
    monkeypatch.setattr(ops.pool, "workspace", lambda size: guarded((size,), torch.uint8))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda one, *shape, dtype=None: guarded(shape, dtype or one.dtype))
    yield guarded
    assert made and all((one[:GUARD] == 0xFF).all() for one in made)


def linear(products, bias=None):
    x, weight, transposed = zip(*products, strict=True)
    return ops.linear(x, weight, transposed, bias)


def gated_backward(grad_product, gate, up, tanh):
    return grad_product, ops.gated_backward(grad_product, gate, up, tanh)


def between_guards(guarded, tensors):
    return [guarded(one.shape, one.dtype).copy_(one) for one in tensors]


def inside_guards(outputs):
    return all(one.untyped_storage().nbytes() == one.nbytes + GUARD for one in outputs)


def drawn(*shape, seed=0, size=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(BF16)


def near(ours, right, *, relative, least):
    """Check every number: bf16 rounds it by up to 2^-8, and fp32 rounds its summands by `least` together."""
    assert ours.dtype == BF16 and ours.shape == right.shape and ours.isfinite().all()
    assert ((ours.to(EXACT) - right).abs() <= relative * right.abs() + least).all()


# attention


def parts(lengths, heads, shared, width, *, seed=0, size=1.0):
    """Queries, keys, values and the gradient of the output."""
    shapes = [(sum(lengths), many, width) for many in (heads, shared, shared, heads)]
    given = [drawn(*shape, seed=4 * seed + place) for place, shape in enumerate(shapes)]
    return [one * size for one in given[:2]] + given[2:]


def attended(given, lengths, scale, window, forks=()):
    """The output, the gradients and the logarithms of the sums."""
    *inputs, above = given
    spans = torch.from_numpy(Segments(lengths, torch.device("cpu"), forks).spans)
    output, sums = ops.attention(*inputs, spans, scale, window)
    return [output, *ops.attention_backward(above, *inputs, output, sums, spans, scale, window), sums]


def attention_by_definition(given, lengths, scale, window, forks=()):
    """Return the output, the gradients of query, key and value, and the sum of each number's absolute summands.

    In float64, by all pairs of an example, and by the formulas of a gradient.
    """
    found = []
    parts = (one.to(EXACT).transpose(0, 1).split(lengths, dim=1) for one in given)
    for query, *shared, above, fork in zip_longest(*parts, forks):
        key, value = (one.repeat_interleave(len(query) // len(one), dim=0) for one in shared)
        hidden = ~visible_in(query.shape[1], window, fork)
        share = (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        output, of_share = share @ value, above @ value.mT
        of_score = share * (of_share - (share * of_share).sum(-1, keepdim=True)) * scale
        inside = (above * output).abs().sum(-1, keepdim=True)  # what the sum above is computed from, in bf16
        size = of_score.abs() + share * inside * scale
        exact = output, of_score @ key, of_score.mT @ query, share.mT @ above
        sizes = share @ value.abs(), size @ key.abs(), size.mT @ query.abs(), share.mT @ above.abs()
        group = [one.shape[0] for one in (query, query, *shared)]
        found.append(
            [
                one.unflatten(0, (many, -1)).sum(1)
                for some in (exact, sizes)
                for one, many in zip(some, group, strict=True)
            ]
        )
    whole = [torch.cat(one, dim=1).transpose(0, 1) for one in zip(*found, strict=True)]
    return whole[:4], whole[4:]


def hold(given, lengths, scale, window, forks=()):
    """Check every number of attention against three roundings: of its factors, of its summands and of itself."""
    *ours, _ = attended(given, lengths, scale, window, forks)
    for mine, right, size in zip(ours, *attention_by_definition(given, lengths, scale, window, forks), strict=True):
        assert mine.dtype == BF16 and mine.shape == right.shape and mine.isfinite().all()
        assert ((mine.to(EXACT) - right).abs() <= BOUND * size + 1e-6).all()


@pytest.mark.parametrize("seed", range(132))
def test_attention_is_that_of_the_definition_wherever_tiles_begin_and_end(seed, products):
    rng = np.random.default_rng(seed)
    lengths = tuple(map(int, rng.permutation([LENGTHS[seed % 12], *rng.choice(LENGTHS, seed % 3)])))
    width, window, heads = WIDTHS[seed % 8], WINDOWS[seed % 11], HEADS[(seed + seed // 4) % 4]
    given, scale = parts(lengths, *heads, width, seed=seed), (width**-0.5, 0.1)[seed % 2]
    hold(given, lengths, scale, window)


@pytest.mark.parametrize("seed", range(24))
def test_attention_of_examples_that_fork_is_that_of_the_definition(seed, products):
    rng = np.random.default_rng(seed)
    forks, lengths = [], []
    for _ in range(1 + seed % 3):
        shared, first, second = (int(rng.choice([0, 1, 31, 64, 100, 130])) for _ in range(3))
        forks.append((shared, shared + first))
        lengths.append(shared + first + second + 1)
    lengths, forks = (40, *lengths, 70), (None, *forks)
    window, heads = (None, None, 1, 40, 150)[seed % 5], HEADS[seed % 4]
    hold(parts(lengths, *heads, WIDTHS[seed % 8], seed=seed), lengths, 0.2, window, forks)


def test_rows_have_the_logarithm_of_their_sum(products):
    lengths, (query, key, *_) = (130, 33), parts((130, 33), 4, 2, 24)
    *_, sums = attended(parts(lengths, 4, 2, 24), lengths, 0.3, None)
    for first, last in ((0, 130), (130, 163)):
        both = query[first:last].to(EXACT), key[first:last].to(EXACT).repeat_interleave(2, dim=1)
        scores = torch.einsum("qhw,khw->hqk", *both) * 0.3
        hidden = torch.ones(last - first, last - first).triu(1).bool()
        right = scores.masked_fill(hidden, -torch.inf).logsumexp(-1) / np.log(2)
        assert (sums[:, first:last] - right).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 40])
def test_huge_scores_are_finite_and_right(window, products):
    lengths = (300, 33)
    given = parts(lengths, 4, 2, 64, size=12)  # scores of some hundreds
    assert (given[0][:300, 0].float() @ given[1][:300, 0].float().T * 64**-0.5).abs().max() > 400
    hold(given, lengths, 64**-0.5, window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_whose_scores_are_all_far_from_zero_are_right(sign, window, products):
    lengths = (130, 65, 1)  # padding has a score of zero: far above all others, or far below
    given = parts(lengths, 4, 2, 64)
    given[0], given[1] = given[0] * 0.25 + 8, given[1] * 0.25 + 8 * sign
    scores = given[0][:, 0].float() @ given[1][:, 0].float().T * 64**-0.5
    assert (scores * sign).min() > 300
    hold(given, lengths, 64**-0.5, window)


@pytest.mark.parametrize("window", [None, 33])
def test_neighbours_do_not_change_the_bits_of_an_example(window, products):
    lengths = (65, 130, 33)
    given = parts(lengths, 4, 2, 24)
    alone = attended([one[65:195] for one in given], (130,), 0.3, window)
    for others in (1.0, 1e4, torch.nan):
        row = [torch.full_like(one, others).index_copy(0, torch.arange(65, 195), one[65:195]) for one in given]
        *found, sums = attended(row, lengths, 0.3, window)
        assert all(torch.equal(mine[65:195], one) for mine, one in zip(found, alone[:-1], strict=True))
        assert torch.equal(sums[:, 65:195], alone[-1])


@pytest.mark.parametrize("window", [None, 33])
def test_what_comes_later_in_an_example_changes_nothing_before(window, products):
    given, lengths = parts((130,), 4, 2, 24), (130,)
    changed = [torch.cat([one[:70], one[70:] * -3]) for one in given]
    assert torch.equal(attended(given, lengths, 0.3, window)[0][:70], attended(changed, lengths, 0.3, window)[0][:70])


@pytest.mark.parametrize("place", [0, 3, 40])
def test_a_nan_key_makes_every_row_that_sees_it_nan(place, products):
    given = parts((70,), 2, 1, 8)
    given[1][place, 0, 0] = torch.nan
    output, *_ = attended(given, (70,), 0.3, None)
    assert output[place:].isnan().all()


@pytest.mark.parametrize("lengths", [(1,), (33, 64), (130, 1, 65), (300,)])
@pytest.mark.parametrize("width", [1, 24, 136])
@pytest.mark.parametrize("window", [None, 33])
def test_attention_writes_all_of_its_outputs_and_nothing_else(lengths, width, window, products, request):
    given = parts(lengths, 4, 2, width)
    expected = attended(given, lengths, 0.3, window)
    guarded = request.getfixturevalue("guarded")
    found = attended(between_guards(guarded, given), lengths, 0.3, window)
    assert inside_guards(found) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# norms, gated activations and rotary positions


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 15), (9, 17), (3, 33), (8, 100), (2, 5001)])
def test_norms_of_any_width_are_right_in_every_number(shape, gemma, c, guarded):
    given = [drawn(*shape, seed=1, size=3), drawn(shape[1], seed=2), drawn(*shape, seed=3)]
    x, weight, above = (one.to(EXACT) for one in given)
    x.requires_grad_()
    inverse = (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    expected = x * inverse * (weight + gemma)
    (of_x,) = torch.autograd.grad((expected * above).sum(), x)
    rows, weight_of_it, above_it = between_guards(guarded, given)
    output, found = c.rms_norm(rows, weight_of_it, 1e-5, gemma)
    back = c.rms_norm_backward(above_it, rows, weight_of_it, found, gemma)
    assert inside_guards([output, found, back])
    assert (found - inverse).abs().max() < 1e-6 * inverse.abs().max()
    near(output, expected.detach(), relative=1.01 * 2 ** (-8 if gemma else -7), least=1e-6)  # Llama rounds twice
    near(
        back, of_x, relative=1.01 * 2**-8, least=1e-6 * float((above * (weight + gemma) * inverse).abs().max().detach())
    )


def definition(name, x):
    if name == "silu":
        return x * torch.sigmoid(x)
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))  # (1 + tanh(y)) / 2 = sigmoid(2 y)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (8, 32), (9, 33), (50, 200)])
def test_gated_activations_of_any_size_are_right_in_every_number(shape, name, c, guarded):
    given = [drawn(*shape, seed=seed) for seed in range(3)]
    given[0][:, ::3], given[0][:, 1::3] = given[0][:, ::3] * 100, given[0][:, 1::3] * 5  # far from zero, and not
    gate, up, above = (one.to(EXACT) for one in given)
    expected = definition(name, gate.requires_grad_()) * up.requires_grad_()
    of_gate, of_up = torch.autograd.grad((expected * above).sum(), (gate, up))
    gate, up, above = between_guards(guarded, given)
    output = c.gated(gate, up, name != "silu")
    back_of_gate, back_of_up = gated_backward(above, gate, up, name != "silu")
    assert inside_guards([output, back_of_gate, back_of_up])
    for mine, right in ((output, expected), (back_of_gate, of_gate), (back_of_up, of_up)):
        near(mine, right.detach(), relative=1.01 * 2**-8, least=1e-4)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("far", [-1e18, -1e4, -100, 100, 1e4])
def test_a_gate_however_far_from_zero_is_open_or_shut(far, tanh, c):
    gate, up, open_ = torch.full((3, 5), far, dtype=BF16), drawn(3, 5), float(far > 0)
    near(c.gated(gate, up, tanh), (gate * up).to(EXACT) * open_, relative=2**-7, least=1e-6)
    of_gate, of_up = gated_backward(torch.ones_like(gate), gate, up, tanh)
    near(of_gate, up.to(EXACT) * open_, relative=2**-7, least=1e-6)
    near(of_up, gate.to(EXACT) * open_, relative=2**-7, least=1e-6)


# linear maps


@pytest.mark.parametrize("rows", [8, 9, 63, 65, 130])
@pytest.mark.parametrize(
    ("inner", "columns"),
    [(1, 1), (2, 33), (31, 32), (64, 17), (64, 24), (50, 70), (96, 200), (40, 4100), (2730, 130), (9000, 40)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_products_are_right_in_every_number(rows, inner, columns, bias, products, guarded):
    """Weights in both layouts, as contiguous tensors and as transposed views, and an odd rank."""
    few = drawn(rows, 7, seed=1)
    several = [
        (drawn(rows, inner), drawn(columns, inner, seed=2), True),
        (few[:, 2:5], drawn(columns, 3, seed=3), True),
    ]
    several += [(drawn(rows, inner, seed=4), drawn(inner, columns, seed=5), False)]
    several += [(drawn(rows, 6, seed=6), drawn(6, columns, seed=7).T, True), (few[:, 1:3], drawn(columns, 2).T, False)]
    added = drawn(columns, seed=8) if bias else torch.zeros(columns, dtype=BF16)
    exact = [(x.to(EXACT), (weight.T if turned else weight).to(EXACT)) for x, weight, turned in several]
    right = sum((x @ weight for x, weight in exact), added.to(EXACT))
    size = sum((x.abs() @ weight.abs() for x, weight in exact), added.to(EXACT).abs())
    inside = [(*between_guards(guarded, [x, weight.contiguous()]), turned) for x, weight, turned in several]
    for given in (several, inside):
        output = linear(given, added if bias else None)
        assert output.shape == right.shape and output.dtype == BF16
        assert ((output.to(EXACT) - right).abs() <= 1.01 * 2**-8 * right.abs() + 1e-6 * size).all()
    assert inside_guards([output])


def test_sums_of_several_passes_stay_inside_their_memory(products):
    """One thread, 6 panels of columns and two passes: most rows of a task that tiles keep sums of."""
    x, weight, threads = drawn(2730, 2750), drawn(180, 2750, seed=1), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        output = linear([(x, weight, True)])
    finally:
        torch.set_num_threads(threads)
    expected = x.to(EXACT) @ weight.to(EXACT).T
    size = x.to(EXACT).abs() @ weight.to(EXACT).abs().T
    assert ((output.to(EXACT) - expected).abs() <= 1.01 * 2**-8 * expected.abs() + 1e-6 * size).all()


def test_neighbours_do_not_change_the_bits_of_a_row_of_a_product(products):
    x, weight = drawn(300, 96), drawn(200, 96, seed=1)
    whole = linear([(x, weight, True)])
    for begin, end in ((0, 32), (3, 40), (100, 229), (260, 300)):  # fewer rows are no tile
        assert torch.equal(linear([(x[begin:end], weight, True)]), whole[begin:end])


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 127, 128, 129, 300])
@pytest.mark.parametrize(
    ("few", "columns"), [(1, 1), (7, 33), (8, 31), (16, 200), (48, 128), (33, 257), (130, 140), (300, 5)]
)
def test_products_over_rows_are_right_in_every_number(rows, few, columns, products, guarded):
    left, right = drawn(rows, few), drawn(rows, columns, seed=1)
    expected, size = left.to(EXACT).T @ right.to(EXACT), left.to(EXACT).abs().T @ right.to(EXACT).abs()
    wider = torch.full((rows, few + columns + 5), torch.nan, dtype=BF16)
    wider[:, 3 : 3 + few], wider[:, 5 + few :] = left, right
    for given in ([left, right], between_guards(guarded, [left, right]), [wider[:, 3 : 3 + few], wider[:, 5 + few :]]):
        output = products.weight_gradient(*given)
        assert output.shape == expected.shape and output.dtype == torch.float32
        assert ((output - expected).abs() <= 1e-6 * size).all()
    assert inside_guards([output])


@pytest.mark.parametrize("heads", [1, 3, 7])
@pytest.mark.parametrize("width", [2, 6, 24, 34, 64, 80, 130])
def test_rotary_positions_of_any_number_of_heads_are_right_in_every_number(heads, width, c, guarded):
    given = [drawn(9, heads, width, seed=1), drawn(9, width, seed=2), drawn(9, width, seed=3)]
    x, cos, sin = (one.to(EXACT) for one in given)
    half = width // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    right = x * cos[:, None] + turned * sin[:, None]
    output = c.rotate(*between_guards(guarded, given))
    assert inside_guards([output])
    near(output, right, relative=1.01 * 2**-8, least=1e-5)


# threads


def everything():
    """Return what every operator returns for some inputs."""
    lengths, x, above = (130, 1, 65, 33), drawn(229, 200), drawn(229, 200, seed=1)
    output, inverse = ops.rms_norm(x, x[0], 1e-5, False)
    made = [output, inverse, ops.rms_norm_backward(above, x, x[0], inverse, False), ops.gated(x, above, True)]
    made += [*gated_backward(above.clone(), x, x, False), ops.rotate(x.view(229, 5, 40), x[:, :40], above[:, :40])]
    made += [linear([(x, drawn(1000, 200, seed=2), True), (above, drawn(200, 1000, seed=3), False)])]
    made += [ops.weight_gradient(x, above), ops.weight_gradient(drawn(1000, 16), drawn(1000, 1000, seed=1))]
    made += [linear([(drawn(900, 200), drawn(200, 80, seed=4), False)])]  # rows are split
    long = (500, 300, 400)  # or one thread is done before another begins
    return (
        made + attended(parts(lengths, 4, 2, 24), lengths, 0.3, 33) + attended(parts(long, 8, 4, 80), long, 0.1, None)
    )


@pytest.mark.parametrize("width", [1, 15, 16, 50, 8001])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_log_probabilities_of_labels_and_their_gradient_are_right_in_every_number(width, size, c, guarded):
    logits, labels = drawn(9, width) * size, torch.arange(9) * 7 % width
    exact = logits.to(EXACT)
    expected, gradient = exact.log_softmax(1).gather(1, labels[:, None]), exact.softmax(1)
    gradient[range(9), labels] = torch.expm1(expected[:, 0])
    ours, given = between_guards(guarded, [logits, labels])
    chosen = c.label_log_probs(ours, given, False)
    assert torch.equal(ours, logits) and inside_guards([chosen, ours])
    assert ((chosen - expected).abs() <= 1e-6 * (1 + exact.abs().max())).all()
    assert torch.equal(c.label_log_probs(ours, given, True), chosen)
    assert ((ours - gradient).abs() <= 2**-8 * gradient.abs() + 1e-30).all()


def test_a_nan_logit_gives_a_nan_log_probability(c):
    for place in range(40):
        logits = drawn(1, 40)
        logits[0, place] = torch.nan
        assert c.label_log_probs(logits, torch.tensor([3]), True).isnan().all() and logits.isnan().any()


def test_a_label_that_does_not_exist_gives_nan_and_leaves_its_row_unchanged(c):
    logits, labels = drawn(4, 40), torch.tensor([[3, 0], [-100, 0], [40, 0], [39, 0]])[:, 0]  # with gaps
    ours = logits.clone()
    assert c.label_log_probs(ours, labels, True).isnan().flatten().tolist() == [False, True, True, False]
    assert torch.equal(ours[1:3], logits[1:3]) and not torch.equal(ours[3], logits[3])


def test_products_of_few_rows_or_of_another_precision_are_left_to_torch(c, monkeypatch):
    backend, ours, x, weight, bias = Cpu(), drawn(32, 5), drawn(32, 6), drawn(5, 6), drawn(5)
    monkeypatch.setattr(ops, "linear", lambda *_: ours)
    assert backend.linear([(x, weight, True)], bias) is ours
    monkeypatch.setattr(ops, "weight_gradient", lambda *_: ours[:6, :5])
    assert backend.weight_gradient(x, ours).dtype == BF16  # the kernel's is fp32
    few = x[:31]
    assert torch.equal(backend.linear([(few, weight, True)], bias), torch.nn.functional.linear(few, weight, bias))
    assert torch.equal(backend.weight_gradient(few, few), (few.T @ few).float())
    for given in ([(x, weight.float(), True)], None), ([(x, weight, True)], bias.float()):
        with pytest.raises(RuntimeError, match="dtype"):
            backend.linear(*given)


def test_the_two_instructions_sum_in_another_order_and_each_is_named(c, monkeypatch):
    library = build.library()
    if not library.in_tiles:
        pytest.skip("this CPU has no AMX")
    left, right, found = drawn(300, 16), drawn(300, 200, seed=1), []
    assert Cpu().identity()["products"] == "amx"
    for wanted in (False, True):
        assert library.kernels.use_tiles(wanted) == wanted
        found.append(c.weight_gradient(left, right))
    assert not torch.equal(*found) and torch.allclose(*found, rtol=1e-4, atol=1e-4)


# wrong arguments


def arguments():
    """Return valid arguments of each operator."""
    x, spans = drawn(9, 6), torch.tensor([[0, 4, 4, 4], [4, 9, 6, 7]]).int()
    heads, keys, lse = drawn(9, 4, 6), drawn(9, 2, 6), torch.zeros(4, 9)
    attention = {"query": heads, "key": keys, "value": keys, "spans": spans, "scale": 0.3, "window": None}
    return {
        "linear": {
            "x": [x, drawn(9, 4)], "weight": [drawn(5, 6), drawn(4, 5)], "transposed": [True, False], "bias": x[0, :5]
        },
        "weight_gradient": {"left": x, "right": drawn(9, 4)},
        "rms_norm": {"rows": x, "weight": drawn(6), "epsilon": 1e-5, "gemma": False},
        "rms_norm_backward": {
            "grad_output": x, "rows": x, "weight": drawn(6), "inverse_rms": torch.ones(9, 1), "gemma": False
        },
        "gated": {"gate": x, "up": drawn(9, 6), "tanh": False},
        "gated_backward": {"grad_product": drawn(9, 6, seed=1), "gate": x, "up": drawn(9, 6), "tanh": True},
        "label_log_probs": {"logits": drawn(9, 6), "labels": torch.zeros(9, dtype=torch.int64), "to_gradient": True},
        "rotate": {"x": heads, "cos": x, "sin": x},
        "attention": attention,
        "attention_backward": {"grad_output": heads, "output": heads, "logsumexp": lse, **attention},
    }  # fmt: skip


COPIED = {
    "grad_output",
    "labels",
    "x",
    "cos",
    "sin",
    "left",
    "right",
    "weight",
    "bias",
}  # where they are not contiguous


ANY_SIZE = {("rms_norm", "rows", "rows"), ("label_log_probs", "logits", "columns")}
ANY_SIZE |= {("weight_gradient", side, "columns") for side in ("left", "right")}


@pytest.mark.parametrize("name", arguments())
def test_an_operator_refuses_every_tensor_of_another_dtype_or_shape_and_names_it(name, c):
    """A kernel would read what lies beside a tensor that is smaller than the kernel believes."""
    operator, given = getattr(torch.ops.lora_kit, name), arguments()[name]
    operator(**given)
    for argument, right in given.items():
        if not torch.is_tensor(right):
            continue
        with pytest.raises(TypeError, match=rf"^{name}: .*{'tensors' if name == 'linear' else argument}"):
            operator(**given | {argument: right.to(torch.float64)})
        for cut, wrong in {"rows": right[:-1], "dimensions": right[None], "columns": right[..., :-1]}.items():
            if (name, argument, cut) not in ANY_SIZE:
                with pytest.raises(ValueError, match=rf"^{name}: "):
                    operator(**given | {argument: wrong.contiguous()})
        with_gaps = torch.cat([right, right], dim=-1)[..., ::2]
        if argument not in COPIED and not with_gaps.is_contiguous():
            with pytest.raises(ValueError, match=rf"^{name}: {argument} has shape .* strides .*; expected contiguous"):
                operator(**given | {argument: with_gaps})


@pytest.mark.parametrize("wrong", ["rows", "inner", "columns", "dtype", "bias", "few", "nothing", "dimensions"])
def test_what_is_no_sum_of_products_is_refused(wrong, c):
    x, weight, other, bias = drawn(9, 6), drawn(5, 6), drawn(9, 4), drawn(5)
    given = {
        "rows": [(x, weight, True), (other[:8], drawn(5, 4), True)],
        "inner": [(x, weight[:, :4], True)],
        "columns": [(x, weight, True), (other, drawn(4, 4), False)],
        "dtype": [(x, weight.float(), True)],
        "few": [(x[:7], weight, True)],
        "nothing": [(x[:, :0], weight[:, :0], True)],
        "dimensions": [(x[None], weight, True)],
    }
    with pytest.raises((TypeError, ValueError), match=r"^linear: "):
        linear(given.get(wrong, [(x, weight, True)]), bias[:4] if wrong == "bias" else None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spans": torch.tensor([[0, 10, 10, 10]]).int()}, "expected examples in order that fill 9 rows"),
        ({"spans": torch.tensor([[-1, 4, 4, 4]]).int()}, "expected examples in order that fill 9 rows"),
        ({"spans": torch.tensor([[0, 9, 5, 4]]).int()}, "expected examples in order that fill 9 rows"),
        ({"spans": torch.tensor([[0, 5, 5, 5], [4, 9, 9, 9]]).int()}, "expected examples in order that fill 9 rows"),
        ({"spans": torch.zeros(0, 4).int()}, "expected examples in order that fill 9 rows"),
        ({"window": 0}, "window is 0; expected None or at least 1"),
        ({"query": drawn(9, 3, 6)}, "3 heads cannot share 2 key heads evenly"),
    ],
)
def test_attention_outside_its_tensors_is_refused(change, said, c):
    with pytest.raises(ValueError, match=f"^attention: .*{said}"):
        ops.attention(**arguments()["attention"] | change)


# operators of torch


@pytest.mark.parametrize("name", arguments())
def test_operators_have_the_shapes_that_torch_believes(name, c):
    """FakeTensor and torch.compile see what an operator returns and which arguments it writes to."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.lora_kit, name), (), arguments()[name], test_utils=checks)


def test_a_profiler_shows_the_operators_by_name(c):
    with torch.profiler.profile() as profile:
        ops.gated(drawn(9, 6), drawn(9, 6), False)
    assert "lora_kit::gated" in {event.name for event in profile.events()}


# threads


def test_a_replay_by_any_number_of_threads_has_the_same_bits(products):
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            made.append(everything())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for again in made[1:] for a, b in zip(made[0], again, strict=True))


def test_buffers_are_used_again_when_no_tensor_refers_to_them(c):
    pool = BufferPool()
    first = pool.empty(100, 3, 8)
    assert first.shape == (100, 3, 8) and first.dtype == BF16 and first.data_ptr() % 4096 == 0
    address, view = first.data_ptr(), first[2:, 1].fill_(7)
    del first
    second = pool.empty(2048, 24)
    assert second.data_ptr() != address and (view == 7).all()
    del view
    third = pool.empty(50, 24)  # of another length, and the same width
    assert third.data_ptr() == address
    pool.release()
    del third
    assert pool.empty(50, 24).data_ptr() not in (address, second.data_ptr())


def test_buffers_grow_with_the_longest_micro_batch(c):
    pool = BufferPool()
    short, long = pool.empty(2048, 8).fill_(1), pool.empty(5000, 8).fill_(2)
    again = pool.empty(2049, 8).fill_(3)
    assert (short == 1).all() and (long == 2).all() and (again == 3).all() and len(long) == 5000
    assert pool.workspace(100).shape == (100,) and pool.empty(0, 8).shape == (0, 8)
