"""Tests of behaviour cloning (tools/clone.py) and of what makes the bundled model (tools/tiny.py)."""

import collections
import copy
import dataclasses
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import envs
import sdar
from conftest import (
    CORPUS, QUESTIONS, assert_same_run, interrupt_in, lines_of, own_logp, refused, same, weights_of, written)
from lib import experts, models
from tools import clone, measure, tiny


def clone_config(**changes):
    return clone.clone_config({"model": "tiny", "out": "x"} | changes)


@pytest.mark.parametrize("name", list(envs.ENVIRONMENTS))
def test_what_a_demonstration_says_is_read_back_and_skills_are_shown_to_the_expert_beside_weak_play_alone(name):
    rng, seen = random.Random(0), collections.Counter()
    for weak in (0.0, 0.5, 1.0):
        source = clone.make_source(clone_config(env=name, weak=weak))
        for _ in range(20):
            turns = clone.demonstrated_turns(source, rng)
            assert len(turns) <= 4 and len({skills for _, skills, _, _ in turns}) <= 1
            for _, skills, thought, action in turns:
                assert envs.parse_action(name, experts.write_answer(name, thought, action)) == (action, True)
                assert 1 <= len(thought.split()) <= 9 and (skills == "" or weak == 0.5)
                seen[weak, skills != ""] += 1
    assert seen[0.5, True] > 3 and seen[0.5, False] > 3 and seen[0.0, False] > 20 and seen[1.0, False] > 20


def test_cloning_lowers_the_experts_loss(policy):
    moving = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    cfg = clone_config(tokens=3000, lr=5e-3, steps=200, max_prompt_tokens=2048)
    lessons = clone.expert_lessons(policy.chat, clone.make_source(cfg))(50)
    assert 3000 <= clone.count_tokens(lessons) < 6000
    assert all(one.response_ids[-1] == policy.chat.tokenizer.eos_token_id for one in lessons)
    optimizer = sdar.make_optimizer(moving.model, cfg)
    losses = [clone.clone_step(moving, optimizer, cfg, lessons, 50)["clone/loss"] for _ in range(6)]
    own = torch.cat([own_logp(policy.model, one.prompt_ids, one.response_ids) for one in lessons]).mean().item()
    assert losses[0] == pytest.approx(-own, rel=1e-4) and losses[-1] < 0.8 * losses[0]


def clone_flags(out, **changes):
    values = {"out": out, "steps": 3, "tokens": 2000, "lr": 0.01, "threads": 1, "save_every": 1} | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def cloned_at_once_and_in_parts(program, folder, place, monkeypatch, **changes):
    """Two runs with the same end, the second one interrupted at (module, function, call) and resumed -> the first."""
    whole, parts = folder / "whole", folder / "parts"
    assert clone.main(clone_flags(whole, **changes), program) == 0
    with monkeypatch.context() as patch:
        interrupt_in(patch, *place)
        assert clone.main(clone_flags(parts, **changes), program) == 130
    assert clone.main(["--resume", str(parts)], program) == 0
    assert_same_run(parts, whole, "")
    return whole


def test_cloning_writes_a_model_folder_and_is_resumed_bit_for_bit(model_folder, tmp_path, monkeypatch, capsys):
    whole = cloned_at_once_and_in_parts(
        clone.clone, tmp_path, (clone, "clone_step", 2), monkeypatch, model=model_folder, max_prompt_tokens=2048)
    said = capsys.readouterr().out
    assert f"--model {whole}" in said and f"python -m tools.clone --resume {tmp_path / 'parts'}" in said
    assert [e["step"] for e in lines_of(whole)] == [1, 2, 3]
    assert not same(weights_of(whole), weights_of(model_folder))
    assert models.read_model(str(whole))[1].chat_template  # what sdar.py --model and eval.py load
    assert clone.main(["--resume", str(whole)]) == 0 and "is finished (3 steps)" in capsys.readouterr().out
    assert not models.is_bundled(whole) and models.is_bundled(models.TINY) and models.is_bundled("tiny")
    refused(clone.main, clone_flags(whole, model=model_folder, max_prompt_tokens=2048), f"--resume {whole}", capsys)
    refused(clone.main, ["--resume", str(whole), "--lr", "1"], "--lr 1.0 contradicts", capsys)
    for text in ("{", "[1]", "[" * 10**5):
        (whole / "clone.json").write_text(text)
        assert not models.is_bundled(whole) and not models.is_bundled("a\0b")


