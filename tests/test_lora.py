"""Tests of LoRA: what a step changes, the reference without a copy, checkpoints in peft's layout, resume, merge."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import sdar
from conftest import config, flags, lines_of, own_logp, refused, same, weights_of
from lib import lora, models
from tools import merge

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
RANK = {"lora_rank": 4}


def adapter_of(checkpoint):
    return load_file(checkpoint / lora.WEIGHTS)


@pytest.fixture(scope="module")
def straight(model_folder, tmp_path_factory):
    """A run of four steps without interruption, with a reference model and two optimiser steps per batch."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert sdar.main(flags(model_folder, run, **RANK, kl_coef=0.1, updates=2)) == 0
    return run


@pytest.fixture
def adapted(model_folder):
    """A policy whose adapter is not 0, with a reference."""
    policy = sdar.load_policy(config(model=str(model_folder), kl_coef=0.01, **RANK))
    torch.manual_seed(1)
    for weight in policy.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    return policy


def test_a_new_adapter_changes_no_log_prob_and_has_a_pair_of_matrices_beside_all_linear_layers_but_the_head(
        policy, model_folder, rows):
    new = sdar.load_policy(config(model=str(model_folder), **RANK))
    linear = [name for name, module in policy.model.named_modules() if isinstance(module, torch.nn.Linear)]
    trained = {name for name, weight in new.model.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in linear if name != "lm_head" for side in "AB"}
    logp = [sdar.response_logp(one, one.model, rows, config()) for one in (new, policy)]
    assert logp[0] == logp[1]
    other = sdar.load_policy(config(model=str(model_folder), **RANK, seed=1)).model
    again = sdar.load_policy(config(model=str(model_folder), **RANK)).model
    weights = [dict(model.named_parameters()) for model in (new.model, again, other)]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])  # A follows from the seed


@pytest.mark.parametrize("changes", [{}, {"teacher": "ref", "surrogate": "centered"}, {"recompute": True},
                                     {"surrogate": "rkl"}])
def test_a_step_changes_the_adapter_alone(changes, model_folder, rows):
    cfg = config(model=str(model_folder), kl_coef=0.1, **RANK, **changes)
    policy = sdar.load_policy(cfg)
    optimizer = sdar.make_optimizer(policy.model, cfg)
    before = copy.deepcopy(policy.model.state_dict())
    sdar.train_step(policy, optimizer, rows, cfg, 0)
    sdar.train_step(policy, optimizer, rows, cfg, 1)  # in the first, A has no gradient, since B is 0
    changed = {name for name, weight in policy.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for name, weight in policy.model.named_parameters() if "lora_" in name}


def test_the_reference_is_the_base_with_the_adapter_off_without_a_weight_of_its_own(policy, adapted, rows):
    cfg = config()
    base = sdar.response_logp(policy, policy.model, rows, cfg)
    trained = sdar.response_logp(adapted, adapted.model, rows, cfg)
    assert sdar.response_logp(adapted, adapted.ref, rows, cfg) == base != trained
    assert sdar.response_logp(adapted, adapted.ref, rows, cfg, teacher=True) == sdar.response_logp(
        policy, policy.ref, rows, cfg, teacher=True)
    assert sdar.response_logp(adapted, adapted.model, rows, cfg) == trained  # it is on again
    with pytest.raises(RuntimeError, match="stop"), lora.adapter_off(adapted.model):
        raise RuntimeError("stop")
    assert sdar.response_logp(adapted, adapted.model, rows, cfg) == trained
    assert list(adapted.ref.parameters()) == [] and adapted.ref.get_output_embeddings().weight is (
        adapted.model.get_output_embeddings().weight)


def test_a_checkpoint_holds_the_adapter_alone_and_peft_and_transformers_load_it(straight, model_folder, rows):
    from transformers import AutoModelForCausalLM
    checkpoint = straight / "checkpoint-4"
    names = {path.name for path in checkpoint.iterdir()}
    assert {lora.CONFIG, lora.WEIGHTS, "state.pt", "run.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    assert all("lora_" in name for name in adapter_of(checkpoint))
    stored = json.loads((checkpoint / lora.CONFIG).read_text())
    assert stored["base_model_name_or_path"] == str(model_folder) and (stored["r"], stored["lora_alpha"]) == (4, 8)
    prompt, response = rows[0].prompt_ids, rows[0].response_ids
    ours, _ = models.read_model(str(checkpoint), merge=False)
    expected = own_logp(ours.eval(), prompt, response)
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
                                           checkpoint)
    auto = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    merged, _ = models.read_model(str(checkpoint))
    base, _ = models.read_model(str(model_folder))
    for model in alone, auto, merged:
        assert (own_logp(model.eval(), prompt, response) - expected).abs().max() < 1e-5
    assert (own_logp(base.eval(), prompt, response) - expected).abs().max() > 1e-3
    assert all(weight.requires_grad for weight in merged.parameters())  # --lora_rank 0 trains them all


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit_without_its_first_checkpoint(
        straight, model_folder, tmp_path):
    run = tmp_path / "run"
    assert sdar.main(flags(model_folder, run, **RANK, kl_coef=0.1, updates=2, steps=2)) == 0
    shutil.rmtree(run / "checkpoint-0")  # elsewhere the reference is read from it
    assert sdar.main(["--resume", str(run), "--steps", "4"]) == 0
    assert lines_of(run) == lines_of(straight)
    assert same(adapter_of(run / "checkpoint-4"), adapter_of(straight / "checkpoint-4"))
    states = [torch.load(one / "checkpoint-4" / "state.pt", weights_only=True)["optimizer"]["state"]
              for one in (run, straight)]
    assert len(states[0]) == len(adapter_of(run / "checkpoint-4"))
    assert all(same(states[0][number], states[1][number]) for number in states[0])


