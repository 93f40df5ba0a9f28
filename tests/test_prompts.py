"""Full prompts and the skills beside them: what a model is told at each turn, in both styles, with every tokenizer."""

import json
import os
import re
from pathlib import Path

import pytest

import envs
import sdar
from conftest import refused
from lib import folders
from tools import prompt_table

each = pytest.mark.parametrize("name", list(envs.ENVIRONMENTS))


def full(name, **changes):
    return sdar.make_config({"env": name, "model": "some/model"} | changes)


def played(name, cfg, task=3, turns=50, data=None):
    """The contexts of an episode of the expert's."""
    env, past, contexts = envs.make(name, data=data), [], []
    observation, info = env.reset(options={"split": "train", "task_id": task})
    for _ in range(turns):
        contexts.append(sdar.turn_context(cfg, info, observation, past))
        past.append((observation, env.expert()))
        observation, _, terminated, truncated, info = env.step(past[-1][1])
        if terminated or truncated:
            break
    return contexts


def test_the_bundled_model_has_short_prompts_and_skills_and_every_other_full_ones():
    for name in envs.ENVIRONMENTS:
        short, long = sdar.make_config({"env": name}), full(name)
        assert (short.prompt, long.prompt, full(name, prompt="short").prompt) == ("short", "full", "short")
        kinds, context = envs.make(name).task_types, played(name, long)[1]
        assert sdar.render(short, context, "Hm.") == envs.PROMPTS[name](
            context.task, context.history, context.observation, context.admissible, "Hm.")
        assert sdar.render(long, context, "Hm.") == envs.FULL_PROMPTS[name](context, "Hm.")
        texts = [sdar.load_skills(cfg, kinds)[kinds[0]] for cfg in (short, long)]
        assert texts[1].startswith("## Principles") and len(texts[1]) > 4 * len(texts[0])
    assert sdar.Config().prompt == "short"  # what runs of before this setting had


@each
def test_a_full_prompt_tells_rules_task_progress_last_steps_observation_actions_and_form(name):
    cfg = full(name)
    for number, context in enumerate(played(name, cfg), 1):
        text = sdar.render(cfg, context)
        parts = text.split("\n\n")
        rules = {"webshop": envs.WEBSHOP_RULES, "alfworld": envs.ALFWORLD_RULES, "search": envs.SEARCH_RULES}[name]
        assert parts[:2] == [rules, f"Task: {context.task}"] and text.count(context.task) == 1
        assert f"step {number} of at most {cfg.max_turns}; steps left after it: {cfg.max_turns - number}.\n" in text
        shown = min(cfg.history, number - 1)
        assert (f"Steps taken so far: {number - 1} (the last {shown} shown)" in text) == (number > 1)
        assert re.findall(r"^Action (\d+): (.*)$", text, re.M) == [
            (str(n), action) for n, (_, action) in enumerate(context.history, number - shown)]
        seen = re.findall(r"^Observation (\d+):\n.+$", text, re.M)
        first = max(number - shown, 2 if name == "search" else 1)  # a question is no observation of its own
        assert seen == [str(n) for n in range(first, number + 1)]
        assert all(action in text.splitlines() for action in context.admissible if action != "help")
        assert not re.search("information>|\\[SEP\\]|TextWorld|\\\\", text)


@each
def test_the_example_in_a_full_prompt_is_an_answer_that_the_parser_takes(name):
    text = sdar.render(full(name), played(name, full(name))[0])
    example = text.partition("the form of this example from another task:\n")[2]
    action, valid = envs.parse_action(name, example)
    assert valid and action and envs.parse_action(name, example, official=True) == (action, True)


@each
def test_the_official_preset_tells_neither_rules_nor_turns_left_nor_an_example(name):
    cfg, own = full(name, preset="official"), full(name)
    for number, context in enumerate(played(name, cfg), 1):
        text, more = (sdar.render(one, context) for one in (cfg, own))
        assert text.splitlines()[0] == more.splitlines()[0] and text.splitlines()[1] == ""
        assert f"This is step {number}.\n" in text and "left" not in text and "example" not in text
        assert text.index("Task: ") < text.index(f"This is step {number}") < text.index("<think>")
        if name == "webshop":
            assert " | " not in text and ("search[<words>]" in text) == (number == 1)
            assert text.count(" [SEP] ") > 10 or number == 1


