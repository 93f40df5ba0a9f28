"""Whether sampler, trainer and the model's own plain forward pass are one function, tried before a run starts.

The losses compare log-probs of the same tokens from different computations: the sampler's (padded on the left, cached,
siblings sharing a prefill) and the trainer's (padded on the right, siblings packed behind one prompt, the head's
product inside the kernel). An architecture for which they differ would train on wrong numbers without any other sign.
"""

import dataclasses
import inspect
import math
import re
import warnings

import torch

from lib.models import attention_window, autocast, text_config
from lib.program import UserError, describe, out_of_memory

LIMIT = 1e-3  # of a difference of log-probs in fp32, in nats, where logits have a standard deviation of 1
LARGE = 100.0  # standard deviation of logits that are beyond every soft-cap in use (30 to 50)
RESPONSE = 16  # tokens of a trial response, at most
BUDGET = {"cpu": 3e9, "cuda": 2e13}  # operations that a trial forward pass may cost: less than a second for all of them


def check_model(policy, name, longest, sample, score):
    """Plays and scores trial responses -> (largest difference of the trainer's log-probs, whether siblings can be
    packed into one sequence).

    longest: tokens of the longest prompt, skills included, and its response that the settings allow; trial prompts are
    one that makes up that length, or as long as BUDGET allows, and a shorter one, so that a long row is padded, too
    (what is known to depend on the length is refused by check_lengths whatever the trial sees). sample(policy, prompts,
    tokens, temperature) -> responses (ids, logp); score(policy, prompts, responses, temperature) -> the trainer's
    log-probs [N]. The temperature is the standard deviation of the logits, so that neither flat logits, as of a random
    model, nor large ones, with which all that is sampled has a log-prob near 0, hide a difference. Raises UserError if
    there is one.
    """
    prompts = trial_prompts(policy, longest)
    tried = max(map(len, prompts)) + RESPONSE
    check_lengths(text_config(policy.model), name, longest, tried)
    exact = dataclasses.replace(policy, autocast=False, rounded=None,
                                stop_ids=frozenset(range(0, vocabulary(policy), RESPONSE)))
    temperature = call_or_refuse(name, "its own forward pass", logit_std, exact, policy.chat.prompt("Find a red lamp."))
    responses = call_or_refuse(name, "sampling", sample, exact, prompts * 2, RESPONSE, temperature)
    groups = [responses[0::2], responses[1::2]]  # siblings leave the batch at different times; the last is scored alone
    ids, last = [[response.ids for response in group] for group in groups], [[group[-1].ids] for group in groups]
    own = call_or_refuse(name, "its own forward pass", own_logp, exact, prompts, last, temperature)
    sampled = torch.tensor([x for group in groups for x in group[-1].logp], device=own.device)
    alone = call_or_refuse(name, "training", score, exact, prompts, last, temperature)
    for doing, logp in (("sampling", sampled), ("training", alone)):
        if not largest(logp - own) < LIMIT:
            raise UserError(f"{name} is not supported: log-probs in {doing} differ from the model's own by "
                            f"{largest(logp - own):.2g} (limit {LIMIT:g}), {SUSPECTS[doing]}.")
    check_large_logits(exact, name, score, prompts[-1:], last[-1:], LARGE / temperature)
    reaches = tried >= longest or packs_at_any_length(text_config(policy.model), tried)
    packed = call_or_refuse(name, "training", packed_logp, exact, score, prompts, ids, temperature) if reaches else None
    packs = packed is not None and largest(packed - own) < LIMIT
    logp = packed if packs else alone
    if not packs:
        warnings.warn(f"{name} trains a sequence per response, which takes longer: its attention does not follow a "
                      "mask that packs the responses to one prompt into one sequence, as far as a trial could tell.",
                      RuntimeWarning, stacklevel=2)
    if policy.autocast:
        logp = call_or_refuse(name, "training in bf16", score, policy, prompts, last, temperature)
        rounded = call_or_refuse(name, "bf16", own_logp, policy, prompts, last, temperature)
        check_rounding(name, logp - own, rounded - own)
    return largest(logp - own), packs


def check_large_logits(policy, name, score, prompts, responses, growth):
    """Raises UserError if trainer and model differ once the logits are large, as training may make them: a soft-cap
    hides where they are small. The head's weight is scaled by a power of two, which can be undone exactly."""
    factor = 2.0 ** max(0, round(math.log2(growth)))
    weight = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(factor)
    try:
        temperature = call_or_refuse(name, "its own forward pass", logit_std, policy, prompts[0])
        own = call_or_refuse(name, "its own forward pass", own_logp, policy, prompts, responses, temperature)
        trained = call_or_refuse(name, "training", score, policy, prompts, responses, temperature)
    finally:
        with torch.no_grad():
            weight.div_(factor)
    if not largest(trained - own) < LIMIT:
        raise UserError(f"{name} is not supported: with logits of the size {temperature:.0f}, log-probs in training "
                        f"differ from the model's own by {largest(trained - own):.2g} (limit {LIMIT:g}), "
                        f"{SUSPECTS['training']}.")


def largest(differences):
    return differences.abs().max().item()


SUSPECTS = {"sampling": "so it does not take padding on the left, or its cache is not what it computes without one",
            "training": "so its head is more than a matrix (bias, soft-cap, scaling)"}


def call_or_refuse(name, doing, call, *args):
    """call(*args). Raises UserError, in one sentence, for whatever a model's code raises."""
    try:
        with torch.no_grad():
            return call(*args)
    except UserError:
        raise
    except Exception as error:  # the model's code is not ours: whatever it raises, it cannot be used
        if out_of_memory(error):
            raise UserError(f"{name} does not fit into memory with prompts as long as the settings allow: lower "
                            "--max_prompt_tokens, or take a smaller model.") from error
        raise UserError(f"{name} is not supported: {doing} fails: {describe(error)}") from error


