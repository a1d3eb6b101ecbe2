"""The optimizer is torch's AdamW on one buffer, and the learning rate is a function of the examples seen."""

import pytest
import torch

from lora_kit.model.state import Kind
from lora_kit.recipe.schema import Optim
from lora_kit.training import optim

ALL = {Kind.A: slice(600), Kind.B: slice(600, None)}


def settings(**changes):
    return Optim(**{"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0} | changes)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.quick
def test_twenty_updates_equal_those_of_torch(weight_decay):
    torch.manual_seed(0)
    weights = torch.randn(1000)
    reference = torch.nn.Parameter(weights.clone())
    theirs = torch.optim.AdamW([reference], lr=1e-2, betas=(0.8, 0.95), weight_decay=weight_decay)
    moments = (torch.zeros(1000), torch.zeros(1000))
    ours = settings(betas=(0.8, 0.95), weight_decay=weight_decay)
    for step in range(20):
        gradient = torch.randn(1000)
        optim.adamw(
            weights, gradient, moments, step=step, learning_rate=1e-2, optim=ours, taken=torch.tensor(True), ranges=ALL
        )
        reference.grad = gradient
        theirs.step()
    torch.testing.assert_close(weights, reference.data, rtol=1e-5, atol=1e-6)


def test_clipping_equals_that_of_torch():
    gradient = torch.randn(100) * 10
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    ours = torch.linalg.vector_norm(gradient)
    optim.clip(gradient, ours, 1.0)
    torch.testing.assert_close(ours, norm)
    torch.testing.assert_close(gradient, parameter.grad)


def test_a_small_gradient_is_left_alone():
    gradient = torch.full((4,), 0.1)
    optim.clip(gradient, torch.linalg.vector_norm(gradient), 1.0)
    assert gradient.tolist() == torch.full((4,), 0.1).tolist()


def test_the_rate_rises_through_warmup_and_then_falls_to_zero():
    cosine = settings(schedule="cosine", warmup=0.1)
    rates = [optim.learning_rate(cosine, examples, 1000) for examples in range(0, 1000, 10)]
    assert rates[0] > 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert optim.learning_rate(cosine, 100, 1000) == pytest.approx(1e-2)
    assert optim.learning_rate(cosine, 550, 1000) == pytest.approx(0.5e-2)
    assert optim.learning_rate(cosine, 1000, 1000) == pytest.approx(0)


def test_linear_and_constant_schedules():
    assert optim.learning_rate(settings(schedule="linear"), 250, 1000) == pytest.approx(0.75e-2)
    assert optim.learning_rate(settings(schedule="constant"), 999, 1000) == 1e-2


def test_a_whole_run_of_warmup_never_divides_by_zero():
    assert optim.learning_rate(settings(schedule="cosine", warmup=1.0), 1000, 1000) == pytest.approx(1e-2)


def test_warm_up_stable_decay_is_that_of_transformers():
    from transformers import get_wsd_schedule

    ours = settings(schedule="wsd", warmup=0.1, decay=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = get_wsd_schedule(optimizer, 100, 300, 1000, decay_type="linear")
    for examples in range(1000):
        rate = optim.learning_rate(ours, examples, 1000)
        assert rate == pytest.approx(theirs.get_last_lr()[0], abs=1e-4)  # ours starts above zero
        optimizer.step()
        theirs.step()


def test_a_decay_longer_than_what_follows_the_warm_up_never_exceeds_the_rate():
    rates = [optim.learning_rate(settings(schedule="wsd", warmup=0.5, decay=0.9), n, 100) for n in range(100)]
    assert max(rates) <= 1e-2 and rates[50:] == sorted(rates[50:], reverse=True)
