"""A page to look into episodes: one HTML file that needs nothing but a browser.

The page is lib/viewer.html with data put in: an index, and a block of compressed JSON for each file of episodes (a run
has one per dumped step), of which the browser reads the chosen one. A block has a table of its strings; prompts are in
it line by line, since a line returns in turn after turn. Log-probs, gaps and gates are whole thousandths.
"""

import base64
import gzip
import json
from pathlib import Path

from lib.episodes import find_episodes, read_episodes, step_file, steps_written
from lib.program import UserError, check_regular, is_of_kind, printable, write_atomically

TEMPLATE = Path(__file__).with_name("viewer.html")
START = 60  # bytes at the start of the template by which a page of ours is known


def write_page(source, out=None):
    """Writes the page of a run folder, a result of eval.py or a file of episodes -> its Path, by default beside it.
    Raises UserError if there are no episodes, or where the page would replace another kind of file."""
    files, source, template = find_files(source), Path(source), TEMPLATE.read_text(encoding="utf-8")
    out = Path(out or (source / "episodes.html" if source.is_dir() else source.with_suffix(".html")))
    check_regular(out, "choose another with --out")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} for the page: make it, or choose another with --out.")
    if out.exists() and out.read_bytes()[:START] != template.encode()[:START]:
        raise UserError(f"{out} is not a page of episodes: choose another file with --out.")
    parts, blocks = [], []
    for name, path in files:
        episodes = list(read_episodes(path))
        parts.append({"name": name, "episodes": len(episodes), "won": sum(bool(one["won"]) for _, one in episodes)})
        blocks.append(compressed(pack(episodes)))
    index = json.dumps({"source": printable(str(source)), "parts": parts}).replace("<", "\\u003c")  # no text ends it
    data = [f'<script type="application/json" id="index">{index}</script>',
            *(f'<script type="text/plain" id="part-{n}">{text}</script>' for n, text in enumerate(blocks))]
    write_atomically({out: template.replace("<!-- data -->", "\n".join(data))})
    return out


def find_files(source):
    """-> [(what the page calls it, file of episodes), ..]"""
    steps = steps_written(source) if Path(source).is_dir() else []
    if steps:
        return [(f"step {number}", step_file(source, number)) for number in steps]
    path = find_episodes(source, flag="--view")
    return [(path.stem, path)]


def compressed(value):
    """A value as JSON, gzipped, in base64; equal values give equal text."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


class Strings(dict):
    """{text: its number}; a text that is not there yet gets the next number."""

    def __missing__(self, text):
        self[text] = len(self)
        return self[text]

    def lines(self, text):
        """The numbers of a text's lines, in which control characters are escaped."""
        return [self[line] for line in printable(str(text)).split("\n")]


def pack(episodes):
    """(number, episode as read) of a file -> its episodes and their table of strings, JSON-ready."""
    strings, numbers = Strings(), {}
    names = {name for _, one in episodes for turn in one["turns"] for name in turn.get("tokens", [])}
    byte_level = any(name[:1] in ("Ġ", "Ċ") for name in names)

    def token(name):
        if name not in numbers:
            numbers[name] = strings[printable(token_text(name, byte_level))]
        return numbers[name]

    return {"episodes": [pack_episode(number, episode, strings, token) for number, episode in episodes],
            "strings": list(strings)}


def pack_episode(number, episode, strings, token):
    plain = ("task", "task_id", "task_type", "split", "condition")
    words = {key: printable(str(episode.get(key, ""))) for key in plain}
    return words | {"number": number, "won": bool(episode["won"]), "score": episode["score"],
                    "done": bool(episode.get("done")), "skills": strings.lines(episode.get("skills", "")),
                    "turns": [pack_turn(turn, strings, token) for turn in episode["turns"]]}


def pack_turn(turn, strings, token):
    tokens, advantage = [token(name) for name in turn.get("tokens", [])], turn.get("advantage")
    packed = {key: strings.lines(turn.get(key, "")) for key in ("observation", "prompt", "skills")}
    packed |= {"text": [] if tokens else strings.lines(turn["text"]), "tokens": tokens, "valid": turn["valid"],
               "cut": turn["stop"] == "length", "advantage": advantage if is_of_kind(advantage, (int, float)) else None}
    for key in ("logp", "gap", "gate"):
        packed[key] = list(map(thousandths, turn.get(key, [])))
    for side in ("student", "teacher"):  # [token, log-prob, token, log-prob, ..] of each token
        packed[side] = [[x for name, logp in some for x in (token(name), thousandths(logp))]
                        for some in turn.get("top", {}).get(side, [])]
    return packed


def thousandths(x):
    return round(1000 * max(-999, min(x, 999)))


SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that byte-level BPE writes as themselves
BYTES = {chr(byte): byte for byte in SHOWN} | {
    chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*SHOWN}))}


def token_text(name, byte_level):
    """A token's text, from its name in the vocabulary of byte-level BPE (GPT-2, Qwen) or of SentencePiece."""
    if not byte_level:
        return name.replace("\u2581", " ")
    if not set(name) <= BYTES.keys():  # a special token
        return name
    return bytes(BYTES[c] for c in name).decode("utf-8", "backslashreplace")  # half a character: \xe2
