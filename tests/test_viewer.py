"""Tests of the page of episodes: what it holds, that text in it stays text, and what a browser makes of it."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import envs
import sdar
from conftest import flags, own_logp
from lib.episodes import episode_lines, note_top, step_file, top_tokens
from lib.program import UserError, printable
from lib.viewer import TEMPLATE, token_text, write_page

HOSTILE = ["</script><script>document.title = 'owned'</script>", "<img src=x onerror=\"document.title = 'owned'\">",
           "<!--<script>", "&lt;", "\u2028", "\u202eback\u2066", "\x1b[31mred", "\x00", "\ud800"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def turn(names, **changes):
    n = len(names)
    top = {"student": [[[name, -0.5], ["b", -1.0]] for name in names], "teacher": [[["b", -0.1]]] * n}
    return {"prompt": "p", "observation": "o", "text": "".join(names), "valid": True, "stop": "end", "tokens": names,
            "logp": [-1.5] * n, "gap": [0.5 * (-1) ** i for i in range(n)], "gate": [0.5] * n, "top": top} | changes


def episode(*turns, **changes):
    return {"task": "find", "task_id": 3, "task_type": "rugs", "split": "train", "won": False, "score": 0.5,
            "done": True, "skills": "look", "turns": turns} | changes


def made(folder, *episodes):  # -> path of the page
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in episodes))
    return write_page(folder / "some.jsonl")


def parsed(path):
    """The tags of a page, and its data, {id: value}."""
    parser, tags, texts = HTMLParser(), [], {}
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes).get("id")))
    parser.handle_data = lambda text: texts.setdefault(tags[-1] if tags else None, text)
    parser.feed(path.read_text(encoding="utf-8"))
    texts = {name: texts["script", name] for tag, name in tags if tag == "script" and name}
    index = json.loads(texts.pop("index", "null"))
    return [tag for tag, _ in tags], index, [json.loads(gzip.decompress(base64.b64decode(x))) for x in texts.values()]


def test_the_likeliest_tokens_are_those_of_the_whole_distribution_however_few_logits_are_held():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5), torch.randn(11, 5)
    known = (hidden @ weight.T / 0.7).log_softmax(-1).topk(3)
    for most in (1, 25, 2**24):
        ids, logp = top_tokens(hidden, weight, temperature=0.7, most_logits=most)
        assert torch.equal(ids, known.indices) and torch.allclose(logp, known.values, atol=1e-5)
    assert top_tokens(hidden, weight[:2])[0].shape == (7, 2)


def test_a_file_names_the_likeliest_tokens_of_rows_that_ask_for_them_and_leaves_rare_ones_out(policy, played, rows):
    for row in rows[:-1]:
        row.top = {}
        note_top("teacher", [row], *sdar.head_inputs(policy, policy.model, sdar.pack_rows(policy, [[row]], True)), 0.1)
    lines = map(json.loads, episode_lines(policy.chat, envs.READABLE["webshop"], played, rows=rows))
    *entries, last = [entry for one in lines for entry in one["turns"]]
    assert "top" not in last and {len(some) for one in entries for some in one["top"]["teacher"]} == {1, 2, 3}
    for row, entry in zip(rows, entries):
        known = own_logp(policy.model, row.teacher_ids, row.response_ids, 0.1, whole=True).topk(3)
        for found, ids, logps in zip(entry["top"]["teacher"], known.indices.tolist(), known.values.tolist()):
            likely = [k for k in range(3) if logps[k] >= -6.9077]
            assert [name for name, _ in found] == policy.chat.tokenizer.convert_ids_to_tokens([ids[k] for k in likely])
            assert [logp for _, logp in found] == pytest.approx([logps[k] for k in likely], abs=1e-3)


@pytest.mark.parametrize("teacher", ["live", "ref", "none"])
def test_the_files_of_a_run_that_stay_have_the_alternatives_of_student_and_teacher(teacher, model_folder, tmp_path):
    change = {"method": "grpo"} if teacher == "none" else {"teacher": teacher}
    assert sdar.main(flags(model_folder, tmp_path, episodes_every=2, eval_every=0, eval_tasks=None, **change)) == 0
    _, index, parts = parsed(write_page(tmp_path))
    assert [part["name"] for part in index["parts"]] == ["step 1", "step 3", "step 4"]
    for t in [t for part in parts for e in part["episodes"] for t in e["turns"]]:
        sides = {"student": t["logp"], "teacher": [sum(pair) for pair in zip(t["logp"], t["gap"])]}
        hits = [abs(dict(zip(some[::2], some[1::2])).get(name, logp) - logp) for side, logps in sides.items()
                for name, some, logp in zip(t["tokens"], t[side], logps)]
        assert len(hits) == len(t["tokens"]) * (1 if teacher == "none" else 2) and max(hits) <= 3  # thousandths
    assert parsed(write_page(step_file(tmp_path, 3)))[2] == parts[1:2]


def test_hostile_text_adds_no_element_and_stays_text(tmp_path):
    whole = "\n".join(HOSTILE)
    evil = episode(turn(HOSTILE, observation=whole), task=whole, task_type=whole, skills=whole)
    (tags, _, [part]), (ours, *_) = parsed(made(tmp_path / "<" / "script><img src=x>", evil)), parsed(TEMPLATE)
    assert tags == ours[:-1] + ["script"] * 3 and part["strings"][:len(HOSTILE)] == [*map(printable, HOSTILE)]
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\"" in TEMPLATE.read_text()
    assert not re.search(r"https?:|\b(src|href)=|url\(|fetch\(|HTML\b|\.write\(|eval\(", TEMPLATE.read_text()[100:])


def test_episodes_of_an_evaluation_and_of_older_files_open_too(tmp_path):
    old = {"task": "", "won": True, "score": 1, "turns": [dict(observation="", text="a\nb", valid=True, stop="end")]}
    _, _, [part] = parsed(made(tmp_path, old, episode(turn(["x"], gap=[], gate=[], top={}), condition="with")))
    (first,), (second,) = (one["turns"] for one in part["episodes"])
    assert ([part["strings"][i] for i in first["text"]], second["logp"], second["text"]) == (["a", "b"], [-1500], [])


@pytest.mark.parametrize("changes, why", [
    ({"top": {"student": [[["a"]]]}}, "student of turn 1 of episode 1 is"), ({"gate": [1, 1]}, "2 entries for 1"),
    ({"tokens": [3]}, "tokens of turn 1"), ({"top": []}, "top of turn 1"), ({"logp": ["a"]}, "logp of turn 1")])
def test_lists_that_do_not_fit_the_tokens_are_refused_by_name(changes, why, tmp_path):
    with pytest.raises(UserError, match=why):
        made(tmp_path, episode(turn(["a"], **changes)))


def test_a_page_replaces_only_a_page(tmp_path):
    assert made(tmp_path, episode(turn(["a"]))) == made(tmp_path, episode(turn(["b"]))) == tmp_path / "some.html"
    (tmp_path / "notes.html").write_text("mine")
    for source, out, why in (("some.jsonl", "notes.html", "not a page"), ("some.jsonl", "none/x.html", "no folder"),
                             ("some.jsonl", ".", "a folder"), (".", "new.html", "--view RUN")):
        with pytest.raises(UserError, match=why):
            write_page(tmp_path / source, tmp_path / out)


def test_tokens_are_shown_as_the_text_that_they_stand_for():
    names = {"Ġa": " a", "Ċ": "\n", "Ã©": "é", "âĢ": r"\xe2\x80", "<｜end｜>": "<｜end｜>"}
    assert {name: token_text(name, True) for name in names} == names and token_text("\u2581aĠ", False) == " aĠ"


def test_128_episodes_of_eight_turns_of_120_tokens_fit_in_ten_megabytes(tmp_path):
    draw = lambda n: [f"Ġ{i:x}" for i in torch.randint(20_000, (n,)).tolist()]
    some = lambda n=120: torch.rand(n).tolist()
    top = lambda: {side: [[*zip(draw(k), some(k))] for k in [1, 3, 1] * 40] for side in ("student", "teacher")}
    turns = [turn(draw(120), logp=some(), gap=some(), gate=some(), prompt=" \n".join(draw(300)), top=top())
             for _ in range(32)]
    assert made(tmp_path, *(episode(*turns[i::4]) for i in range(4))).stat().st_size < 10e6 * 4 / 128


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_colours_the_tokens_by_the_sign_of_the_gap_and_runs_no_text(tmp_path):
    page = made(tmp_path, episode(turn([*HOSTILE, "Ġx"])))
    switches = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
                f"disable-component-update virtual-time-budget=5000 dump-dom user-data-dir={tmp_path / 'profile'}")
    command = [CHROMIUM, *(f"--{switch}" for switch in switches.split()), page.as_uri()]
    dom = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60).stdout
    said = dom[dom.index('<div class="said">'):]
    assert said.count('class="token plus"') == said.count('class="token minus"') == (len(HOSTILE) + 1) / 2
    assert "<img" not in dom and f"<title>Episodes of {tmp_path}" in dom and "&lt;img src=x onerror=" in said