@pytest.mark.parametrize("changes, culprit", [
    ({"env": "chess"}, "--env 'chess'"), ({"weak": 1.5}, "--weak"), ({"skills": "x"}, "--weak 0 shows no skills"),
    ({"model": "nowhere/at/all"}, "nowhere/at/all"), ({"env": "search", "data": "rows"}, "No scripted player"),
    ({"max_prompt_tokens": 5}, "--max_prompt_tokens 5 is too small")])
def test_bad_input_of_cloning_is_one_sentence(changes, culprit, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rows", QUESTIONS | CORPUS)
    refused(clone.main, clone_flags("run", **{"model": model_folder} | changes), culprit, capsys)
    assert not Path("run").exists()


def test_short_memory_in_cloning_names_flags_of_cloning_alone(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clone, "clone_step", Mock(side_effect=MemoryError()))
    refused(clone.main, clone_flags(tmp_path / "run", model=model_folder),
            "not enough memory (MemoryError): lower --micro_tokens (now 4096, bounds an update). All whole", capsys)


@pytest.fixture(scope="module")
def new():
    """A small bundled model as it starts: its sources, model, chat and words."""
    sources = tiny.make_sources(clone.clone_config({"model": "tiny", "out": "x"}, tiny.TinyConfig))
    torch.manual_seed(0)
    model, tokenizer = tiny.new_model(sources, vocabulary=700, episodes=30)
    chat = models.Chat(tokenizer)
    return types.SimpleNamespace(sources=sources, model=model, chat=chat, words=tiny.Words(chat, sources, sample=60))


def test_an_untrained_models_first_heads_look_one_and_two_tokens_back(new):
    model = copy.deepcopy(new.model)
    model.set_attn_implementation("eager")
    attention = model(torch.randint(0, 700, (1, 300)), output_attentions=True).attentions[0][0]  # [heads, L, L]
    at = torch.arange(3, 300)
    for head, back in ((0, 1), (1, 2)):
        assert (attention[head, at].argmax(-1) == at - back).all() and attention[head, at, at - back].mean() > 0.9
    assert attention[2, at, at - 1].mean() < 0.2


def test_joined_variants_of_a_word_have_one_vector_apart_from_a_common_difference(new):
    model, tokenizer = copy.deepcopy(new.model), new.chat.tokenizer
    tiny.join_variants(model, tokenizer, 0)
    embedding, ids = model.get_input_embeddings().weight, tokenizer.get_vocab()
    known = [word for word in ids if "Ġ" + word in ids]
    differences = torch.stack([embedding[ids[word]] - embedding[ids["Ġ" + word]] for word in known])
    assert sorted(tiny.variants(tokenizer)) == sorted((ids["Ġ" + word], ids[word]) for word in known)
    assert len(known) >= 20 and (differences - differences[0]).abs().max() < 1e-6 < 1e-3 < differences.abs().max()


def test_the_new_tokenizer_keeps_labels_whole_and_is_the_same_after_saving_and_loading(new, tmp_path):
    new.model.save_pretrained(tmp_path)
    new.chat.tokenizer.save_pretrained(tmp_path)
    text = "[kora-limu] Lamp $20.97, 1024<think>use every detail</think><action>click[red] é\n</action>"
    for chat in (new.chat, models.Chat(models.read_model(str(tmp_path))[1])):
        assert chat.prompt(text) == new.chat.prompt(text) and chat.tokenizer.decode(chat.encode(text)) == text
    action = chat.encode("<action>click[black]</action>")
    assert holds(chat.encode("color [black] [red]"), action[action.index(chat.encode("click[")[-1]) + 1:-2])


def test_the_copy_task_repeats_a_stretch_of_the_prompt():
    for lesson in tiny.copy_task(range(700), random.Random(0), apart=20):
        stretch = lesson.prompt_ids[-1:] + lesson.response_ids
        assert len(stretch) >= 2 and holds(lesson.prompt_ids[:-1], stretch)


def test_substituted_words_are_the_same_ones_in_prompt_and_answer_and_all_else_stays(new):
    words, rng, changed = new.words, random.Random(0), 0
    lessons = [one for source in new.sources for _ in range(10) for one in clone.demonstrations(new.chat, source, rng)]
    for lesson in lessons:
        swapped = words.substitute(lesson, rng)
        before, after = lesson.prompt_ids + lesson.response_ids, swapped.prompt_ids + swapped.response_ids
        assert len(lesson.prompt_ids) == len(swapped.prompt_ids) and len(before) == len(after)
        other = dict(zip(before, after))
        assert tuple(other[number] for number in before) == after  # one token always becomes the same one
        moved = {number for number, to in other.items() if number != to}
        copied = words.words(lesson.response_ids) & words.words(lesson.prompt_ids)
        assert words.words(moved) <= copied - words.common and not moved & set(new.chat.tokenizer.added_tokens_decoder)
        assert all(other[a] in words.of and words.of[other[a]] == words.of[other[b]]
                   for a, b in words.of.values() if {a, b} <= moved)
        changed += bool(moved)
    assert changed > len(lessons) / 4


COPIED = {"alfworld": r"<think>( \w+) (?:found|missing|inside|elsewhere|away|reached|closed)",
          "search": r"<think>( [^,:]+)(?:: | no,| \d+,)", "webshop": r"use every detail.*search\[an?( [^]]+)"}
holds = lambda ids, part: any(ids[i:i + len(part)] == part for i in range(len(ids)))


def test_what_an_answer_copies_is_the_same_tokens_as_in_the_prompt_and_not_a_common_word(new):
    chat, rng = new.chat, random.Random(0)
    for source in new.sources:
        lessons = [lesson for _ in range(20) for lesson in clone.demonstrations(chat, source, rng)]
        found = [(one, re.search(COPIED[source.cfg.env], chat.tokenizer.decode(one.response_ids))) for one in lessons]
        copies = [(lesson, chat.encode(match[1])) for lesson, match in found if match]
        assert len(copies) >= 5
        assert all(holds(lesson.prompt_ids, ids) and holds(lesson.response_ids, ids) for lesson, ids in copies)
    common = {chat.tokenizer.decode([number]).strip() for word in new.words.common for number in word}
    assert {"Task", "go", "click", "1", "search"} <= common and not {"spatula", "laptop", "lavender"} & common


def test_a_whole_lesson_is_predicted_from_its_first_token_on_with_prompts_at_a_tenth(policy):
    lessons = [tiny.whole(clone.Lesson((5, 6, 7), (8, 9), [1.0, 1.0])), tiny.whole(clone.Lesson((5, 6), (9,), [1.0]))]
    assert [(one.prompt_ids, one.response_ids) for one in lessons] == [((5,), (6, 7, 8, 9)), ((5,), (6, 9))]
    assert [one.weights for one in lessons] == [[0.1, 0.1, 1, 1], [0.1, 1]]
    moving = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    optimizer = torch.optim.SGD(moving.model.parameters(), lr=0)
    found = clone.clone_step(moving, optimizer, clone_config(), lessons, 0)["clone/loss"]
    own = [own_logp(policy.model, one.prompt_ids, one.response_ids) for one in lessons]
    assert found == pytest.approx(-(own[0][2:].sum() + own[1][1]).item() / 3, rel=1e-5)


@pytest.mark.slow
def test_a_new_models_batches_are_the_same_in_every_process():
    code = ("import sdar\n"
            "from tools import clone, tiny\n"
            "cfg = clone.clone_config({'model': 'tiny', 'out': 'x', 'steps': 100}, tiny.TinyConfig)\n"
            "sources = tiny.make_sources(cfg)\n"
            "model, tokenizer = tiny.new_model(sources, vocabulary=1500, episodes=200)\n"
            "policy = sdar.Policy(model, sdar.models.Chat(tokenizer), frozenset(), 'cpu', False)\n"
            "lessons_of = tiny.curriculum(policy, cfg, sources, tiny.Words(policy.chat, sources, sample=60))\n"
            "print([(one.prompt_ids, one.response_ids) for step in (9, 10, 30, 90) for one in lessons_of(step)])")
    seen = [subprocess.run([sys.executable, "-c", code], cwd=Path(sdar.__file__).parent, capture_output=True, text=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert seen[0].stdout == seen[1].stdout and len(seen[0].stdout) > 10000, seen[0].stderr


@pytest.mark.slow
def test_the_program_makes_a_small_model_and_resumes_after_the_copy_task(tmp_path, monkeypatch):
    make = tiny.new_model
    monkeypatch.setattr(tiny, "new_model", lambda sources: make(sources, vocabulary=600, episodes=10))
    changes = {"steps": 12, "tokens": 1000, "save_every": 5}
    joining = tiny, "draw_demonstrations", 1  # in the step that has joined the variants of a word
    whole = cloned_at_once_and_in_parts(tiny.make_tiny, tmp_path, joining, monkeypatch, **changes)
    assert sdar.make_config({"model": str(whole)}).lr == sdar.make_config({"model": "tiny"}).lr  # its defaults


def test_the_steps_that_are_timed_beside_trl_run_as_they_stand(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLES", 16)
    assert len(measure.sdar_steps(1)) == 1