def vocabulary(policy):
    return policy.model.get_input_embeddings().num_embeddings


def trial_prompts(policy, longest):
    """Random text of the length that was asked for, or that BUDGET allows, after its first five eighths alone."""
    config = text_config(policy.model)
    size = sum(p.numel() for p in policy.model.parameters())
    layers, width = getattr(config, "num_hidden_layers", 1), policy.model.get_input_embeddings().embedding_dim
    attention = 8 * width * layers  # for each pair of tokens
    length, budget = longest, BUDGET["cuda" if policy.device.type == "cuda" else "cpu"]
    while length > 64 and 2 * size * length + attention * length ** 2 > budget:
        length = length * 7 // 8
    tokenizer = policy.chat.tokenizer
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
                   - tokenizer.added_tokens_decoder.keys())
    drawn = torch.randint(len(words), (max(length - RESPONSE, 2),), generator=torch.Generator().manual_seed(0))
    text = tuple(words[i] for i in drawn.tolist())
    return [text[:len(text) * 5 // 8], text]


def own_logits(policy, ids, n):
    """The model's own logits [n, V] after each of the last n of ids, in fp32, by a plain forward pass."""
    kept = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    with autocast(policy):
        out = policy.model(input_ids=torch.tensor([ids], device=policy.device), use_cache=False,
                           **({"logits_to_keep": n} if kept else {}))
    return out.logits[0, -n:].float()


def logit_std(policy, prompt):
    """The standard deviation of the logits after each token of a prompt; above 0."""
    return max(own_logits(policy, prompt, len(prompt)).std(-1).mean().item(), 1e-6)


def own_logp(policy, prompts, responses, temperature):
    """Prompts and responses as for sdar.pack -> log-probs [N] by the model's own logits, a sequence at a time."""
    found = []
    for prompt, group in zip(prompts, responses):
        for response in group:
            logits = own_logits(policy, prompt + response, len(response) + 1)[:-1] / temperature
            targets = torch.tensor(response, device=policy.device)
            found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(found)


LOCAL = re.compile("window|chunk|sparse|index_topk")
KNOWN = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern",
         "_sliding_window_pattern", "chunk_size_feed_forward")


def packs_at_any_length(config, tried):
    """Whether siblings that packed right with `tried` tokens do so with more: attention looks everywhere, or into
    windows that the trial went beyond. Chunks, blocks or an index may begin later."""
    kinds = set(getattr(config, "layer_types", None) or ())
    others = [key for key, value in config.to_dict().items() if value and key not in KNOWN and LOCAL.search(key)]
    return (attention_window(config) or 0) < tried and not others and kinds <= {"full_attention", "sliding_attention"}


def packed_logp(policy, score, prompts, siblings, temperature):
    """The trainer's log-probs [N] of the last sibling of each prompt when all are packed, or None where that fails."""
    try:
        logp = score(policy, prompts, siblings, temperature)
    except Exception as error:
        if out_of_memory(error):
            raise
        return None  # whatever the model's code makes of a mask that it does not expect: it is trained without one
    last = [k == len(group) - 1 for group in siblings for k, ids in enumerate(group) for _ in ids]
    return logp[torch.tensor(last, device=logp.device)]


def check_rounding(name, trained, own):
    """Raises UserError if the trainer's bf16 log-probs are much farther from the fp32 ones than the model's own bf16
    logits are: how far that is depends on the model. Both arguments: differences from fp32, [N]."""
    found, rounding = trained.abs().mean().item(), own.abs().mean().item()
    if not found < 3 * rounding + LIMIT:
        raise UserError(f"{name} is not supported in bf16: log-probs in training are {found:.2g} from those in fp32, "
                        f"the model's own {rounding:.2g}. Use --dtype float32.")


def check_lengths(config, name, longest, tried):
    """Raises UserError if the longest allowed prompt and response are beyond the positions that a model has, or where
    its log-probs would depend on a row's neighbours. Rotary positions have no end, but a warning is due.

    tried: tokens of the longest trial. transformers' own padded and cached passes do not agree with plain ones once an
    index picks the tokens that are attended to (DeepSeek V3.2, Doge), so a trial that does not reach that far is not
    enough.
    """
    picked = min(getattr(config, name, None) or longest for name in ("index_topk", "keep_window_size"))
    rope = getattr(config, "rope_parameters", None) or {}
    most = getattr(config, "max_position_embeddings", None) or longest
    ask = (f"--max_prompt_tokens, the skills and --max_response_tokens allow sequences of {longest} tokens: lower the "
           "first or the last")
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            original = (one.get("original_max_position_embeddings")
                        or getattr(config, "original_max_position_embeddings", None) or most)
            if longest > original:
                raise UserError(f"{name} scales its positions by the longest row of a batch beyond {original} tokens "
                                f"({one['rope_type']} rope), so log-probs would depend on a row's neighbours; {ask}.")
    if tried <= picked < longest:
        raise UserError(f"{name} attends to {picked} tokens that an index picks, and a trial of more would take too "
                        f"long; {ask}.")
    if 0 < most < longest and rope:
        warnings.warn(f"{name} was made for {most} positions, but {ask}, if such prompts occur.", RuntimeWarning,
                      stacklevel=2)
    elif 0 < most < longest:
        raise UserError(f"{name} has {most} positions, but {ask}.")
