"""Tests of vLLM as an engine. Those that start it are slow, and run where it is installed: in an environment of its own
(docs/gpu.md), `python -m pytest -m slow tests/test_vllm.py`."""

import copy
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import sdar
from conftest import flags, refused
from lib import agreement, vllm_engine
from lib.engine import TorchEngine, respond
from lib.program import UserError

starts_vllm = [pytest.mark.slow, pytest.mark.skipif(
    not vllm_engine.installed().startswith(vllm_engine.SUPPORTED), reason="vLLM 0.32 or 0.33 is not installed")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.mark.parametrize("engine, device, version, chosen", [
    ("auto", CUDA, "0.33.0", True), ("auto", CUDA, "0.11.2", False), ("auto", CUDA, "", False),
    ("auto", CPU, "0.32.0", False), ("vllm", CPU, "", True), ("torch", CUDA, "0.33.0", False)])
def test_auto_is_vllm_on_cuda_where_a_supported_version_is_installed(monkeypatch, engine, device, version, chosen):
    monkeypatch.setattr(vllm_engine, "installed", lambda: version)
    assert vllm_engine.is_chosen(engine, device) == chosen


@pytest.mark.parametrize("version, device, says", [
    ("", "cpu", "needs vLLM 0.32 or 0.33, and there is none: pip install 'vllm"), ("0.11.2", "cpu", "there is 0.11.2"),
    ("0.33.0", "cuda:3", "set CUDA_VISIBLE_DEVICES=3 instead of --device cuda:3")])
def test_what_vllm_cannot_run_on_is_one_sentence(monkeypatch, version, device, says):
    monkeypatch.setattr(vllm_engine, "installed", lambda: version)
    with pytest.raises(UserError, match=says):
        vllm_engine.VLLM(SimpleNamespace(device=torch.device(device)), sdar.Config(), 100)


@pytest.mark.parametrize("free, billions, trained, wanted, plan", [
    (67, 1.5, 1.5, 18, (18, True)),  # 67 - 3 - 18 leave 46, of which 23 may be taken
    (67, 1.5, 1.5, 60, (23, True)), (55, 3, 3, 12, (6.5, True)),
    (55, 3, 3, 30, (10.4, False)),  # 6.5 of 13 are less than a quarter of 30
    (60, 7, 0.1, 20, (20, True))])  # an adapter
def test_the_engine_sleeps_where_half_of_what_training_leaves_is_too_little(free, billions, trained, wanted, plan):
    size, awake = vllm_engine.cache_plan(free * GB, int(billions * GB), int(trained * GB), wanted * GB)
    assert (size / GB, awake) == (pytest.approx(plan[0]), plan[1])
    with pytest.raises(UserError, match="no room for vLLM"):
        vllm_engine.cache_plan(1, 1, 1, 1)


def test_a_temperature_that_vllm_changes_is_refused_before_anything_is_played(
        monkeypatch, model_folder, tmp_path, capsys):
    awake = SimpleNamespace(llm=SimpleNamespace(is_sleeping=lambda: False), stale=False, cache_bytes=0)
    monkeypatch.setattr(vllm_engine, "VLLM", lambda *_: awake)
    monkeypatch.setattr(sdar, "rollout", None)
    for changes, value in ({"temperature": 3, "eval_every": 0, "eval_tasks": None}, 3), ({"eval_temperature": 5}, 5):
        refused(sdar.main, flags(model_folder, tmp_path / "run", engine="vllm", **changes), f"not at {value}:", capsys)
    refused(evaluation.main, [str(model_folder), "--engine", "vllm", "--temperature", "4", "--out",
                              str(tmp_path / "eval.json")], "not at 4:", capsys)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def served():
    """The bundled model with vLLM, and settings."""
    cfg = sdar.make_config({"model": "tiny", "max_response_tokens": 24, "engine": "vllm", "max_prompt_tokens": 1024})
    policy = sdar.load_policy(cfg)
    sdar.start_vllm(policy, cfg)
    return policy, cfg


def ask(policy, cfg, temperature, words="Find a red lamp.", count=8):
    """-> (prompt, a response each to so many equal prompts)."""
    prompt, noises = policy.chat.prompt(words), [random.Random(number) for number in range(count)]
    return prompt, respond(policy.engine(cfg, temperature), [prompt] * count, noises)


def largest_difference(policy, prompt, responses, temperature):
    """Of the engine's log-probs from the model's own."""
    own = agreement.own_logp(policy, [prompt], [[response.ids for response in responses]], temperature or 1.0)
    return (own - torch.tensor([x for response in responses for x in response.logp])).abs().max().item()


class TestStarted:
    pytestmark = starts_vllm

    @pytest.mark.parametrize("temperature", [1.0, 0.4, 0])
    def test_ids_are_exact_and_log_probs_the_models_own(self, served, temperature):
        policy, cfg = served
        prompt, responses = ask(policy, cfg, temperature)
        assert largest_difference(policy, prompt, responses, temperature) < 1e-4
        assert ask(policy, cfg, temperature)[1] == responses  # equal noise, equal response
        assert (len(set(responses)) > 1) == (temperature > 0)
        for ids, _, stop in responses:
            ends = [number for number, one in enumerate(ids) if one in policy.stop_ids]
            assert (ends, stop) == ([len(ids) - 1], "end") or (ends, len(ids), stop) == ([], 24, "length")

    def test_greedy_responses_are_those_of_the_torch_engine(self, served):
        policy, cfg = served
        prompt, responses = ask(policy, cfg, 0, count=1)
        assert respond(TorchEngine(policy, cfg, 0), [prompt], [random.Random(0)])[0].ids == responses[0].ids

    def test_new_weights_are_sampled_from_and_nothing_is_left_of_the_old(self, served):
        policy, cfg = served
        changed = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
        words = "Find a red lamp. " * 40  # whole blocks of the prefix cache
        for _ in range(2):
            before = ask(policy, cfg, 1.0, words)
            with torch.no_grad():
                for weight in changed.model.parameters():
                    weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            changed.refresh()
            prompt, responses = ask(changed, cfg, 1.0, words)
            assert largest_difference(changed, prompt, responses, 1.0) < 1e-4
            assert largest_difference(changed, *before, 1.0) > 1e-2
        policy.refresh()

    def test_a_response_of_a_rollout_that_was_given_up_is_nobodys(self, served):
        policy, cfg = served
        prompt, responses = ask(policy, cfg, 1.0, count=2)
        policy.engine(cfg, 1.0).submit("lost", prompt, random.Random(9))
        assert ask(policy, cfg, 1.0, count=2) == (prompt, responses)

    def test_temperatures_that_vllm_changes_are_refused(self, served):
        for temperature in (0.001, 2.5):
            with pytest.raises(UserError, match="from 0.01 to 2"):
                served[0].engine(served[1], temperature)

    def test_a_weight_that_was_not_handed_over_is_noticed(self, served, monkeypatch):
        policy, cfg = served
        named = [(name, weight) for name, weight in policy.weights() if name != "model.layers.1.mlp.down_proj.weight"]
        monkeypatch.setattr(sdar.Policy, "weights", lambda self: iter(named))
        with pytest.raises(UserError, match="in another way than transformers"):
            vllm_engine.VLLM(policy, cfg, 200)

    def test_steps_of_a_run_sample_from_each_steps_weights(self, tmp_path):
        flags = "--engine vllm --steps 2 --tasks 2 --group_size 2 --max_turns 3 --lr 1e-2 --warmup 0 --eval_every 0"
        assert sdar.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and all(0 < line["rollout/logp_diff_max"] < 1e-4 for line in lines)