def test_a_checkpoint_is_evaluated_trained_further_and_merged(straight, tmp_path, rows, capsys):
    checkpoint, whole = straight / "checkpoint-4", tmp_path / "whole"
    few = ["--eval_tasks", "2", "--out", str(tmp_path / "eval.json")]
    assert evaluation.main([str(checkpoint), *few]) == 0
    assert merge.main([str(checkpoint), str(whole)]) == 0
    refused(merge.main, [str(checkpoint), str(whole)], "already there", capsys)
    refused(merge.main, [str(whole), str(tmp_path / "again")], "nothing to merge", capsys)
    unmerged = sdar.load_policy(config(model=str(checkpoint), **RANK))
    merged = sdar.load_policy(config(model=str(whole)))
    for _ in ("as it is trained", "frozen, as in an evaluation"):
        assert same(dict(lora.merged_weights(unmerged.model)), dict(merged.model.named_parameters()))
        unmerged.model.requires_grad_(False)
    logp = [sdar.response_logp(policy, policy.model, rows, config()) for policy in (unmerged, merged)]
    assert max(abs(a - b) for row in rows for a, b in zip(logp[0][row], logp[1][row])) < 1e-5
    run = tmp_path / "run"
    assert sdar.main(flags(checkpoint, run, steps=0, eval_every=0, eval_tasks=None)) == 0
    assert same(weights_of(run / "checkpoint-0"), weights_of(whole))
    refused(sdar.main, flags(checkpoint, tmp_path / "x", **RANK), "merge it into its model first", capsys)


def test_the_bundled_model_keeps_its_defaults_when_an_adapter_is_merged_into_it(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert sdar.main(["--lora_rank", "1", "--steps", "0", "--eval_every", "0", "--out", str(run)]) == 0
    assert merge.main([str(run / "checkpoint-0"), str(whole)]) == 0
    assert models.is_bundled(run / "checkpoint-0") and models.is_bundled(whole)
    assert same(weights_of(whole), weights_of(models.TINY))


def test_an_adapter_finds_its_base_on_another_machine_and_refuses_another_base(straight, model_folder, tmp_path):
    moved, elsewhere = tmp_path / "moved", str(tmp_path / "gone")
    shutil.copytree(straight / "checkpoint-4", moved)
    stored, run = (json.loads((moved / name).read_text()) for name in (lora.CONFIG, "run.json"))
    (moved / lora.CONFIG).write_text(json.dumps(stored | {"base_model_name_or_path": elsewhere}))
    assert lora.base_of(moved) == str(model_folder)  # as --model said
    run["settings"]["model"] = "tiny"
    (moved / "run.json").write_text(json.dumps(run))
    assert lora.base_of(moved) == "tiny"
    (moved / "run.json").unlink()
    with pytest.raises(sdar.UserError, match="beside the model .*gone, which is not there"):
        models.read_model(str(moved))
    other = tmp_path / "gone"
    shutil.copytree(model_folder, other)
    models.read_model(str(moved))
    save_file({name: weight + 1e-3 for name, weight in weights_of(model_folder).items()}, other / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(sdar.UserError, match="gone is not the model beside which the adapter"):
        models.read_model(str(moved))


DAMAGED = {
    "a missing weight": (lambda weights: dict(list(weights.items())[1:]), "1 of its weights are missing"),
    "a weight of no layer": (lambda weights: weights | {"x": torch.ones(1)}, "1 are of no layer"),
    "a weight that is NaN": (lambda weights: {name: w * torch.nan for name, w in weights.items()}, "NaN or infinite"),
    "another rank": (lambda weights: {name: w[:2].clone() for name, w in weights.items()}, "size mismatch")}


@pytest.mark.parametrize("what", DAMAGED)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(what, straight, tmp_path):
    change, words = DAMAGED[what]
    shutil.copytree(straight / "checkpoint-4", tmp_path / "a")
    (tmp_path / "a" / "run.json").unlink()  # whose checksum would tell
    save_file(change(adapter_of(tmp_path / "a")), tmp_path / "a" / lora.WEIGHTS)
    with pytest.raises(sdar.UserError, match=words) as error:
        models.read_model(str(tmp_path / "a"))
    assert "\n" not in str(error.value)


def test_an_average_of_an_adapter_is_refused_and_a_missing_peft_named(
        straight, model_folder, tmp_path, monkeypatch, capsys):
    refused(sdar.main, flags(model_folder, tmp_path / "a", **RANK, teacher="ema"), "--teacher ema averages", capsys)
    monkeypatch.setitem(sys.modules, "peft", None)
    for wrong in flags(model_folder, tmp_path / "b", **RANK), ["--resume", str(straight), "--steps", "5"]:
        refused(sdar.main, wrong, "peft is not installed: pip install peft.", capsys)


def test_base_matrices_in_bf16_give_the_log_probs_and_gradients_of_autocast(model_folder, rows, monkeypatch):
    cfg, found = config(model=str(model_folder), dtype="bfloat16", kl_coef=0.1, **RANK), []
    for round_frozen in lora.round_frozen, lambda model: None:
        monkeypatch.setattr(lora, "round_frozen", round_frozen)
        policy = sdar.load_policy(cfg)
        optimizer = sdar.make_optimizer(policy.model, cfg)
        metrics = [sdar.train_step(policy, optimizer, rows, cfg, step)[0] for step in (0, 1)]
        weights = policy.model.state_dict()
        found.append(({name: w for name, w in weights.items() if "lora_" in name}, metrics))
        rounded = {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
        assert rounded == (set() if len(found) == 2 else {
            name for name, w in weights.items() if name == "lm_head.weight" or name.endswith("base_layer.weight")})
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
