"""Tests of the recipes, the walkthrough and the arithmetic of docs/evidence.md. Some need trl, verl or nbclient."""

import copy
import inspect
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
TINY = str(ROOT / "data" / "tiny")


def batch(seed=0, rows=4, tokens=6):
    """Random logp, old_logp, teacher_logp, per-token advantages and a ragged mask, all [B, T]."""
    g = torch.Generator().manual_seed(seed)
    logp, old_logp, teacher_logp = (-torch.rand(rows, tokens, generator=g) * 3 for _ in range(3))
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=g)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, tokens)
    return logp.requires_grad_(), old_logp, teacher_logp, advantages, (torch.arange(tokens) < lengths).long()


def actor(**changes):
    """What verl's losses read of its ActorConfig."""
    values = dict(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0, global_batch_info={})
    config = SimpleNamespace(**values | changes)
    config.get = lambda name, default=None: getattr(config, name, default)
    return config


@pytest.mark.slow
def test_steps_of_trl_have_our_loss_on_the_same_tokens(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig
    from recipes.trl_sdar import SDARTrainer

    seen = []  # (weights, inputs, loss) of each micro-batch

    class Watched(SDARTrainer):
        def _compute_loss(self, model, inputs):
            seen.append([copy.deepcopy(self.model.state_dict()), inputs, super()._compute_loss(model, inputs)])
            return seen[-1][2]

    ask = lambda goal, skills: [{"role": "user", "content": envs.PROMPTS["webshop"](goal, (), "[Search]", (), skills)}]
    rows = [{"prompt": ask(goal, ""), "teacher_prompt": ask(goal, "1. Search for the product's name.")}
            for goal in ("Find me a red wool hat", "Find me a steel kettle, price lower than 40 dollars")]
    args = GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, gradient_accumulation_steps=2,
                      max_completion_length=48, max_steps=2, learning_rate=2e-4, beta=0.01, delta=3.0, use_cpu=True,
                      bf16=False, report_to=[], save_strategy="no", seed=1)
    reward = lambda completions, **_: [float(len(str(c)) % 3) for c in completions]
    Watched(TINY, reward, args=args, train_dataset=Dataset.from_list(rows), sdar_coef=0.5).train()
    ref, model = (AutoModelForCausalLM.from_pretrained(TINY).eval() for _ in range(2))
    for step in (seen[:2], seen[2:]):
        counts = [inputs["completion_mask"].sum() for _, inputs, _ in step]
        model.load_state_dict(step[0][0])
        ours = sum(eq5(model, ref, inputs, sum(counts), sdar_coef=0.5) for _, inputs, _ in step)
        assert counts[0] != counts[1]  # or else a mean of means would do
        assert abs(ours - sum(loss for *_, loss in step)) < 1e-5


def eq5(model, ref, inputs, num_tokens, sdar_coef):
    """Eq. (5) of a micro-batch of TRL's by this repository's losses and the models' own logits."""
    def score(model, prompts, seen):
        lists = [own_logp(model, prompt[s > 0].tolist(), ids[m > 0].tolist())
                 for prompt, s, ids, m in zip(prompts, seen, inputs["completion_ids"][:, :width], mask)]
        return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)

    width = inputs["completion_mask"].sum(1).max()
    mask = inputs["completion_mask"][:, :width]
    logp, ref_logp = (score(m, inputs["prompt_ids"], inputs["prompt_mask"]) for m in (model, ref))
    teacher_logp = score(model, inputs["teacher_ids"], inputs["teacher_mask"])
    pg, _ = sdar.policy_loss(logp, logp, inputs["advantages"], mask, num_tokens=num_tokens)
    distill, _ = sdar.sdar_loss(logp, teacher_logp, mask, num_tokens=num_tokens)
    return pg + 0.01 * sdar.kl_loss(logp, ref_logp, mask, num_tokens=num_tokens) + sdar_coef * distill


