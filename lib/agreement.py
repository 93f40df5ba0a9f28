"""Whether sampler, trainer and the model's own plain forward pass are one function, tried before a run starts.

The losses compare log-probs of the same tokens from different computations: the sampler's (padded on the left, cached,
siblings sharing a prefill) and the trainer's (padded on the right, siblings packed behind one prompt, the head's
product inside the kernel). An architecture for which they differ would train on wrong numbers without any other sign.
"""

import dataclasses
import inspect
import re

import torch

from lib.models import compute, describe, text_config
from lib.runs import UserError

RESPONSE = 16  # tokens of a trial response, at most
BUDGET = {"cpu": 2e9, "cuda": 2e13}  # operations that a trial forward pass may cost: less than a second for all of them


def check_model(policy, name, longest, sample, score):
    """Plays and scores trial responses -> (largest difference of the trainer's log-probs, whether siblings can be
    packed into one sequence).

    longest: tokens of the longest prompt, skills included, and its response that the settings allow; trial prompts are
    a short one and one that makes up that length, or as long as BUDGET allows (what is known to depend on the length is
    refused by check_lengths whatever the trial sees). sample(policy, prompts, tokens) -> responses (ids, logp) at
    temperature 1; score(policy, prompts, responses) -> the trainer's log-probs [N]. Raises UserError if they disagree.
    """
    check_lengths(text_config(policy.model), name, longest)
    prompts = trial_prompts(policy, longest)
    exact = dataclasses.replace(policy, autocast=False, stop_ids=frozenset(range(0, vocabulary(policy), RESPONSE)))
    responses = attempt(name, "sampling", sample, exact, prompts * 2, RESPONSE)
    groups = [responses[0::2], responses[1::2]]  # siblings leave the batch at different times
    ids = [[response.ids for response in group] for group in groups]
    own, spread = attempt(name, "its own forward pass", own_logp, exact, prompts, ids)
    limit = max(2e-5, 1e-3 * min(1.0, spread))  # flat logits, as of a random model, hide differences
    sampled = torch.tensor([x for group in groups for response in group for x in response.logp], device=own.device)
    apart = [[p, [r]] for p, rs in zip(prompts, ids) for r in rs]
    alone = attempt(name, "training", score, exact, *zip(*apart))
    for doing, logp in (("sampling", sampled), ("training", alone)):
        difference = (logp - own).abs().max().item()
        if not difference < limit:
            raise UserError(f"{name} is not supported: log-probs in {doing} differ from the model's own by "
                            f"{difference:.2g} (limit {limit:.2g}), {SUSPECTS[doing]}.")
    packed = packed_logp(exact, score, prompts, ids)
    packs = packed is not None and (packed - own).abs().max().item() < limit
    if policy.autocast:
        logp = check_rounding(policy, name, score, (prompts, ids), (prompts, ids) if packs else tuple(zip(*apart)), own)
    else:
        logp = packed if packs else alone
    return (logp - own).abs().max().item(), packs


SUSPECTS = {"sampling": "so it does not take padding on the left, or its cache is not what it computes without one",
            "training": "so its head is more than a matrix (bias, soft-cap, scaling)"}


def attempt(name, doing, call, *args):
    """call(*args). Raises UserError, in one sentence, for whatever a model's code raises."""
    try:
        with torch.no_grad():
            return call(*args)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"{name} does not fit into the device's memory with prompts as long as the settings allow: "
                        "lower --max_prompt_tokens, or take a smaller model.") from error
    except Exception as error:  # the model's code is not ours: whatever it raises, it cannot be used
        raise UserError(f"{name} is not supported: {doing} fails: {describe(error)}") from error


def vocabulary(policy):
    return policy.model.get_input_embeddings().num_embeddings


