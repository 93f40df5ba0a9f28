"""Makes the bundled model, data/tiny: an untrained Qwen2 of 0.9 million parameters clones the demonstrators of all
environments. docs/bundled_model.md tells why each trick is here; tools/clone.py does the training.

    python -m tools.tiny --out runs/tiny       82 minutes on two cores; data/tiny has its model and tokenizer files
"""

import dataclasses
import itertools
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass

import torch

import envs
import sdar
from lib import models
from lib.settings import option
from tools import clone
from tools.clone import Lesson

COPYING = 0.1  # share of the steps that go to the synthetic copy task
SHARES = {"webshop": 2, "alfworld": 3, "search": 3}  # of episodes: houses are hard to learn, questions are short
PROMPT_WEIGHT = 0.1  # of a prompt's tokens beside an answer's

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@dataclass
class TinyConfig(clone.CloneConfig):
    steps: int = option(6000, "optimiser steps", at_least=1)
    weak: float = option(0.5, "share of demonstrations by a weak demonstrator, without skills in the prompt; the "
                         "others are the expert's, with skills", at_least=0, at_most=1)


FLAGS = ("steps", "lr", "tokens", "weak", "seed", "threads", "micro_tokens", "out", "save_every", "report_to")


def make_sources(cfg):
    """One per environment, each with the prompts that sdar.py gives the bundled model there."""
    return [clone.make_source(sdar.in_environment(cfg, name)) for name in envs.ENVIRONMENTS]


# ---------------------------------------------------------------------------------------------- an untrained model

def new_model(sources, vocabulary=2048, episodes=1500):
    """An untrained Qwen2 and a BPE tokenizer made from demonstrations -> (model, tokenizer)."""
    from tokenizers import AddedToken
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    rng, texts = random.Random(0), []
    for source in itertools.islice(itertools.cycle(sources), episodes):
        for context, skills, thought, action in clone.demonstrated_turns(source, rng):
            texts += ["user\n", sdar.render(source.cfg, context, skills), "assistant\n", thought, action]
    # Without brackets, so that none grows into a token with the word behind it: a label is then the same tokens in the
    # observation and in the action.
    tokenizer = Qwen2Tokenizer().train_new_from_iterator((text.replace("[", "\n") for text in texts), vocabulary - 12)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                  "additional_special_tokens": ["<|im_start|>"]})
    names = ("think", "action", "search", "answer", "information")
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    tokenizer.chat_template = CHATML
    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, use_sliding_window=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **size))
    look_back(model)
    return model, tokenizer


