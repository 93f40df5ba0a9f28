"""What all tests share: a small random model, skills, two groups of played episodes, the flags of a short run."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels run on any machine; compiling them is tested in a process of its own

import dataclasses
import json
import signal

import pytest
import torch

import envs
import sdar
from tools import tiny

torch.set_num_threads(1)  # bit-for-bit comparisons need one order of summation


def config(**changes):
    small = {"tasks": 2, "group_size": 2, "max_turns": 3, "max_response_tokens": 10, "max_prompt_tokens": 2048,
             "kl_coef": 0.0, "eval_every": 0, "max_grad_norm": 1e9, "lr": 1e-2}
    return sdar.Config(**(small | changes))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved random Qwen2 (hidden 64, 2 layers) with a tokenizer that tools.tiny makes."""
    from transformers import Qwen2ForCausalLM
    cfg = tiny.TinyConfig(**sdar.defaults("webshop", "tiny") | {"steps": 10})
    wide, tokenizer = tiny.new_model(tiny.make_sources(cfg), vocabulary=600, episodes=10)
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, layer_types=None, initializer_range=0.15)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(type(wide.config)(**(wide.config.to_dict() | small))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(model_folder):
    """With a reference model; tests that train do it on a copy."""
    return sdar.load_policy(config(model=str(model_folder), kl_coef=0.01))


@pytest.fixture(scope="session")
def skills():
    return sdar.load_skills(config(), envs.make("webshop").task_types)


@pytest.fixture(scope="session")
def played(policy):
    """Two groups of two random episodes; one of the first group is declared won, so that its advantages are not 0."""
    cfg = config()
    environments = [sdar.make_env(cfg) for _ in range(4)]
    episodes = sdar.rollout(policy, environments, sdar.step_tasks(cfg, environments[0], 0), cfg, seed=5)
    episodes[1].won = True
    return episodes


@pytest.fixture
def rows(policy, played, skills):
    return [dataclasses.replace(row) for row in sdar.make_rows(policy, config(), played, skills)[0]]


class Scripted:
    """An engine that says act(env) for the environment of every prompt that waits."""

    def __init__(self, chat, act, calls):
        self.chat, self.act, self.calls, self.waiting = chat, act, calls, []

    def submit(self, key, prompt, noise):
        self.waiting.append(key)

    def __len__(self):
        return len(self.waiting)

    def step(self):
        keys, self.waiting = self.waiting, []
        self.calls.append(len(keys))
        end = (self.chat.tokenizer.eos_token_id,)
        ids = [self.chat.encode(f"<think>so</think>{self.act(key[0].env)}") + end for key in keys]
        return [(key, sdar.Response(i, (-0.5,) * len(i), "end")) for key, i in zip(keys, ids)]


def script(monkeypatch, act, plain=False):
    """From now on every response is the action act(env), or if plain that text -> the sizes of the batches to come."""
    calls, say = [], act if plain else lambda env: f"<action>{act(env)}</action>"
    monkeypatch.setattr(sdar.Policy, "engine", lambda policy, cfg, temperature: Scripted(policy.chat, say, calls))
    return calls


def flags(model_folder, folder, **changes):
    """The command line of a run of four short steps; a change to None leaves a flag out."""
    values = {"model": model_folder, "out": folder, "tasks": 2, "group_size": 2, "max_turns": 3,
              "max_response_tokens": 6, "max_prompt_tokens": 600, "lr": 0.01, "eval_every": 2, "eval_tasks": 2,
              "save_every": 1, "steps": 4, "threads": 1, "prompt": "short"} | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def refused(program, arguments, culprit, capsys):
    """The program ends with status 2 and one sentence on standard error that names the culprit."""
    capsys.readouterr()
    status = program(arguments)
    other = "Loading weights", "step/s", "s/step", "shards:", "warning: "
    error = [line for line in capsys.readouterr().err.splitlines()
             if line.strip() and not any(text in line for text in other)]
    assert status == 2 and len(error) == 1 and error[0].startswith("error: "), error
    assert culprit in error[0] and error[0].endswith((".", "]")) and "Traceback" not in error[0], error[0]


def own_logp(model, prompt, response, temperature=1.0, whole=False):
    """Log-probs of a response, or of all tokens at each of its places, by the model's own logits, one by one."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logp = (model(ids).logits[0, len(prompt) - 1:-1] / temperature).log_softmax(-1)
    return logp if whole else logp.gather(1, ids[0, len(prompt):, None])[:, 0]


def weights_of(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def lines_of(run):
    """metrics.jsonl without what measures time and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def assert_same_run(run, straight, checkpoint="checkpoint-4"):
    assert same(weights_of(run / checkpoint), weights_of(straight / checkpoint)) and lines_of(run) == lines_of(straight)


def interrupt_in(monkeypatch, module, name, call):
    """Presses Ctrl-C at the end of the call-th run of module.<name>, its work done but not yet noted."""
    function, calls = getattr(module, name), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it

    def pressed(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(module, name, pressed)


def written(folder, texts):
    """A new folder with these files, {name: text}."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


QUESTIONS = dict.fromkeys(("train.jsonl", "test.jsonl"), '{"question": "x?", "golden_answers": ["y"]}\n' * 2)
CORPUS = {"corpus.jsonl": '{"contents": "y"}\n'}
