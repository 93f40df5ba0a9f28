"""Tests of the engine: continuous batching, the window of keys and values, bf16 copies, importance weights."""

import copy
import dataclasses
import math
import random
import threading
import types

import pytest
import torch

import sdar
from conftest import config, script
from lib import cache, engine, models
from lib.engine import TorchEngine


class Countdown(torch.nn.Module):
    """A causal LM whose next token is the last one minus 1: a prompt that ends with n has a response of n tokens, of
    which 0 ends it. It has no layers, and counts its calls."""

    def __init__(self):
        from transformers import LlamaConfig
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=0)
        self.decoded = []  # rows of each call that generates, without prefills

    def forward(self, input_ids, attention_mask, position_ids, logits_to_keep, use_cache, cache):
        if input_ids.shape[1] == 1:
            self.decoded.append(len(input_ids))
        assert (attention_mask.sum(1) == position_ids[:, -1] + 1).all()
        return types.SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids[:, -1:] - 1, 600).float().mul(99))


def lengths_of_episodes(seed):
    """128 episodes of 5 to 15 responses whose lengths are log-normal, with the mean 150, and at most 512."""
    rng = random.Random(seed)
    draw = lambda: min(512, max(1, round(rng.lognormvariate(math.log(150) - 0.32, 0.8))))
    return [[draw() for _ in range(rng.randint(5, 15))] for _ in range(128)]


def generate(episodes, places):
    """Plays the episodes with a Countdown -> (its calls that generate, tokens)."""
    model, tokens = Countdown(), 0
    policy = types.SimpleNamespace(fast=model, device=torch.device("cpu"), autocast=False, stop_ids={0})
    player = TorchEngine(policy, config(rollout_batch=places, max_response_tokens=512), 0)
    for number, lengths in enumerate(episodes):
        player.submit((number, 0), (1, 1, lengths[0]), None)
    while len(player):
        for (number, turn), response in player.step():
            assert len(response.ids) == episodes[number][turn] and response.stop == "end"
            tokens += len(response.ids)
            if turn + 1 < len(episodes[number]):
                player.submit((number, turn + 1), (1, 1, episodes[number][turn + 1]), None)
    return len(model.decoded), tokens


def test_places_are_filled_again_while_others_generate():
    episodes, places = lengths_of_episodes(seed=0), 32
    calls, tokens = generate(episodes, places)
    turns = [[lengths[turn] for lengths in episodes if turn < len(lengths)] for turn in range(15)]
    lockstep = sum(max(some[i:i + places]) for some in turns for i in range(0, len(some), places))
    assert tokens == sum(map(sum, episodes)) and lockstep > 3 * tokens / places
    assert calls <= 1.3 * tokens / places, (calls, tokens / places)


def families():
    from transformers import LlamaConfig, MistralConfig, Qwen3NextConfig
    small = dict(vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
                 num_key_value_heads=1, initializer_range=0.3)
    linear = dict(linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
                  head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
                  shared_expert_intermediate_size=8)
    return {"full attention": LlamaConfig(**small), "a sliding window": MistralConfig(**small, sliding_window=6),
            "a state beside keys and values": Qwen3NextConfig(**small | linear)}


@pytest.mark.parametrize("name", families())
def test_a_response_is_the_same_alone_and_among_others_that_come_and_go(name, policy, monkeypatch):
    from transformers import AutoModelForCausalLM
    monkeypatch.setattr(cache, "SPARE", 2)  # the window moves after every other token
    monkeypatch.setattr(engine, "PREFILL", 40)  # two or three prompts at once
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families()[name]).eval()
    some, rng = dataclasses.replace(policy, model=model, stop_ids=frozenset(range(0, 600, 9))), random.Random(1)
    prompts = [tuple(rng.choices(range(600), k=rng.randint(1, 20))) for _ in range(30)]
    noises = lambda: [random.Random(number) for number in range(30)]
    play = lambda places, some_prompts: sdar.sample(
        some, some_prompts, config(rollout_batch=places, max_response_tokens=12), 1.0, noises())
    alone, among = play(1, prompts), play(5, prompts)
    assert [r.ids for r in alone] == [r.ids for r in among] and len({len(r.ids) for r in alone}) > 5
    assert type(cache.make_cache(model)).__name__ == ("Grown" if "state" in name else "Window")
    for prompt, response, other in zip(prompts, alone, among):
        assert response.logp == pytest.approx(other.logp, abs=1e-3)
        logits = model(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1:-1].detach()
        own = logits.log_softmax(-1)[range(len(response.ids)), response.ids].tolist()
        assert response.logp == pytest.approx(own, abs=1e-3)


