"""Tests of the methods as rows of settings: what each is without its own weight, what it leaves in the log, and what it
is made of. The formulas alone are tested in test_baselines.py."""

import dataclasses
import json

import pytest
import torch

import envs
import sdar
from conftest import config, flags, lines_of, refused, same, weights_of
from lib.skills import Skills

WEIGHTS = {  # of each method, by which it adds to GRPO
    "gigpo": ["gigpo_weight"], "sdar": ["sdar_coef"], "grpo_opsd": ["sdar_coef"], "rlsd": ["rlsd_mix"],
    "skill_sd": ["sdar_coef"], "opid": ["opid_episode_weight", "opid_step_weight"]}
OWN_METRIC = {"grpo": "grpo/loss", "gigpo": "gigpo/change", "sdar": "sdar/gate", "opsd": "sdar/gap",
              "grpo_opsd": "sdar/gap", "skill_grpo": "skills/missing", "rlsd": "rlsd/change",
              "skill_sd": "skill_sd/k3", "opid": "opid/change"}


def train(model_folder, folder, **changes):
    """A run of sdar.py -> (its weights at the end, its log)."""
    assert sdar.main(flags(model_folder, folder, **changes)) == 0
    return weights_of(folder / "checkpoint-2"), lines_of(folder)


@pytest.fixture(scope="module")
def plain(model_folder, tmp_path_factory):
    return train(model_folder, tmp_path_factory.mktemp("grpo") / "run", method="grpo", steps=2, eval_every=None)


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_method_without_its_own_weight_is_grpo_bit_for_bit(method, plain, model_folder, tmp_path):
    off = dict.fromkeys(WEIGHTS[method], 0)
    weights, log = train(model_folder, tmp_path / "run", method=method, steps=2, eval_every=None, **off)
    assert same(weights, plain[0]) and [line["grpo/loss"] for line in log if "grpo/loss" in line] == [
        line["grpo/loss"] for line in plain[1] if "grpo/loss" in line]
