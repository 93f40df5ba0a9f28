"""A model behind an OpenAI-compatible server, POST /v1/chat/completions: vllm, transformers serve, or a hosted one.

Whatever goes wrong there is counted and reported, and ends nothing, unless the first request fails or the server stops
answering. A server has sampling defaults of its own, mostly the model's generation_config.json: transformers serve is
greedy at any temperature where that has no do_sample. The key comes from OPENAI_API_KEY; no file or message shows it.
"""

import contextlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

from lib.engine import Response
from lib.program import UserError, without_secrets
from lib.retrieval import NoRedirect, TimedHandler, is_this_host, retry_after, split_address

TIMEOUT = 120.0  # seconds for one try
TRIES = 4  # of a request, if the server is busy, does not answer in time, or answers something else
PAUSE = 1.0  # seconds before the second try, then twice as many each time, or as many as the server asks for
LONGEST_PAUSE = 30.0
PARALLEL = 16  # requests at a time
GIVE_UP = 20  # requests in a row that have failed: then nothing works any more
ANSWER_LIMIT = 1 << 20  # bytes
PATIENCE = 0.05  # seconds that a step waits for an answer
BUSY = (408, 409, 425, 429)  # worth another try, as every status from 500 on

# Stands in for lib.models.Chat, since template and tokenizer are the server's: a text is one token.
PLAIN_CHAT = SimpleNamespace(encode=lambda text: (text,), prompt=lambda text: (text,), tokenizer=SimpleNamespace(
    decode="".join, convert_ids_to_tokens=list), response_text="".join)


class Answer(NamedTuple):
    text: str
    stop: str  # end, length, or error: there was no answer


class Failure(Exception):
    """A try without an answer. kind: for counting; again: whether another may help; wait: seconds that the server asks
    to wait, or None."""

    def __init__(self, kind, text, again=True, wait=None):
        super().__init__(text)
        self.kind, self.again, self.wait = kind, again, wait