def trial_prompts(policy, longest):
    """A short prompt by the chat template, and random text of the length that was asked for, or that BUDGET allows."""
    config = text_config(policy.model)
    size = sum(p.numel() for p in policy.model.parameters())
    layers, width = getattr(config, "num_hidden_layers", 1), policy.model.get_input_embeddings().embedding_dim
    attention = 8 * width * layers  # for each pair of tokens
    length = longest
    while length > 64 and 2 * size * length + attention * length ** 2 > BUDGET[policy.device.type]:
        length = length * 7 // 8
    chat = policy.chat
    words = sorted(set(chat.tokenizer.get_vocab().values()) - set(chat.tokenizer.all_special_ids)
                   - chat.tokenizer.added_tokens_decoder.keys())
    drawn = torch.randint(len(words), (max(length - RESPONSE, 1),), generator=torch.Generator().manual_seed(0))
    return [chat.prompt("Find a red lamp."), tuple(words[i] for i in drawn.tolist())]


def own_logp(policy, prompts, responses):
    """prompts and responses as for sdar.pack -> (log-probs [N] by the model's own logits, a sequence at a time, and the
    standard deviation of the logits)."""
    kept = "logits_to_keep" in inspect.signature(policy.model.forward).parameters
    found, spreads = [], []
    for prompt, group in zip(prompts, responses):
        for response in group:
            ids, n = torch.tensor([prompt + response], device=policy.device), len(response)
            with compute(policy):
                out = policy.model(input_ids=ids, use_cache=False, **({"logits_to_keep": n + 1} if kept else {}))
            logits = out.logits[0, -n - 1:-1].float()  # [T, V]
            found.append(logits.log_softmax(-1).gather(1, ids[0, -n:, None])[:, 0])
            spreads.append(logits.std(-1).mean().item())
    return torch.cat(found), sum(spreads) / len(spreads)


LOCAL = re.compile("window|chunk|sparse|index_topk")
KNOWN = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern",
         "_sliding_window_pattern", "chunk_size_feed_forward")


def packed_logp(policy, score, prompts, responses):
    """The trainer's log-probs [N] with siblings packed, or None where that is not to be tried.

    A packing mask replaces the model's own, so attention that looks neither everywhere nor into a sliding window
    (chunks, blocks, an index) would be lost at lengths that a trial may not reach.
    """
    config = text_config(policy.model)
    kinds = set(getattr(config, "layer_types", None) or ())
    others = [key for key, value in config.to_dict().items() if value and key not in KNOWN and LOCAL.search(key)]
    if others or not kinds <= {"full_attention", "sliding_attention"}:
        return None
    try:
        with torch.no_grad():
            return score(policy, prompts, responses)
    except Exception:  # whatever the model's code makes of a mask that it does not expect: it is trained without one
        return None


def check_rounding(policy, name, score, trial, trained, own):
    """The trainer's log-probs [N] in bf16. Raises UserError if they are much farther from the fp32 ones, `own`, than
    the model's own bf16 logits are: how far that is depends on their size."""
    logp = attempt(name, "training in bf16", score, policy, *trained)
    plain, _ = attempt(name, "its own forward pass in bf16", own_logp, policy, *trial)
    found, rounding = ((one - own).abs().mean().item() for one in (logp, plain))
    if not found < 3 * rounding + 1e-3:
        raise UserError(f"{name} is not supported in bf16: log-probs in training are {found:.2g} from those in fp32, "
                        f"the model's own {rounding:.2g}. Use --dtype float32.")
    return logp


def check_lengths(config, name, longest):
    """Raises UserError if prompts and responses of the longest allowed size are beyond what the model is made for."""
    rope = getattr(config, "rope_parameters", None) or {}
    ask = ("--max_prompt_tokens, the skills and --max_response_tokens allow sequences of "
           f"{longest} tokens: lower the first or the last")
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            original = (one.get("original_max_position_embeddings")
                        or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)
            if longest > original:
                raise UserError(f"{name} scales its positions by the longest row of a batch beyond {original} tokens "
                                f"({one['rope_type']} rope), so log-probs would depend on a row's neighbours; {ask}.")
    most = getattr(config, "max_position_embeddings", None)
    if most and 0 < most < longest:
        raise UserError(f"{name} has {most} positions, but {ask}.")
