"""Loss, rewards and gradients of the preference objectives are those that TRL computes on the same batch."""

from types import SimpleNamespace

import pytest
import torch
from plain_loop import relative
from preferences import ADAPTER, LIMIT, outcome, random_tokens, tuned, with_reference

from lora_kit.recipe.schema import DpoObjective, KtoObjective, OrpoObjective, SimpoObjective
from lora_kit.training.objectives.kto import Kto
from lora_kit.training.objectives.log_probs import mismatched
from lora_kit.training.objectives.pairs import PairObjective
from lora_kit.training.objectives.preference_losses import Pairs, dpo, orpo, simpo

pytest.importorskip("trl", reason="`pip install 'lora_kit[dev]'` installs TRL")

DPO = {
    "sigmoid": (["sigmoid"], [1.0], {}),
    "hinge": (["hinge"], [1.0], {"loss": "hinge"}),
    "ipo": (["ipo"], [1.0], {"loss": "ipo"}),
    "length normalised": (["sigmoid_norm"], [1.0], {"length_normalised": True}),
    "with sft": (["sigmoid", "sft"], [1.0, 0.7], {"sft_weight": 0.7}),
}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture(scope="module")
def ours(base_folder):
    return tuned(base_folder, micro_batch_tokens=60)


def trainer_of(kind, base_folder, folder, weights, record, **options):
    """Return a trainer of TRL with our adapter's weights, computing on the CPU in fp32."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = getattr(trl, f"{kind}Config")(
        str(folder), report_to=[], use_cpu=True, bf16=False, max_length=None, gradient_checkpointing=False, **options
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list([record] * 2),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        peft_config=config,
    )
    trained = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for matrix in ("lora_A", "lora_B") for name, parameter in trained if matrix in name]
    torch.nn.utils.vector_to_parameters(weights, parameters)
    return trainer, parameters


@pytest.fixture(scope="module")
def dpo_trainer(base_folder, ours, tmp_path_factory):
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    return trainer_of("DPO", base_folder, tmp_path_factory.mktemp("dpo"), ours[1].weights, record, beta=0.3)


def split(side):
    ids, trained = side
    return ids[~trained].tolist(), ids[trained].tolist()


@pytest.mark.parametrize("name", DPO)
def test_dpo(name, dpo_trainer, ours):
    trainer, parameters = dpo_trainer
    types, weights, settings = DPO[name]
    tokens = random_tokens(1 if name == "with sft" else 7)  # TRL's term is a mean over all tokens of a batch
    sides = [[split(side) for side in tokens.sides(index)] for index in range(len(tokens))]
    rows = [{"prompt_ids": good[0], "chosen_ids": good[1], "rejected_ids": bad[1]} for good, bad in sides]
    trainer.loss_types, trainer.loss_weights = types, weights
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    expected = trainer._compute_loss(trainer.model.train(), trainer.data_collator(rows), False)
    expected.backward()
    objective = PairObjective(DpoObjective(kind="dpo", beta=0.3, **settings))
    loss, figures, gradient = outcome(objective, with_reference(tokens, ours[0], 2), *ours)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient, torch.cat([parameter.grad.reshape(-1) for parameter in parameters])) < 1e-5
    for metric in REWARDS:
        assert figures[metric] == pytest.approx(trainer._metrics["train"][metric][0], rel=1e-4, abs=1e-5), metric


def test_kto(base_folder, ours, tmp_path):
    record = {"prompt": "a", "completion": "b", "label": True}
    trainer, parameters = trainer_of(
        "KTO", base_folder, tmp_path, ours[1].weights, record,
        beta=0.2, desirable_weight=1.3, undesirable_weight=0.6, train_sampling_strategy="sequential",
    )  # fmt: skip
    tokens = random_tokens(9, unpaired=True, seed=5)
    others, rows = mismatched(tokens, range(9), LIMIT), []
    for index in range(9):
        (prompt, answer), (_, other) = split(tokens.sides(index)[0]), split(others.example(index))
        label = bool(tokens.chosen[index])
        rows.append({"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label})
    expected = trainer._compute_loss(trainer.model.train(), trainer.data_collator(rows), False)
    expected.backward()
    settings = KtoObjective(kind="kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.6)
    loss, figures, gradient = outcome(Kto(settings, LIMIT), with_reference(tokens, ours[0], 3), *ours)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradient, torch.cat([parameter.grad.reshape(-1) for parameter in parameters])) < 1e-5
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert figures[metric] == pytest.approx(trainer._metrics["train"][metric][0], rel=1e-4), metric


@pytest.fixture
def pairs():
    rng = torch.Generator().manual_seed(0)
    sums = -20 * torch.rand(4, 6, generator=rng)
    tokens = torch.randint(1, 9, (2, 6), generator=rng).float()
    return Pairs(sums[0], sums[1], *tokens, sums[2], sums[3])


def function_of(name, **settings):
    """Return a function of TRL's ORPO or CPO trainer that needs nothing but some settings."""
    from trl.experimental import cpo as cpo_folder
    from trl.experimental import orpo as orpo_folder

    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu")}
    owner = {"odds_ratio_loss": orpo_folder.ORPOTrainer, "cpo_loss": cpo_folder.CPOTrainer}[name]
    return lambda *log_probs: getattr(owner, name)(SimpleNamespace(**defaults | settings), *log_probs)


def test_orpo_adds_the_odds_ratio_of_trl_to_the_cross_entropy_of_the_answer(pairs):
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    weighted, chosen, rejected, *_ = function_of("odds_ratio_loss", beta=0.4)(*means)
    ours = orpo(pairs, OrpoObjective(kind="orpo", beta=0.4))
    torch.testing.assert_close(ours.losses, -means[0] - weighted)
    torch.testing.assert_close((ours.chosen_rewards, ours.rejected_rewards), (chosen, rejected))


def test_simpo(pairs):
    means = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    expected = function_of("cpo_loss", beta=2.5, simpo_gamma=0.6, loss_type="simpo")(*means)
    torch.testing.assert_close(tuple(simpo(pairs, SimpoObjective(kind="simpo", beta=2.5, gamma=0.6))), expected)


def test_label_smoothing_is_that_of_cpo_applied_to_log_ratios(pairs):
    ratios = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    expected = function_of("cpo_loss", beta=0.3, label_smoothing=0.2, loss_type="sigmoid")(*ratios)
    torch.testing.assert_close(tuple(dpo(pairs, DpoObjective(kind="dpo", beta=0.3, label_smoothing=0.2))), expected)
