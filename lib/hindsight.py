"""OPID's analysis of a step's episodes (arXiv 2606.26790): transcripts, and how the policy is asked about them."""

import dataclasses
import random
from typing import NamedTuple

from lib.analyser import MOST, Step, analysis_prompt, by_rules, parse_analysis

GAMMA = 0.95  # discount of the returns that an analyser sees
MAX_TOKENS, TEMPERATURE = 256, 0.4  # of an analysis that the policy writes


class Transcript(NamedTuple):
    """All that an analyser may see of an episode."""

    task: str
    won: bool
    steps: list  # of analyser.Step


def transcript(episode, episode_return):
    """A finished sdar.Episode and its return -> Transcript."""
    last = len(episode.turns) - 1
    steps = [Step(turn.observation, turn.text, turn.action, turn.valid, episode_return * GAMMA ** (last - number))
             for number, turn in enumerate(episode.turns)]
    return Transcript(episode.goal, episode.won, steps)


def analyse(policy, cfg, episodes, returns, sample):
    """Finished sdar.Episodes and their returns -> an Analysis each, None where it failed.

    By rules, or by the policy itself, as cfg.analyser says. sample: sdar.sample, by which the policy answers.
    """
    transcripts = [transcript(*one) for one in zip(episodes, returns)]
    if cfg.analyser == "rules":
        return [by_rules(cfg.env, *one) for one in transcripts]

    def ask(messages):
        some = dataclasses.replace(cfg, max_response_tokens=MAX_TOKENS)
        noises = [random.Random(f"{episodes[number].name} analysis") for number in messages]
        answers = sample(policy, list(map(policy.chat.prompt, messages.values())), some, TEMPERATURE, noises)
        return dict(zip(messages, [policy.chat.response_text(answer.ids) for answer in answers]))

    most = MOST.get(cfg.env, 5)  # an environment from elsewhere has no script
    return by_policy(ask, transcripts, most, lambda text: len(policy.chat.prompt(text)) <= cfg.max_prompt_tokens)


def by_policy(ask, transcripts, most, fits):
    """The analysis of each by the policy -> list of Analysis, None where it failed twice or no message is short enough.

    ask: ({number of a transcript: message}) -> {number: answer}; fits: whether a message is short enough for a prompt.
    """
    found, to_ask = {}, dict.fromkeys(range(len(transcripts)), (None, ""))  # {number: (last error, last answer)}
    for _ in range(2):  # the second time it is shown its error
        messages = {number: message for number, (error, answer) in to_ask.items()
                    if (message := shortened(transcripts[number], most, fits, error, answer))}
        to_ask = {}
        for number, answer in ask(messages).items():
            try:
                found[number] = parse_analysis(answer, range(len(transcripts[number].steps)), most)
            except ValueError as error:
                to_ask[number] = str(error), answer[-2000:]
    return [found.get(number) for number in range(len(transcripts))]


def shortened(transcript, most, fits, error, answer):
    """The message with as much of each observation as fits, or None."""
    for length in (10_000, 2_000, 500, 100, 0):
        steps = [step._replace(observation=step.observation[:length]) for step in transcript.steps]
        message = analysis_prompt(transcript.task, transcript.won, steps, most, error, answer)
        if fits(message):
            return message