@torch.no_grad()
def look_back(model, frequencies=4, strength=6.0):
    """Makes the first two heads of the first layer start out attending one and two tokens back.

    Copying needs such heads, and finding them takes an untrained model most of its training. A key bias k and a query
    bias k rotated back by n positions give, under rotary embedding, the score |k|^2 sum cos((distance - n) angle),
    which is largest at n.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    half = attention.head_dim // 2
    angle = config.rope_parameters["rope_theta"] ** (-torch.arange(frequencies) / half)  # radians per token
    # biases are laid out as [heads, halves that rotary embedding pairs, half]
    attention.k_proj.bias.view(-1, 2, half)[0, 0, :frequencies] = strength  # the key head that both query heads share
    for back in (1, 2):
        query = attention.q_proj.bias.view(-1, 2, half)[back - 1]
        query[0, :frequencies] = strength * torch.cos(back * angle)
        query[1, :frequencies] = -strength * torch.sin(back * angle)


# ---------------------------------------------------------------------------------------------- words and their tokens

def variants(tokenizer):
    """Pairs (token of a word with a leading space, token of the same word without), sorted: get_vocab has no order."""
    ids = tokenizer.get_vocab()
    return sorted((ids["Ġ" + word], number) for word, number in ids.items() if "Ġ" + word in ids)


@torch.no_grad()
def join_variants(model, tokenizer, seed):
    """Gives both variants of a word one vector, apart from a difference that all words share.

    A word of the task has a leading space there and often none in an action: a copy all the same.
    """
    embedding = model.get_input_embeddings().weight  # [V, D]
    spaced, bare = torch.tensor(variants(tokenizer)).T
    difference = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(seed)).to(embedding)
    embedding[bare] = embedding[spaced] + difference * embedding.std()


class Words:
    """The words of the tokenizer: a word is its tokens with and without a leading space.

    of: {token: its word, the tuple of its tokens}. others: {number of variants: all words with so many}. common: words
    in more than a tenth of the prompts, their fixed wording. copied: tokens of the copy task, one variant of each word.
    """

    def __init__(self, chat, sources, sample=300):
        pairs = variants(chat.tokenizer)
        self.of = {number: pair for pair in pairs for number in pair}  # token -> its word
        single = set(range(len(chat.tokenizer))) - self.of.keys() - chat.tokenizer.added_tokens_decoder.keys()
        self.others = {2: pairs, 1: [(number,) for number in sorted(single)]}  # by their number of variants
        self.copied = sorted(set(range(len(chat.tokenizer))) - {bare for _, bare in pairs})
        rng = random.Random(0)
        lessons = [lesson for source in itertools.islice(itertools.cycle(sources), sample)
                   for lesson in clone.demonstrations(chat, source, rng)]
        count = Counter(word for lesson in lessons for word in self.words(lesson.prompt_ids))
        self.common = {word for word, number in count.items() if number > len(lessons) / 10}

    def words(self, ids):
        return {self.of.get(number, (number,)) for number in ids}

    def substitute(self, lesson, rng):
        """The lesson with each rarer word that its answer copies from the prompt replaced, everywhere, by a random one.

        What a word means can't help there, only where it stands: so copying is learned by place, and does not stop at
        names that were never met.
        """
        copied = sorted(self.words(lesson.response_ids) & self.words(lesson.prompt_ids) - self.common)
        other = {old: new for word in copied for old, new in zip(word, rng.choice(self.others[len(word)]))}
        prompt, response = (tuple(other.get(number, number) for number in ids)
                            for ids in (lesson.prompt_ids, lesson.response_ids))
        return dataclasses.replace(lesson, prompt_ids=prompt, response_ids=response)


# ---------------------------------------------------------------------------------------------- the curriculum

def copy_task(tokens, rng, apart, count=64, span=10):
    """Lessons whose prompt ends with the first token of a random stretch seen before; the response is the rest."""
    def draw(low, high):
        return tuple(rng.choices(tokens, k=rng.randint(low, high)))

    lessons = []
    for _ in range(count):
        stretch = draw(2, span)
        prompt = draw(0, apart) + stretch + draw(0, apart) + stretch[:1]
        lessons.append(Lesson(prompt, stretch[1:], [1.0] * (len(stretch) - 1)))
    return lessons


def whole(lesson):
    """The lesson with its prompt predicted too, from the second token on, at PROMPT_WEIGHT.

    Observations repeat what they name, so there is much more to learn copying from than the few tokens of the answers.
    """
    predicted = lesson.prompt_ids[1:]
    return Lesson(lesson.prompt_ids[:1], predicted + lesson.response_ids,
                  [PROMPT_WEIGHT] * len(predicted) + lesson.weights)


def curriculum(policy, cfg, sources, words):
    """-> a function from step to lessons: the synthetic copy task, first near, then far; then demonstrations, for the
    same number of steps growing from short ones to all. In half of the demonstrations copied words are substituted.

    At the end of the copy task, which moves one variant of a word, it joins the variants in the model.
    """
    first = math.ceil(COPYING * cfg.steps)

    def lessons_of(step):
        rng, progress = random.Random(f"{cfg.seed} demonstrations {step}"), step / cfg.steps
        if step == first:
            join_variants(policy.model, policy.chat.tokenizer, cfg.seed)
        if progress < COPYING:
            return copy_task(words.copied, rng, apart=8 + int(max(0, progress / COPYING - 0.5) * 200))
        lengthening = (progress - COPYING) / COPYING
        longest = 192 + lengthening * cfg.max_prompt_tokens if lengthening < 1 else math.inf
        lessons = draw_demonstrations(policy.chat, cfg, sources, rng, longest)
        return [whole(words.substitute(lesson, rng) if rng.random() < 0.5 else lesson) for lesson in lessons]

    return lessons_of


def draw_demonstrations(chat, cfg, sources, rng, longest):
    """About cfg.tokens tokens of demonstrations with prompts of at most `longest`, from the sources as SHARES says."""
    shares = [SHARES[source.cfg.env] for source in sources]
    lessons = []
    while clone.count_tokens(lessons) < cfg.tokens:
        (source,) = rng.choices(sources, shares)
        lessons += [lesson for lesson in clone.demonstrations(chat, source, rng) if len(lesson.prompt_ids) <= longest]
    return lessons


def make_tiny(argv):
    cfg, folder, checkpoint = clone.parse(argv, __doc__, TinyConfig, FLAGS, fixed={"model": "tiny"})
    sources = make_sources(cfg)
    torch.manual_seed(cfg.seed)
    model, tokenizer = models.read_model(str(checkpoint)) if checkpoint else new_model(sources)
    policy = sdar.make_policy(model, tokenizer, cfg)
    words = Words(policy.chat, sources)
    folder = clone.run(cfg, policy, curriculum(policy, cfg, sources, words), folder, checkpoint,
                       command="python -m tools.tiny")
    print(f"saved in {folder}; evaluate it: python eval.py {folder}")


if __name__ == "__main__":
    sys.exit(clone.main(program=make_tiny))
