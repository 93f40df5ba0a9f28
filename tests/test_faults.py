"""Tests that nothing is lost: damaged checkpoints, full disks, short memory, settings, output. See tools/faults.py."""

import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import eval as evaluation
import sdar
from conftest import assert_same_run, config, flags, lines_of, refused
from lib import checkpoints, folders, health, memory, program, results, retrieval, runs, settings
from tools import clone, faults, tiny


CASES = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def straight(model_folder, tmp_path_factory):
    """A run of four short steps that has kept every checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert sdar.main(flags(model_folder, run, eval_every=0, eval_tasks=None, keep=9)) == 0
    return run


@pytest.fixture
def run(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "a run")


def resume(folder, *more):
    return sdar.main(["--resume", str(folder), *more])


# ---------------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("how, name", [
    (faults.flip, "model.safetensors"), (faults.remove, "tokenizer.json"), (faults.empty, "state.pt"),
    (faults.cut, "run.json")])
def test_a_damaged_file_is_named_and_the_run_goes_on_from_the_checkpoint_before(how, name, run, straight):
    how(run / "checkpoint-4" / name)
    with pytest.warns(RuntimeWarning, match=f"checkpoint-4/{name} .*going on from .*checkpoint-3"):
        assert resume(run) == 0
    assert_same_run(run, straight)
    assert (run / "set-aside-1" / "checkpoint-4").is_dir()  # nothing is thrown away


@pytest.mark.parametrize("settings", ["steps", 3, ...])
def test_a_seal_whose_settings_are_not_a_dict_is_damaged(settings, run):
    seal = run / "checkpoint-4" / "run.json"
    stored = json.loads(seal.read_text()) | {"settings": settings}
    seal.write_text(json.dumps({key: value for key, value in stored.items() if value is not ...}))
    with pytest.raises(sdar.UserError, match="run.json is damaged"):
        folders.settings_of(seal.parent, sdar.Config)


def test_without_an_intact_checkpoint_or_the_needed_reference_a_resume_is_refused(run, capsys):
    named = run / "checkpoint-2"
    faults.flip(named / "state.pt")
    refused(sdar.main, ["--resume", str(named)], f"checkpoint-2/state.pt is damaged (its checksum differs): "
            f"--resume '{run}' takes", capsys)
    faults.setting(kl_coef=0.1)(run)
    (run / "checkpoint-4").rename(run / "elsewhere")
    for damage in (faults.flip, faults.remove):
        damage(run / "checkpoint-0" / "model.safetensors")
        refused(sdar.main, ["--resume", str(run)], "checkpoint-0/model.safetensors is", capsys)
    of_another_run(run / "checkpoint-0")
    refused(sdar.main, ["--resume", str(run)], "checkpoint-0 is of another run", capsys)
    reseal(settings=json.loads((run / "config.json").read_text()))(run / "checkpoint-0")
    for step in (1, 3):
        faults.empty(run / f"checkpoint-{step}" / "state.pt")
    refused(sdar.main, ["--resume", str(run)], "checkpoint-3/state.pt has 0 bytes instead", capsys)


def test_a_run_goes_on_from_an_older_checkpoint_and_what_came_later_is_kept(run, straight, capsys):
    faults.setting(model="nowhere/base")(run)  # the model that it began with is not needed
    assert resume(run / "checkpoint-2", "--out", f"{run}/.") == 0
    aside, said = run / "set-aside-1", capsys.readouterr().out
    assert {path.name for path in aside.iterdir()} == {"checkpoint-3", "checkpoint-4", "metrics.jsonl", "episodes"}
    assert str(aside) in said and len(lines_of(aside)) == 4
    assert_same_run(run, straight)
    assert resume(run) == 0 and "is finished (4 steps)" in capsys.readouterr().out
    assert resume(run, "--steps", "5", "--keep", "1", "--max_response_tokens", "7", "--micro_tokens", "900") == 0
    stored = json.loads((run / "config.json").read_text())
    assert (stored["steps"], stored["max_response_tokens"], stored["micro_tokens"]) == (5, 7, 900)
    assert [path.name for path in runs.checkpoints(run)] == ["checkpoint-0", "checkpoint-5"]


def reseal(**changes):
    """A function that changes what the run.json of a checkpoint says; a change to None leaves it out."""
    def change(checkpoint):
        stored = json.loads((checkpoint / "run.json").read_text()) | changes
        (checkpoint / "run.json").write_text(json.dumps({key: one for key, one in stored.items() if one is not None}))
    return change


def of_another_run(checkpoint):
    stored = json.loads((checkpoint / "run.json").read_text())
    reseal(settings=stored["settings"] | {"seed": 7})(checkpoint)


@pytest.mark.parametrize("how, why", [
    (of_another_run, r"checkpoint-4 is of another run \(--seed is 7 there, and 0"), (reseal(files={}), "is damaged"),
    (lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("checkpoint-1"), path)), "saved under"),
    (reseal(settings=None), "is damaged"), (reseal(settings={}), "another run"),
    (lambda path: (path / "run.json").unlink() or os.mkfifo(path / "run.json"), "run.json is a device or a FIFO")])
def test_a_checkpoint_that_is_not_this_runs_own_is_named_and_the_one_before_is_taken(how, why, run, straight):
    how(run / "checkpoint-4")
    with pytest.warns(RuntimeWarning, match=why):
        assert resume(run) == 0
    assert_same_run(run, straight)


def test_a_checkpoint_is_found_by_a_link_and_from_within_and_a_copy_beside_it_is_refused(
        run, straight, monkeypatch, capsys):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-2-backup")
    refused(sdar.main, ["--resume", str(run / "checkpoint-2-backup")], "is not named as a run names", capsys)
    (run / "latest").symlink_to("checkpoint-2")
    for folder, place in (("latest", run), (".", run / "checkpoint-2")):
        monkeypatch.chdir(place)
        assert resume(folder) == 0
        assert_same_run(run, straight)
    assert (run / "set-aside-2" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("name", ["metrics.jsonl", "curve.png", "episodes"])
def test_a_file_of_a_run_that_is_of_another_kind_is_named(name, run, capsys):
    shutil.move(run / name, run / "moved") if (run / name).exists() else None
    os.mkfifo(run / name)
    refused(sdar.main, ["--resume", str(run)], f"{name} is a", capsys)


def test_a_model_that_samples_nothing_more_is_saved_beside_the_one_before_which_is_named(
        model_folder, tmp_path, monkeypatch, capsys):
    train_step, run = sdar.train_step, tmp_path / "run"

    def spoiled(policy, *args):
        result = train_step(policy, *args)
        if len(lines_of(run)) == 2:
            policy.model.model.norm.weight.data[:] = 3e38
        return result

    monkeypatch.setattr(sdar, "train_step", spoiled)
    refused(sdar.main, flags(model_folder, run, eval_every=0, eval_tasks=None, keep=1, save_every=2),
            f"checkpoint-3 holds this model; python sdar.py --resume {run}/checkpoint-2 goes on", capsys)
    monkeypatch.undo()
    assert resume(run / "checkpoint-2") == 0


def test_only_what_a_run_wrote_is_rotated_and_a_replaced_checkpoint_comes_back(run, straight, policy):
    others = ("checkpoint-best-1", "checkpoint-3-good", "checkpoint-007", "checkpoint-٣")
    for name in others:
        (run / name).mkdir()
        (run / name / "state.pt").write_text("mine")
    (run / "checkpoint-1" / "eval.json").write_text("mine")
    (run / "checkpoint-4").rename(run / ".checkpoint-4.old")  # killed between two renames
    assert resume(run, "--steps", "4") == 0
    assert_same_run(run, straight)
    optimizer = sdar.make_optimizer(policy.model, config())
    (run / "checkpoint-4" / "notes.txt").write_text("mine")
    checkpoints.save_checkpoint(run, policy.model, policy.chat.tokenizer, optimizer, 4, keep=1)
    assert all((run / name / "state.pt").read_text() == "mine" for name in others)
    assert os.listdir(run / "checkpoint-1") == ["eval.json"] and not (run / "checkpoint-2").exists()
    assert (run / "checkpoint-4" / "notes.txt").exists() and checkpoints.fault(run / "checkpoint-4") is None


def test_weights_that_are_not_finite_are_never_saved_and_the_last_good_checkpoint_stays(
        model_folder, tmp_path, straight, monkeypatch, capsys):
    train_step, run = sdar.train_step, tmp_path / "run"

    def spoiled(policy, *args):
        result = train_step(policy, *args)
        if len(lines_of(run)) == 2:
            next(policy.model.parameters()).data[0] = math.nan
        return result

    monkeypatch.setattr(sdar, "train_step", spoiled)
    refused(sdar.main, flags(model_folder, run, eval_every=0, eval_tasks=None, keep=9),
            f"The last checkpoint is {run}/checkpoint-2", capsys)
    monkeypatch.undo()
    assert resume(run) == 0
    assert_same_run(run, straight)


@pytest.mark.parametrize("kind, shards", [("mixtral", None), ("qwen2", "100KB")])
def test_checkpoints_of_any_layout_are_resumed(kind, shards, model_folder, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
    small = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    base = shutil.copytree(model_folder, tmp_path / "base")
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, tie_word_embeddings=True))
    made.save_pretrained(base)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained",
                        lambda *args, **how: save(*args, **how, **{"max_shard_size": shards} if shards else {}))
    for name, steps in (("straight", 2), ("parts", 1)):
        assert sdar.main(flags(base, tmp_path / name, steps=steps, eval_every=0, eval_tasks=None, kl_coef=0.1)) == 0
    shutil.rmtree(base)
    assert resume(tmp_path / "parts", "--steps", "2") == 0
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "straight")
    ends = [sorted((tmp_path / name / "checkpoint-2").glob("*.safetensors")) for name in ("straight", "parts")]
    assert [path.read_bytes() for path in ends[0]] == [path.read_bytes() for path in ends[1]]
    assert (len(ends[0]) > 1) == bool(shards)


# ------------------------------------------------------------------------------------------------------ disk and memory

@pytest.mark.parametrize("where, name, call, error, culprit", [
    (torch, "save", 3, OSError(errno.ENOSPC, "No space left on device"), "checkpoint-2 cannot be written (No space"),
    (sdar, "write_step", 1, OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only"),
    (sdar, "token_scores", 3, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "--micro_tokens (now 4096"),
    (torch.optim.AdamW, "step", 2, MemoryError(), "The last checkpoint is")])
def test_a_full_disk_or_memory_is_a_sentence_and_loses_no_whole_step(
        where, name, call, error, culprit, model_folder, tmp_path, straight, monkeypatch, capsys):
    function, calls, run = getattr(where, name), [], tmp_path / "run"

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) >= call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(where, name, failing)
    refused(sdar.main, flags(model_folder, run, eval_every=0, eval_tasks=None, keep=9), culprit, capsys)
    monkeypatch.undo()
    assert resume(run) == 0
    assert_same_run(run, straight)


def test_a_defect_of_the_program_shows_its_traceback_after_the_whole_steps_are_saved(
        model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sdar, "make_rows", lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        sdar.main(flags(model_folder, tmp_path / "run", eval_every=0, eval_tasks=None))
    assert f"All whole steps are saved in {tmp_path}/run/checkpoint-0" in capsys.readouterr().out


def test_a_folder_that_another_program_writes_to_is_left_alone(run, model_folder, capsys):
    other = os.open(run, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for arguments in (["--resume", str(run)], flags(model_folder, run)):
        refused(sdar.main, arguments, "Another program is writing to", capsys)
    os.close(other)  # as when that program is killed
    assert resume(run, "--steps", "4") == 0


def test_peak_memory_is_that_of_the_process_in_gigabytes():
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert runs.peak_memory_gb(torch.device("cpu")) == pytest.approx(peak / 1e9, rel=1e-3)


def test_what_decorates_a_run_never_ends_it(model_folder, tmp_path, monkeypatch):
    def init(**_):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.warns(RuntimeWarning) as caught:
        assert sdar.main(flags(model_folder, tmp_path / "run", steps=1, report_to="wandb")) == 0
    assert {str(one.message).split(":")[0] for one in caught} == {
        "nothing more is sent to the tracker", f"{tmp_path}/run/curve.png is not drawn"}
    assert lines_of(tmp_path / "run")[-1]["step"] == 1 and runs.peak_memory_gb(torch.device("cpu")) is None


# ------------------------------------------------------------------------------------------------ numbers and sentences

def test_what_json_does_not_have_is_null():
    value = {"a": [math.nan, 1.5], "b": {"c": -math.inf}, "d": (math.inf, "inf", True)}
    assert json.loads(program.to_json(value)) == {"a": [None, 1.5], "b": {"c": None}, "d": [None, "inf", True]}


@pytest.mark.parametrize("metrics, cause", [
    ({"grpo/entropy": math.nan, "sdar/gap": math.nan}, "--dtype float32"), ({"sdar/gap": math.inf}, "teacher's"),
    ({"kl/loss": math.nan}, "reference"), ({"grpo/loss": math.nan}, "advantage"), ({}, "lower --lr")])
def test_a_gradient_that_is_not_finite_names_its_cause(metrics, cause, policy):
    with pytest.raises(runs.UserError, match=cause):
        health.check_finite(math.nan, policy.model, {"grpo/entropy": 1.0, "sdar/gap": 0.1, "grpo/loss": 0.0} | metrics)
    health.check_finite(1.0, policy.model, metrics)


@pytest.mark.parametrize("value, cause", [(math.nan, "infinity .weight"), (-2e9, "grown to 2e.09: .* --weight_decay")])
def test_weights_that_are_not_finite_or_too_large_are_named(value, cause):
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = value
    with pytest.raises(runs.UserError, match=cause):
        health.check_finite(math.inf, model, {"grpo/entropy": math.nan})


def test_step_lines_fit_100_columns_with_everything_in_them():
    for steps, seconds, errors, gap, teacher in (
            (150, 66.2, 0, -0.123, "live"), (10_000, 12_345.6, 99_999, -10.123, "live"), (9, 99, 0, 0.0, "none")):
        metrics = {"reward/success": 0.5, "rollout/turns": 49.9, "rollout/invalid": 0.123, "rollout/errors": errors,
                   "grpo/entropy": 1.9, "grpo/zero_variance_groups": 1.0, "sdar/gap": gap / 2, "sdar/distilled": 0.5,
                   "time/step": seconds}
        line = runs.step_line(config(steps=steps, teacher=teacher), steps, metrics)
        assert len(line) <= 100 and "success 0.50" in line and "invalid 0.12" in line and line.endswith(" s")
        assert (f"errors {errors}" in line) == (errors > 0) and ("turns" in line) == (steps < 10_000)
        assert (f"gap {gap:+.3f}" in line) == (teacher == "live")  # per token that is distilled


def test_a_real_models_memory_and_disk_are_told_before_it_starts(policy, model_folder, tmp_path, monkeypatch):
    cfg = config(model=str(model_folder), kl_coef=0.01, keep=3)
    size = sum(p.numel() for p in policy.model.parameters())
    assert health.disk_parts(cfg, policy.model) == (12 * size, 4 * 12 * size + 4 * size)
    monkeypatch.setattr(health, "free_disk", lambda _: 1e6)
    monkeypatch.setattr(memory, "memory_there", lambda _: 1e6)
    with pytest.warns(RuntimeWarning) as caught:
        assert "0.1 million parameters" in health.forecast(cfg, tmp_path / "not yet", policy)
    assert [str(one.message).split("lower ")[1].split(",")[0] for one in caught] == ["--rollout_batch", "--keep"]
    assert health.forecast(config(model="tiny"), tmp_path, policy) == ""


# --------------------------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("arguments, says", [
    (["--stepz", "3"], "--stepz is not a flag: the closest is --steps"), (["--group-size", "2"], "is --group_size."),
    (["--xyzzy"], "--help lists them."), (["webshop"], "'webshop' is not expected"), (["--steps"], "--steps: expected"),
    (["--steps", "many"], "--steps: 'many' is not a whole number."), (["--lr", "0,1"], "--lr: '0,1' is not a number."),
    (["--seed", "9" * 5000], "is not a whole number."), (["--seed", "9" * 30], "--seed"), (["--lr", "nan"], "--lr"),
    *(([f"--{name}", "9" * 13], f"--{name}") for name in ("threads", "tasks", "group_size", "eval_tasks", "max_turns")),
    (["--resume", "a", "--config", "b"], "--config"), (["--config", "nowhere.json"], "nowhere.json"),
    (["--config", os.devnull], "is a device"), (["--config", "."], "is a folder"), (["--out", ""], "--out is empty"),
    (["--data="], "--data is empty"),
    (["--retriever", "http://u:p@h", "--env", "webshop"], "--retriever would do nothing"), (["--keep", "0"], "--keep"),
    (["--model", "./\x1b[31mred\u202e"], "\\x1b[31mred\\u202e")])
def test_a_wrong_command_is_one_line_that_names_the_flag(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(sdar.main, arguments, says, capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [sdar.Config, clone.CloneConfig, tiny.TinyConfig])
def test_every_number_has_a_largest_value_that_fp32_and_64_bits_hold(kind):
    numbers = [field for field in dataclasses.fields(kind) if type(field.default) in (int, float)]
    assert len(numbers) > 3
    for field in numbers:
        for value in (10**400, 2**63, 1e39) if type(field.default) is int else (1e300, 1e39, 10**400):
            with pytest.raises(sdar.UserError, match=f"--{field.name} .* at most"):
                settings.check_value(field, value)


@pytest.mark.parametrize("main", [sdar.main, evaluation.main])
def test_help_has_titled_groups_commands_first_and_the_description_last(main, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("commands:") < text.index("--help") < text.index("model:") < text.index("    python ")
    assert "None)" not in text and "METHODS" not in text and "default None" not in text
    if main is sdar.main:
        order = [text.index(word) for word in ("--resume", "--config", "--out", "task:", "--lr ", "A_i =")]
        assert order == sorted(order)


def test_a_new_run_has_the_settings_of_another_and_flags_on_top(run, straight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, says in ((run, "is a folder"), (run / "checkpoint-1" / "config.json", "holds no settings of a run")):
        refused(sdar.main, ["--config", str(path)], says, capsys)
    assert sdar.main(["--config", str(run / "config.json"), "--steps", "1"]) == 0  # not in that run's folder
    new = json.loads((tmp_path / "runs" / "webshop-sdar-0" / "config.json").read_text())
    old = json.loads((run / "config.json").read_text())
    assert {name for name in old if old[name] != new[name]} == {"out", "steps"}
    stored = folders.settings_in(run / "config.json", sdar.Config)
    base = settings.set_by_hand(stored, sdar.make_config, sdar.RECIPE)
    assert sdar.make_config({}, base | {"out": stored.out}) == stored
    grpo = sdar.make_config({"method": "grpo"}, base)  # what a method implies comes with it
    assert (grpo.teacher, grpo.sdar_coef, grpo.lr) == ("none", 0.0, stored.lr)


def test_a_password_is_stored_nowhere_and_asked_for_again(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retrieval.Retriever, "probe", lambda self: None)  # it goes down later
    run, secret = tmp_path / "run", "http://me:se@cret@127.0.0.1:9/retrieve?key=cret"
    arguments = flags(model_folder, run, env="search", steps=1, eval_every=0, eval_tasks=None, retriever=secret)
    assert sdar.main(arguments) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err, *(path.read_text() for path in run.rglob("*.json*"))):
        assert "cret" not in text
    refused(sdar.main, ["--resume", str(run), "--steps", "2"], 
            "--retriever http://***@127.0.0.1:9/retrieve?*** lacks its", capsys)
    assert resume(run, "--steps", "2", "--retriever", secret) == 0 and "cret" not in (run / "config.json").read_text()


@pytest.mark.parametrize("text, shown", [
    ("http://me:pw@h/x", "http://***@h/x"), ("http://h/x?key=5 is", "http://h/x?*** is"), ("(//h?a)", "(//h?a)"),
    ("http://m:/?p@h/?a", "http://***@h/?***"), ("http://h/x?*** and http://a/?b", "http://h/x?*** and http://a/?***"),
    ("What is http://h/a? A page.", "What is http://h/a? A page."), ("http://h/x?***: no", "http://h/x?***: no")])
def test_what_may_be_secret_in_an_address_is_masked_once(text, shown):
    assert program.without_secrets(text) == program.without_secrets(shown) == program.printable(text) == shown
    assert program.lacks_secrets(shown) == ("***" in shown)


@pytest.mark.parametrize("error, sentence", [
    (AssertionError(), "AssertionError."), (MemoryError(), "MemoryError."), (KeyError("a"), "KeyError: 'a'."),
    (ValueError("bad.\nmore"), "bad."), (RuntimeError("Errors:\n  a"), "RuntimeError: Errors: a."),
    (OSError(), "OSError."), (OSError(28, "No space"), "[Errno 28] No space."),
    (UnicodeDecodeError("utf-8", b"a", 0, 1, "odd"), "'utf-8' codec can't decode byte 0x61 in position 0: odd.")])
def test_every_exception_is_described_in_a_sentence(error, sentence, capsys):
    def fail(argv):
        raise error

    assert program.describe(error) == sentence
    if isinstance(error, OSError | MemoryError):
        refused(lambda argv: program.exit_status(fail, argv), [], sentence.rstrip("."), capsys)


def test_output_that_cannot_be_written_loses_nothing_and_is_told(capsys, monkeypatch):
    class Full(io.StringIO):
        encoding, error = "ascii", OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            raise self.error

    done = []
    monkeypatch.setattr(sys, "stdout", Full())
    assert program.exit_status(lambda _: (print("é\x1b[0m", flush=True), done.append(1)), []) == 2
    assert done and "could not be written (No space left" in capsys.readouterr().err
    monkeypatch.setattr(Full, "error", BrokenPipeError())
    assert program.exit_status(lambda _: (print("a", flush=True), done.append(2)), []) == 141 and done == [1, 2]
    monkeypatch.setattr(sys, "stdout", None)  # closed
    assert program.exit_status(lambda _: print("a"), []) == 0
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stdout", plain)
    assert program.exit_status(lambda _: print("a\tb\x1b[2J\x07\u202e \ud800 http://me:pw@host/x"), []) == 0
    assert plain.getvalue() == "a\tb\\x1b[2J\\x07\\u202e \\ud800 http://***@host/x\n"


# ----------------------------------------------------------------------------------------------------------- evaluation

def test_a_disk_that_is_full_after_the_first_of_two_files_leaves_both_results_as_they_were(tmp_path, monkeypatch):
    out, write = tmp_path / "e.json", Path.write_text
    results.write_result(out, {"number": 1}, ["one\n"])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def write_one(path, text, **how):
        if "number" in text:
            write(path, text[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", write_one)
    with pytest.raises(sdar.UserError, match="No space left"):
        results.write_result(out, {"number": 2}, ["two\n"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before and len(before) == 2


def test_a_checkpoint_copied_elsewhere_is_evaluated_under_its_settings_and_damage_is_found(run, tmp_path, capsys):
    best = shutil.copytree(run / "checkpoint-4", tmp_path / "best")
    cfg = evaluation.evaluation_config(str(best), {})
    assert (cfg.max_turns, cfg.max_response_tokens, cfg.max_prompt_tokens) == (3, 6, 600)
    assert evaluation.main([str(best), "--tasks", "2", "--out", str(tmp_path / "e.json")]) == 0
    faults.flip(best / "model.safetensors")
    refused(evaluation.main, [str(best), "--tasks", "2", "--out", str(tmp_path / "f.json")], "is damaged", capsys)


EPISODE = {"task_id": 0, "task_type": "a", "won": True, "score": 1.0, "turns": 1, "invalid": 0, "done": True}
RESULT = {"format": "sdar eval 2", "model": "m", "evaluation_set": "a" * 64, "conditions": ["with"], "summary": {},
          "config": {"env": "webshop"}, "outcomes": {"with": [EPISODE]},
          "sampling": {"split": "val", "tasks": 1, "repeats": 1, "seed": 0, "temperature": 0.4}}


@pytest.mark.parametrize("changes, why", [
    ({"outcomes": {}}, "no outcomes of condition 'with'"), ({"outcomes": {"with": []}}, "no outcomes"),
    ({"outcomes": {"with": [EPISODE | {"won": "yes"}]}}, "won of outcome 0 of 'with' is 'yes'"),
    ({"outcomes": {"with": [EPISODE, 3]}}, "outcome 1 of 'with' is 3"), ({"conditions": [["with"]]}, "conditions [["),
    ({"outcomes": {"with": [EPISODE | {"score": math.nan}]}}, "score of outcome 0 of 'with' is nan"),
    ({"outcomes": {"with": [EPISODE | {"task_id": 1}]}}, "of different tasks"), ({"config": []}, "config of it"),
    ({"sampling": {"split": "val"}}, "sampling has no tasks"), ({"evaluation_set": 7}, "evaluation_set of it is 7")])
def test_a_result_with_missing_keys_or_wrong_kinds_is_refused_by_name(changes, why, tmp_path, capsys):
    for name, result in (("good.json", RESULT), ("bad.json", RESULT | changes)):
        (tmp_path / name).write_text(json.dumps(result))
    good, bad = str(tmp_path / "good.json"), str(tmp_path / "bad.json")
    assert evaluation.main(["--compare", good, good]) == 0
    refused(evaluation.main, ["--compare", good, bad], why, capsys)


@pytest.mark.parametrize("changes, why", [*CASES["printed episodes"], ({"score": 10**400}, "score of episode 1 is 1")])
def test_an_episode_of_wrong_kinds_is_refused_by_name(changes, why, tmp_path, capsys):
    turn = {"observation": "o", "text": "t", "valid": True, "stop": "end", "gap": [0.5]}
    whole = {"task": "t", "won": True, "score": 1.0, "turns": [turn]}
    for path, episode in ((tmp_path / "good", whole), (tmp_path / "bad", whole | changes)):
        path.write_text(json.dumps(episode))
    assert evaluation.main(["--show", str(tmp_path / "good")]) == 0
    refused(evaluation.main, ["--show", str(tmp_path / "bad")], why, capsys)


@pytest.mark.parametrize("arguments, says", CASES["evaluations"])
def test_what_eval_cannot_use_is_named_at_once_with_what_to_give(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("run/episodes", "run/new", "run/done", "taken-episodes.jsonl", "taken"):
        Path(name).mkdir(parents=True)
    os.mkfifo("pipe")
    for name in ("run/config.json", "run/episodes/step-00001.jsonl", "run/done/eval.json"):
        Path(name).write_text("{}")
    refused(evaluation.main, arguments, says.format(tmp_path), capsys)


def test_two_programs_write_one_file_under_hidden_names_of_their_own(tmp_path, monkeypatch):
    write, names = Path.write_text, []
    monkeypatch.setattr(Path, "write_text", lambda path, *args, **how: names.append(path) or write(path, *args, **how))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        program.write_atomically({tmp_path / "e.json": "{}"})
    assert len(set(names)) == 2 and os.listdir(tmp_path) == ["e.json"]


@pytest.mark.slow
def test_faults_in_real_runs_are_handled(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "STRAIGHT", tmp_path / "straight")
    assert faults.main(["reader of an", "full standard output", "two default names", "SIGKILL at moment 0"]) == 0


def test_the_table_of_faults_has_at_least_sixty_of_different_names():
    assert len({case.name for case in faults.CASES}) == len(faults.CASES) >= 60
