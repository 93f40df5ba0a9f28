"""Engines that generate responses: prompts are submitted at any time, and finished responses collected.

An engine has three methods:

    submit(key, prompt, noise)     prompt: ids; noise: this response's random.Random; key: whatever comes back with it
    step() -> [(key, Response)]    a token more of each response in progress -> those that have ended, often none
    len(engine)                    responses that were submitted and have not come back
"""

import inspect
import random
from collections import deque
from typing import NamedTuple

import torch

from lib import models, progress

SHARE = 1 / 8  # of all places: a prefill, which holds up the others, waits until so many prompts can join at once
PREFILL = 2**16  # most prompt tokens, padding included, that are computed at once: their activations take memory


class Response(NamedTuple):
    """A sampled response. The losses compute its log-probs anew, with the trainer's arithmetic."""

    ids: tuple
    logp: tuple  # of the sampled tokens, at the sampling temperature (at 1 if greedy)
    stop: str  # "end", "length", or "error": a server has failed to give one


class InProgress(NamedTuple):
    """A response that is being generated."""

    key: object
    prompt: tuple  # ids
    noise: random.Random
    ids: list  # sampled so far
    logp: list


def respond(engine, prompts, noises):
    """prompts: id tuples, and each one's random.Random -> a Response each."""
    for number, (prompt, noise) in enumerate(zip(prompts, noises)):
        engine.submit(number, prompt, noise)
    found = {}
    while len(engine):
        found |= engine.step()
    return [found[number] for number in range(len(prompts))]


class TorchEngine:
    """Continuous batching: a response that ends leaves its place to a prompt that waits.

    At most cfg.rollout_batch responses are in progress. Equal prompts that join together share one prefill. A response
    depends on its own prompt and noise, and by rounding alone on the others. Temperature 0 is greedy.
    """

    def __init__(self, policy, cfg, temperature):
        from lib.cache import make_cache
        self.policy, self.model, self.temperature = policy, policy.fast, temperature
        self.places, self.limit = cfg.rollout_batch, cfg.max_response_tokens
        self.stop_ids = torch.tensor(sorted(policy.stop_ids), device=policy.device)
        self.window = make_cache(self.model)
        renamed = "cache" in inspect.signature(self.model.forward).parameters  # since transformers 5.24
        self.argument = "cache" if renamed else "past_key_values"
        self.waiting, self.active = deque(), []  # active: InProgress, row by row of the window

    def submit(self, key, prompt, noise):
        self.waiting.append(InProgress(key, prompt, noise, [], []))

    def __len__(self):
        return len(self.waiting) + len(self.active)

    @torch.no_grad()
    def step(self):
        logits = [self.decode()] if self.active else []
        if self.is_prefill_due():
            logits.append(self.prefill())
        return self.draw(torch.cat(logits)) if logits else []

    def is_prefill_due(self):
        ready = min(len(self.waiting), self.places - len(self.active))
        if self.active and not self.window.joins:
            return False
        return ready > 0 and ready >= SHARE * min(self.places, len(self))

    def forward(self, ids, real, positions, cache):
        """[rows, new tokens] -> the logits [rows, V] after the last one."""
        with models.autocast(self.policy):
            out = self.model(input_ids=ids, attention_mask=real, position_ids=positions, logits_to_keep=1,
                             use_cache=True, **{self.argument: cache})
        return out.logits[:, -1].float()

    def decode(self):
        """The next token of every response in progress -> logits [rows, V]."""
        window, device = self.window, self.policy.device
        window.make_room()
        starts = torch.tensor(window.starts, device=device)[:, None]  # [rows, 1]
        real = (torch.arange(window.first, window.end + 1, device=device) >= starts).long()  # [rows, columns in use]
        token = torch.tensor([answer.ids[-1:] for answer in self.active], device=device)
        logits = self.forward(token, real, window.end - starts, window.cache)
        window.end += 1
        return logits

    def prefill(self):
        """Prompts that waited join, each different one computed once -> the logits after them [rows, V]."""
        joining = []
        while self.waiting and len(joining) + len(self.active) < self.places and self.fits(joining):
            joining.append(self.waiting.popleft())
        unique = list(dict.fromkeys(answer.prompt for answer in joining))
        number_of, longest = {prompt: number for number, prompt in enumerate(unique)}, max(map(len, unique))
        device = self.policy.device
        ids = torch.tensor([(0,) * (longest - len(p)) + p for p in unique], device=device)  # padded on the left
        real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique], device=device)
        cache = models.empty_cache(self.model)
        logits = self.forward(ids, real, (real.cumsum(1) - 1).clamp(min=0), cache)
        which = torch.tensor([number_of[answer.prompt] for answer in joining], device=device)
        self.window.add(cache, which, [len(answer.prompt) for answer in joining])
        self.active += joining
        return logits[which]

    def fits(self, joining):
        """Whether the next prompt may be computed together with those that are joining. Always, if rows can only join
        an empty cache: then all must come at once."""
        prompts = {answer.prompt for answer in (*joining, self.waiting[0])}
        return not joining or not self.window.joins or len(prompts) * max(map(len, prompts)) <= PREFILL

    def draw(self, logits):
        """Draws a token of each response in progress from logits [rows, V] -> [(key, Response)] of those that end."""
        logprobs = (logits / (self.temperature or 1.0)).log_softmax(-1)  # [rows, V]
        token = models.draw_tokens(logprobs, self.temperature, [answer.noise for answer in self.active])  # [rows, 1]
        chosen, ended = logprobs.gather(1, token)[:, 0], torch.isin(token[:, 0], self.stop_ids)
        finished, staying = [], []
        for row, (answer, t, lp, end) in enumerate(zip(self.active, token[:, 0].tolist(), chosen.tolist(),
                                                       ended.tolist())):
            answer.ids.append(t)
            answer.logp.append(lp)
            if end or len(answer.ids) == self.limit:
                response = Response(tuple(answer.ids), tuple(answer.logp), "end" if end else "length")
                finished.append((answer.key, response))
            else:
                staying.append(row)
        if finished:
            self.active = [self.active[row] for row in self.window.keep(staying)]
        progress.tell(f"{len(self.active)} responses in progress")
        return finished
