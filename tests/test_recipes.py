"""Tests of the recipes, the walkthrough and the arithmetic of docs/evidence.md. Two need trl, nbclient, ipykernel."""

import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import envs
import sdar
from conftest import own_logp
from recipes.verl_sdar import sdar_policy_loss
from tools import bamboogle

ROOT = Path(__file__).resolve().parent.parent


def batch(seed, rows=4, tokens=6):
    """Random logp, old_logp, teacher_logp, advantages, alike along a row, and a ragged mask, all [B, T]."""
    g = torch.Generator().manual_seed(seed)
    logp, old_logp, teacher_logp = (-torch.rand(rows, tokens, generator=g) * 3 for _ in range(3))
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=g)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, tokens)
    return logp.requires_grad_(), old_logp, teacher_logp, advantages, torch.arange(tokens) < lengths


@pytest.mark.slow
def test_steps_of_trl_have_our_loss_on_the_same_tokens(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig
    from recipes.trl_sdar import SDARTrainer

    class Watched(SDARTrainer):
        def _compute_loss(self, model, inputs):
            seen.append([copy.deepcopy(self.model.state_dict()), inputs, super()._compute_loss(model, inputs)])
            return seen[-1][2]

    seen = []  # weights, inputs and loss of each micro-batch
    ask = lambda skills: [{"role": "user", "content": envs.PROMPTS["webshop"]("a red hat", (), "[Search]", (), skills)}]
    rows = Dataset.from_list([{"prompt": ask(""), "teacher_prompt": ask("1. Search for the product's name.")}] * 2)
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=2,
                      max_completion_length=48, max_steps=2, learning_rate=2e-4, beta=0.01, delta=3.0, use_cpu=True,
                      bf16=False, report_to=[], save_strategy="no", seed=1)
    reward = lambda completions, **_: [len(str(text)) % 3 for text in completions]
    Watched(str(ROOT / "data" / "tiny"), reward, args=args, train_dataset=rows, sdar_coef=0.5).train()
    ref, model = (sdar.models.read_model("tiny")[0].eval() for _ in range(2))
    for step in (seen[:2], seen[2:]):
        tokens = [inputs["completion_mask"].sum() for _, inputs, _ in step]
        model.load_state_dict(step[0][0])
        ours = sum(eq5(model, ref, inputs, sum(tokens)) for _, inputs, _ in step)
        assert tokens[0] != tokens[1] and abs(ours - sum(loss for *_, loss in step)) < 1e-5


def eq5(model, ref, inputs, num_tokens):
    """A micro-batch of TRL's by this repository's losses and the models' own logits, token after token."""
    unpadded = lambda name: [ids[m > 0].tolist() for ids, m in zip(inputs[f"{name}_ids"], inputs[f"{name}_mask"])]
    responses = unpadded("completion")
    score = lambda model, name: torch.cat([own_logp(model, *pair) for pair in zip(unpadded(name), responses)])
    logp, ref_logp, teacher_logp = score(model, "prompt"), score(ref, "prompt"), score(model, "teacher")
    advantages, mask = inputs["advantages"].repeat_interleave(inputs["completion_mask"].sum(1)), torch.ones_like(logp)
    return (sdar.policy_loss(logp, logp, advantages, mask, num_tokens=num_tokens)[0] +
            0.01 * sdar.kl_loss(logp, ref_logp, mask, num_tokens=num_tokens) +
            0.5 * sdar.sdar_loss(logp, teacher_logp, mask, num_tokens=num_tokens)[0])


def test_verls_policy_loss_is_our_sum_and_micro_batches_add_up():
    parts, expected, found = [batch(1), batch(2)], 0, 0
    num_tokens = sum(mask.sum() for *_, mask in parts)
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, get=lambda name, default: default,
                             global_batch_info={"batch_num_tokens": num_tokens, "dp_size": 2})
    for logp, old_logp, teacher_logp, advantages, mask in parts:
        expected += sdar.policy_loss(logp, old_logp, advantages, mask, num_tokens=num_tokens)[0]
        expected += 0.3 * sdar.sdar_loss(logp, teacher_logp, mask, beta=2.0, num_tokens=num_tokens)[0]
        loss, metrics = sdar_policy_loss(
            old_log_prob=old_logp, log_prob=logp, advantages=advantages, response_mask=mask, loss_agg_mode="token-mean",
            config=config, rollout_is_weights=None, teacher_log_prob=teacher_logp, sdar_coef=0.3, gate_beta=2.0)
        found += loss / 2  # verl averages over ranks, here two
        assert loss.shape == () and metrics["sdar/gap"] == pytest.approx((teacher_logp - logp)[mask].mean().item())
    assert abs(found - expected) < 1e-6
    for wrong in ("token-sum", config), ("token-mean", SimpleNamespace(**vars(config) | {"clip_ratio_high": 0.3})):
        with pytest.raises(ValueError, match="SDAR"):
            sdar_policy_loss(old_logp, logp, advantages, mask, *wrong, teacher_log_prob=teacher_logp)


@pytest.mark.parametrize("seed", range(5))
def test_ms_swifts_formula_has_our_value_and_gradient(seed):
    """ms-swift PR 9768: token mean of sigmoid(beta (logp_T - logp)) (logp_T - logp), beta 5, gate detached."""
    logp, _, teacher_logp, _, mask = batch(seed)
    gate = 1 / (1 + torch.exp(-5.0 * (teacher_logp - logp.detach())))
    losses = sdar.sdar_loss(logp, teacher_logp, mask)[0], (gate * (teacher_logp - logp))[mask].mean()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logp)[0] for loss in losses))


def test_bamboogle_values_have_the_form_of_an_unpooled_last_question_and_pooling_shrinks_the_gains():
    assert [bamboogle.right_answers(x) for x in (66.1, 12.5, 100.0, 26.4)] == [(40, 1), (31, 0), (124, 1), None]
    table, average = bamboogle.read_table(), lambda row: sum(row[:-1] + [bamboogle.pooled(row[-1])]) / 7
    assert [round(average(rows["SDAR"]) - average(rows["GRPO"]), 1) for rows in table.values()] == [2.2, 3.2, 1.0]
    assert sum(bamboogle.right_answers(row[-1]) is None for rows in table.values() for row in rows.values()) == 2


def test_evidences_numbers_of_seeds_follow_its_formula():
    lines = [line.split("|") for line in (ROOT / "docs" / "evidence.md").read_text().splitlines()]
    table = [map(float, (*cells[2:6], cells[6].split()[0])) for cells in lines if len(cells) == 8 and "+" in cells[6]]
    for gain, seed_sd, p, tasks, n in table:
        assert n == math.ceil(2 * 2.8 ** 2 * (seed_sd ** 2 + 1e4 * p * (1 - p) / tasks) / gain ** 2)
    assert len(table) == 6


WALKTHROUGH = ROOT / "docs" / "walkthrough.ipynb"


def test_the_walkthrough_has_its_outputs_under_todays_settings_and_names_no_machine():
    text, cfg = WALKTHROUGH.read_text(), sdar.make_config({"tasks": 2, "group_size": 4})
    assert text.count('"cell_type"') <= 40 and text.count("image/png") >= 4
    assert f"learning rate {sdar.learning_rate(cfg, 1):.2e}" in text
    assert not re.search("/(home|root|tmp|Users|work)/|Traceback", text)


@pytest.mark.slow
def test_the_walkthrough_runs():
    text = WALKTHROUGH.read_text()
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    nbclient.NotebookClient(nbformat.reads(text, 4), timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