def test_a_search_that_takes_long_holds_up_its_own_episode_alone(policy, monkeypatch):
    cfg = config(env="search", max_turns=3, retriever="http://127.0.0.1:9", env_timeout=0.0)
    environments = [sdar.envs.make("search") for _ in range(4)]
    script(monkeypatch, lambda env: "<search>lamp</search>", plain=True)
    answered, steps = threading.Event(), []

    def step(number, own):
        def wait_and_step(action):
            if number == 0 and not steps.count(0):
                assert answered.wait(20), "the others did not go on"
            steps.append(number)
            if steps.count(3) == 3:
                answered.set()
            return own(action)
        return wait_and_step

    for number, env in enumerate(environments):
        monkeypatch.setattr(env, "step", step(number, env.step))
    episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg)
    assert [len(e.turns) for e in episodes] == [3] * 4 and steps[-3:] == [0] * 3


@pytest.mark.parametrize("tied", [True, False])
def test_the_bf16_copy_is_the_model_under_autocast_bit_for_bit_and_follows_it_when_told(tied, policy):
    from transformers import Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(type(policy.model.config)(**policy.model.config.to_dict() | {
        "tie_word_embeddings": tied})).eval()
    fast, ids = models.fast_copy(model, alone=False), torch.arange(40)[None]

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(ids).logits

    assert torch.equal(logits(model), logits(fast)) and logits(fast).dtype == torch.bfloat16
    assert not torch.equal(logits(model).float(), model(ids).logits)
    matrices = [m.weight for m in fast.modules() if isinstance(m, torch.nn.Linear)]
    assert len(matrices) == 15 and {m.dtype for m in matrices} == {torch.bfloat16}
    assert fast.get_input_embeddings().weight is model.get_input_embeddings().weight  # nothing else is copied
    before, reference = logits(model), models.fast_copy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    assert not torch.equal(logits(model), logits(fast))
    models.refresh(fast, model)
    assert torch.equal(logits(model), logits(fast)) and torch.equal(logits(reference), before)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_run_in_bf16_samples_and_teaches_with_the_copy_and_refreshes_it_after_every_update(policy, rows, monkeypatch):
    cfg = config(dtype="bfloat16", kl_coef=0.01, updates=2)
    made = sdar.make_policy(copy.deepcopy(policy.model), policy.chat.tokenizer, cfg)
    assert made.rounded is not None and made.fast is made.rounded is not made.ref
    seen, refresh = [], sdar.Policy.refresh
    monkeypatch.setattr(sdar.Policy, "refresh", lambda self: seen.append(refresh(self)))
    monkeypatch.setattr(made.model, "forward", None)  # sampling has no use for it
    for row in rows:
        row.advantage = 1.0
    metrics, _ = sdar.train_step(made, sdar.make_optimizer(made.model, cfg), rows, cfg, 0)
    assert len(seen) == 2 and abs(metrics["kl/loss"]) < 1 and metrics["sdar/gap_abs"] > 0
    again = models.fast_copy(made.model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.fast.parameters()))
    player = made.engine(cfg, 1.0)
    player.submit(0, (5, 6), random.Random(0))
    player.step()
    assert {x.dtype for layer in player.window.cache.layers for x in (layer.keys, layer.values)} == {torch.bfloat16}


def test_truncated_importance_weights_multiply_the_policy_gradient_and_nothing_else(policy, rows):
    old, sampled = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.5])
    assert sdar.truncated_weights(old, sampled, 2.0).tolist() == pytest.approx([2.0, 1.0, math.exp(-0.5)])
    for row in rows:
        row.advantage, row.logp = 1.0, tuple(x + math.log(2) for x in row.logp)  # half as likely for the trainer
    losses = {}
    for cap in (0.0, 0.25, 8.0):
        cfg = config(is_cap=cap)
        some = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
        losses[cap], _ = sdar.train_step(some, sdar.make_optimizer(some.model, cfg), rows, cfg, 0)
    assert losses[8.0]["rollout/is_weight"] == pytest.approx(0.5, abs=1e-4) and "rollout/is_weight" not in losses[0.0]
    assert losses[8.0]["grpo/loss"] == pytest.approx(losses[0.0]["grpo/loss"] / 2, rel=1e-4)
    assert losses[0.25]["grpo/loss"] == pytest.approx(losses[0.0]["grpo/loss"] / 4, rel=1e-4)
    assert losses[0.25]["sdar/loss"] == losses[0.0]["sdar/loss"]