class Endpoint:
    """The model of this name at url: http://host:8000, its /v1, or the whole address of chat/completions.
    key: bearer token, or None. max_tokens: of an answer. parallel: requests at a time. timeout: seconds for a try.
    Redirects are not followed. Raises UserError for an address or a key that cannot be used.
    """

    def __init__(self, url, model, key=None, *, max_tokens, parallel=PARALLEL, timeout=TIMEOUT):
        try:
            parts = split_address(url)
        except ValueError as error:
            raise UserError("--endpoint must be an address like http://127.0.0.1:8000/v1.") from error
        if parts.username is not None:
            raise UserError("--endpoint takes no user and password: put the key into OPENAI_API_KEY.")
        if key and not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY has characters that no key has, such as a line break: set it anew.")
        base = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/chat")
        path = (base or "/v1") + "/chat/completions"
        self.url = parts._replace(path=urllib.parse.quote(path, safe="/%")).geturl()
        self.shown, self.model, self.key, self.chat = without_secrets(self.url), model, key, PLAIN_CHAT
        self.max_tokens, self.parallel, self.timeout, self.lock = max_tokens, parallel, timeout, threading.Lock()
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        proxies = [urllib.request.ProxyHandler({})] if is_this_host(parts.hostname) else []
        self.opener = urllib.request.build_opener(TimedHandler, NoRedirect, *proxies)
        self.counts, self.failed_in_a_row, self.last_failure = Counter(), 0, ""

    def probe(self):
        """Asks once, and again only if the server is busy, so that a wrong address, key or model is noticed before
        anything is played. Raises UserError."""
        if self.answer("Hello", 0.0, 0, patient=False).stop == "error":
            raise UserError(f"{self.shown} does not answer as {self.model!r}: {self.last_failure}.")
        self.counts.clear()

    def engine(self, cfg, temperature):
        return EndpointEngine(self, temperature)

    def answer(self, prompt, temperature, seed, patient=True):
        """One request, tried again where that may help, or, if not patient, where the server asks for it -> Answer."""
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": prompt}], "seed": seed,
                           "max_tokens": self.max_tokens, "temperature": temperature, "top_p": 1.0}, ensure_ascii=False)
        body = body.encode("utf-8", "replace")
        for number in range(TRIES):
            try:
                answer = self.attempt(body)
            except Failure as failure:
                again = failure.again and (patient or failure.kind.startswith("status"))
                if again and number + 1 < TRIES:
                    self.note(f"tried again ({failure.kind})")
                    pause = PAUSE * 2 ** number if failure.wait is None else max(failure.wait, 0.0)
                    time.sleep(min(pause, LONGEST_PAUSE))
                    continue
                self.note(f"given up ({failure.kind})", self.failed_in_a_row + 1, str(failure))
                return Answer("", "error")
            self.note("answered", 0)
            return answer

    def note(self, what, failed_in_a_row=None, failure=None):
        with self.lock:
            self.counts[what] += 1
            self.failed_in_a_row = self.failed_in_a_row if failed_in_a_row is None else failed_in_a_row
            self.last_failure = failure or self.last_failure

    def attempt(self, body):
        """One try -> Answer. Raises Failure."""
        request = urllib.request.Request(self.url, body, self.headers)
        request.deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                data = reply.read(ANSWER_LIMIT + 1)
                if len(data) > ANSWER_LIMIT:
                    raise Failure("too long", f"an answer of more than {ANSWER_LIMIT} bytes", again=False)
                if reply.length:  # bytes that were announced and did not come
                    raise http.client.IncompleteRead(data, reply.length)
        except urllib.error.HTTPError as error:
            status, said = f"status {error.code}", ""
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError), error:
                said = self.masked(error.read(ANSWER_LIMIT))
            raise Failure(status, f"{status}, {said}" if said else status, error.code in BUSY or error.code >= 500,
                          retry_after(error.headers)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: of a host that is no name, or an
            reason = getattr(error, "reason", error)  # answer whose form is beyond what http.client and urllib read
            kind = "timed out" if isinstance(reason, TimeoutError) else "connection failed"
            raise Failure(kind, self.masked(str(reason).encode("utf-8", "replace")) or kind) from error
        try:
            return read_answer(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = self.masked(data) or type(error).__name__
            raise Failure("no chat completion", f"the answer is not a chat completion: {said}") from error

    def masked(self, said):
        """The beginning of what a server said, bytes, in which the key is ***."""
        text = " ".join(said.decode("utf-8", "replace").split())
        return (text.replace(self.key, "***") if self.key else text)[:300]


class EndpointEngine:
    """lib/engine.py's interface to a server. step waits PATIENCE for an answer. Raises UserError where no request is
    answered, or GIVE_UP in a row have failed."""

    def __init__(self, server, temperature):
        self.server, self.temperature = server, temperature
        self.asked, self.answers = 0, queue.SimpleQueue()
        self.free = threading.Semaphore(server.parallel)

    def submit(self, key, prompt, noise):
        """noise gives the request's seed, which the server may ignore."""
        self.asked += 1
        # not an executor, for whose threads the end of the program, and so Ctrl-C, would wait
        threading.Thread(target=self.request, args=(key, prompt[0], noise.getrandbits(31)), daemon=True).start()

    def request(self, key, prompt, seed):
        with self.free:
            lost = self.server.failed_in_a_row >= GIVE_UP
            self.answers.put((key, Answer("", "error") if lost else self.server.answer(prompt, self.temperature, seed)))

    def __len__(self):
        return self.asked

    def step(self):
        try:
            key, (text, stop) = self.answers.get(timeout=PATIENCE)
        except queue.Empty:  # the caller may have other work, such as searches that have ended
            return []
        self.asked -= 1
        server = self.server
        if server.failed_in_a_row >= GIVE_UP or not self.asked and not server.counts["answered"]:
            raise UserError(f"{server.shown} has stopped answering ({server.failed_in_a_row} requests in a row failed, "
                            f"the last one: {server.last_failure}): see to the server, then start the evaluation anew.")
        ids = (text, "") if stop == "end" else (text,)  # "" stands for the end-of-turn token
        return [(key, Response(ids, (), stop))]


def read_answer(data):
    """The bytes of a chat completion -> Answer. A thought that the server has taken out is put back. Raises one of
    several errors for other bytes."""
    choice = json.loads(data)["choices"][0]
    message, stop = choice["message"], "length" if choice.get("finish_reason") == "length" else "end"
    thought = message.get("reasoning_content") or message.get("reasoning")
    text = (f"<think>{thought}</think>" if thought else "") + (message.get("content") or "")
    return Answer(text.encode("utf-8", "replace").decode(), stop)  # without halves of surrogate pairs