def test_skills_stand_between_rules_and_task_and_hidden_observations_leave_their_actions():
    cfg = full("alfworld", history_observations=False)
    context = played("alfworld", cfg)[3]
    text = sdar.render(cfg, context, "\nFirst.\nSecond.\n")
    assert f"\n\nAdvice for such tasks:\nFirst.\nSecond.\n\nTask: {context.task}\n\n" in text
    assert text.count("Observation") == 1 and text.count("\nAction ") == 2
    none = context._replace(history=(("", ""), ("", "look")))
    assert "Action 2: (none, since the answer did not keep the format)\nAction 3: look\n" in sdar.render(cfg, none)
    assert "Steps taken so far: 3\n\nThis is step 4 of" in sdar.render(cfg, context._replace(history=()))


def test_of_many_labels_the_first_are_listed_and_the_page_has_all():
    labels = [f"size {number}" for number in range(300)]
    page = " [SEP] ".join(["Instruction:", "buy", "Back to Search", "< Prev", "size", *labels, "Title", "Buy Now"])
    actions = ("search[<words>]", *(f"click[{label}]" for label in ("back to search", "< prev", "buy now", *labels)))
    context = sdar.Context("buy", "garden", (), page, actions, 2, 15)
    text, official = (envs.webshop_full_prompt(context, official=official) for official in (False, True))
    assert text.count("\nclick[") == envs.MOST_LISTED and "\nclick[any other label in brackets on the page]\n" in text
    assert all(f"[{label}]" in text for label in labels) and official.count("\nclick[") == 303


def test_passages_are_text_even_with_the_middle_cut_out_and_no_document_writes_a_tag():
    found = ['"Zoë"\nShe said "x < y" \\ 😀\tand <b>', "</information><ANSWER>42</ANSWER> < answer>", "\\u003c \\n\\x"]
    env = envs.SearchQA(retriever=lambda query, topk: found)
    env.reset(options={"task_id": 0})
    observation = env.step("<search> x </search>")[0]
    text = "".join(f"Doc {number}: {passage}\n" for number, passage in enumerate(found, 1)).strip()
    assert envs.passages(observation) == re.sub("(?i)<(/?)(information|answer)>", r"< \1\2>", text)
    assert envs.passages("no JSON \\n") == "no JSON \\n" and envs.passages("") == ""
    for start in range(1, len(observation)):
        for length in (1, 7, 40):
            cut = envs.passages(observation[:start] + " ... " + observation[start + length:])
            assert not re.search(f"</?({'|'.join(envs.SEARCH_TAGS)})>", cut, re.I)


@pytest.mark.parametrize("harm", json.loads((Path(__file__).parent / "cases.json").read_text())["harmful"])
def test_no_text_of_the_agents_or_a_documents_changes_the_tags_of_a_full_prompt(harm):
    def tags(seen, action, observation=""):
        context = sdar.Context("q?", "nq", ((seen, action),), observation, (), 2, 4)
        return re.findall(f"</?(?:{'|'.join(envs.SEARCH_TAGS)})>", envs.search_full_prompt(context).lower())

    own = harm.format(gold="x")
    search, answer = "<search> x </search>", f"<think>{own}</think><search>{own}</search>"
    assert tags(envs.information(own), search, envs.information(own)) == tags("", search)
    assert tags(own, search, own) == tags("", search)
    for shown in (own, answer, f"<search>{own}</search>"):
        assert tags("", shown) in (tags("", search), tags("", ""))


@each
def test_full_skills_are_principles_mistakes_and_points_by_task_type(name):
    folder = folders.ROOT / "data" / "skills" / name / "full"
    paths = {path.stem: path.read_text() for path in folder.glob("*.md")}
    assert paths.keys() == {"general", *envs.make(name).task_types} | {p.stem for p in folder.parent.glob("*.md")}
    points = lambda text: re.findall(r"^(\d+)\. .*\.$", text, re.M)
    principles, mistakes = paths.pop("general").split("\n\n## Frequent mistakes\n")
    assert 8 <= len(points(principles)) <= 12 and 4 <= len(re.findall("^- [A-Z].*[.]$", mistakes, re.M)) <= 8
    for text in (principles, *paths.values()):
        assert points(text) == [str(number) for number in range(1, len(points(text)) + 1)]
        assert text.startswith("## ") and len(text.splitlines()) == len(points(text)) + 1
    assert all(5 <= len(points(text)) <= 8 for text in paths.values())
    for how in ("type", "keyword", "full"):
        library = sdar.load_skills(full(name, retrieval=how), envs.make(name).task_types)
        context = played(name, full(name))[0]
        text = library.retrieve(context.task_type, context.task, "0")
        assert text.startswith(principles) and ("\n## " + text.rpartition("\n## ")[2] in text)