def test_verls_policy_loss_is_our_sum_and_micro_batches_add_up():
    assert list(inspect.signature(sdar_policy_loss).parameters)[:7] == [
        "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]
    parts = [batch(seed) for seed in (1, 2)]
    num_tokens = sum(mask.sum() for *_, mask in parts)
    config, expected, found = actor(global_batch_info={"batch_num_tokens": num_tokens, "dp_size": 2}), 0, 0
    for logp, old_logp, teacher_logp, advantages, mask in parts:
        expected += sdar.policy_loss(logp, old_logp, advantages, mask, num_tokens=num_tokens)[0]
        expected += 0.3 * sdar.sdar_loss(logp, teacher_logp, mask, beta=2.0, num_tokens=num_tokens)[0]
        loss, metrics = sdar_policy_loss(old_logp, logp, advantages, mask.bool(), config=config, sdar_coef=0.3,
                                         teacher_log_prob=teacher_logp, gate_beta=2.0)
        found += loss / 2  # verl's ranks are averaged
        gap = (teacher_logp - logp)[mask > 0].mean()
        assert loss.shape == () and abs(metrics["sdar/gap"] - gap) < 1e-6 and type(metrics["sdar/gap"]) is float
    assert abs(found - expected) < 1e-6
    for wrong, bad in [(actor(clip_ratio_high=0.3), "token-mean"), (actor(), "seq-mean-token-sum")]:
        with pytest.raises(ValueError, match="SDAR"):
            sdar_policy_loss(old_logp, logp, advantages, mask, bad, wrong, teacher_log_prob=teacher_logp)


def test_verls_own_losses_give_the_same():
    verl = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
    for seed in range(5):
        logp, old_logp, teacher_logp, advantages, mask = batch(seed)
        weights, info = teacher_logp.exp(), {"dp_size": 2, "batch_num_tokens": 40}
        config = actor(clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info=info)
        inputs = old_logp, logp, advantages, mask.bool(), "token-mean", config, weights
        gap = teacher_logp - logp
        distill = verl.agg_loss(torch.sigmoid(5 * gap).detach() * gap, mask.bool(), "token-mean", **info)
        expected = verl.compute_policy_loss_vanilla(*inputs)[0] + 0.3 * distill
        assert abs(sdar_policy_loss(*inputs, teacher_log_prob=teacher_logp, sdar_coef=0.3)[0] - expected) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_ms_swifts_formula_has_our_value_and_gradient(seed):
    """ms-swift PR 9768, sdar_gate_beta 5: the token mean of sigmoid(beta (logp_T - logp)) (logp_T - logp), gate detached."""
    logp, _, teacher_logp, _, mask = batch(seed)
    ours, _ = sdar.sdar_loss(logp, teacher_logp, mask)
    gate = 1 / (1 + torch.exp(-5.0 * (teacher_logp - logp.detach())))
    theirs = (gate * (teacher_logp - logp))[mask > 0].mean()
    grads = [torch.autograd.grad(loss, logp)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*grads)
    assert grads[0][mask > 0].abs().min() > 0


def test_printed_bamboogle_values_have_the_form_of_an_unpooled_last_question():
    assert [bamboogle.right_answers(x) for x in (66.1, 12.5, 0.0, 100.0, 26.4, 37.6)] == [
        (40, 1), (31, 0), (0, 0), (124, 1), None, None]
    logs = 64.9194, 69.7581, 65.7258, 70.5645  # of others' runs, to six digits of a fraction
    assert [bamboogle.right_answers(x, digits=4) for x in logs] == [(37, 1), (49, 1), (39, 1), (51, 1)]
    table = bamboogle.read_table()
    printed = [row[-1] for rows in table.values() for row in rows.values()]
    assert len(printed) == 30 and sum(bamboogle.right_answers(x) is not None for x in printed) == 28


def test_pooled_bamboogle_shrinks_the_gains_in_search():
    gains = {}
    for model, rows in bamboogle.read_table().items():
        average = lambda name: sum(rows[name][:-1] + [bamboogle.pooled(rows[name][-1])]) / 7
        gains[model] = round(average("SDAR") - average("GRPO"), 1)
    assert gains == {"Qwen2.5-3B": 2.2, "Qwen2.5-7B": 3.2, "Qwen3-1.7B": 1.0}