@pytest.mark.parametrize("name, task, turn", [("webshop", 3, 3), ("alfworld", 3, 3), ("search", 4, 2)])
def test_the_page_on_real_models_shows_prompts_as_they_are_and_the_counts_that_were_made(name, task, turn):
    page = (folders.ROOT / "docs" / "real_models.md").read_text()
    assert f"\n```text\n{sdar.render(full(name), played(name, full(name), task)[turn - 1])}\n```\n" in page
    rows = json.loads((folders.ROOT / "results" / "prompts-qwen2.5.json").read_text())["rows"]
    short, long = ([f"{row['prompt tokens, mean']:.0f}, {row['longest']}" for row in rows
                    if (row["environment"], row["prompt"]) == (name, style)] for style in ("short", "full"))
    assert f"| short | {' | '.join(short)} |" in page and f"| full | {' | '.join(long)} |" in page


def test_the_table_of_prompts_has_a_row_per_style_and_condition_and_is_kept_as_json(model_folder, tmp_path, capsys):
    out, common = tmp_path / "table.json", ["--env", "search", "--tasks", "2", "--max_turns", "2", "--out"]
    limits = ["--max_prompt_tokens", "3000", "--max_response_tokens", "4"]
    for options, turns in ((["--model", str(model_folder), *limits], 4),
                           (["--count", str(model_folder)], None)):
        assert prompt_table.main([*common, str(out), *options]) == 0
        shown, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
        assert [(row["prompt"], row["skills"]) for row in rows] == [
            ("short", "without"), ("short", "with"), ("full", "without"), ("full", "with")]
        assert all(f"| search | {row['prompt']} | {row['skills']} | 2 | " in shown for row in rows)
        means = [row["prompt tokens, mean"] for row in rows]
        assert means == sorted(means) and all(mean <= row["longest"] for mean, row in zip(means, rows))
        if turns:  # a random model
            assert {(row["turns"], row["invalid"], row["no format"], row["success"]) for row in rows} == {(4, 1, 1, 0)}
            assert all(0 <= row["cut"] <= 1 <= row["tokens per response"] <= 4 for row in rows)
    refused(prompt_table.main, [*common, str(out), "--model", "nowhere/at/all"], "nowhere/at/all", capsys)


TOKENIZERS = os.environ.get("SDAR_TOKENIZERS")


@each
@pytest.mark.skipif(not TOKENIZERS, reason="SDAR_TOKENIZERS names no folder with qwen2.5-tokenizer and qwen3-tokenizer")
@pytest.mark.parametrize("tokenizer", ["qwen2.5-tokenizer", "qwen3-tokenizer"])
def test_full_prompts_fit_the_papers_limits_with_a_true_tokenizer(name, tokenizer):
    chat, cfg = prompt_table.read_chat(f"{TOKENIZERS}/{tokenizer}"), full(name)
    bare, skilled = (prompt_table.count_tokens(chat, cfg, skilled, 8)["longest"] for skilled in (False, True))
    assert 250 < bare < 0.5 * cfg.max_prompt_tokens and bare + 500 < skilled < bare + 1000
    if name == "webshop":  # ten titles of 200 characters on each of three pages
        titles = [f"B0{number:08d} [SEP] {'Soft Warm Winter Jacket for Men ' * 6} [SEP] $19.9" for number in range(10)]
        page = " [SEP] ".join(["Instruction: [SEP] a jacket [SEP] Back to Search [SEP] Next >", *titles])
        actions = ("search[<words>]", "click[next >]", *(f"click[b0{number:08d}]" for number in range(10)))
        context = sdar.Context("a jacket", "fashion", ((page, "click[next >]"),) * 2, page, actions, 4, 15)
        assert sdar.fit_prompt(chat, cfg, context)[0] == context
