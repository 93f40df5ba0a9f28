"""Rows that share a prompt, as one sequence [prompt, response 1, response 2, ...]: the mask lets a response see the
prompt and itself, positions restart after the prompt. A group shares its first prompt, often later ones too."""

import itertools
from collections import defaultdict
from typing import NamedTuple

import torch


class Pack(NamedTuple):
    """S packed sequences, padded on the right to length L, and where their N response tokens are."""

    ids: torch.Tensor  # [S, L]
    positions: torch.Tensor  # [S, L]
    mask: torch.Tensor | None  # [S, 1, L, L], True = may attend; None: plain causal
    predictors: torch.Tensor  # [N] flat index into S*L of the position that predicts each response token
    targets: torch.Tensor  # [N] response ids, sequence by sequence, row by row


def pack(prompts, responses, device):
    """prompts: one id tuple per sequence; responses: a list of id tuples per sequence -> Pack.

        ids         prompt      response 1  response 2  padding
        positions   0 1 2 3     4 5         4 5 6       0 0
        branch      0 0 0 0     1 1         2 2 2       -1 -1       a token sees branch 0 and its own, up to itself
    """
    length = max(len(p) + sum(map(len, rs)) for p, rs in zip(prompts, responses))
    if torch.device(device).type == "cuda":  # attention copies a mask of another width, in every layer
        length += -length % 8
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    predictors, targets = [], []
    for b, (prompt, rows) in enumerate(zip(prompts, responses)):
        row_ids, places, branches = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for number, response in enumerate(rows, start=1):
            start = b * length + len(row_ids)
            predictors += [b * length + len(prompt) - 1, *range(start, start + len(response) - 1)]
            targets += response
            row_ids += response
            places += range(len(prompt), len(prompt) + len(response))
            branches += [number] * len(response)
        n = len(row_ids)
        ids[b, :n], positions[b, :n], branch[b, :n] = map(torch.tensor, (row_ids, places, branches))
    mask = None
    if any(len(rows) > 1 for rows in responses):  # otherwise causal order already hides the padding, which comes last
        q, k = branch[:, :, None], branch[:, None, :]
        see = torch.ones(length, length, dtype=torch.bool).tril() & ((k == 0) | (k == q))
        mask = (see | torch.eye(length, dtype=torch.bool))[:, None].to(device)  # padding sees itself: no empty softmax
    return Pack(ids.to(device), positions.to(device), mask, torch.tensor(predictors, device=device),
                torch.tensor(targets, device=device))


def micro_batches(rows, micro_tokens, packs=True):
    """Rows -> micro-batches, each a list of shared-prefix groups: lists of rows with one prompt.

    Sorted by length, so that a micro-batch has little padding; each has at most micro_tokens padded student tokens,
    unless a single group is longer. packs=False: every row is a group of its own.
    """
    batch = []
    for group in sorted(shared_prefix_groups(rows, micro_tokens) if packs else ([row] for row in rows), key=width):
        if batch and (len(batch) + 1) * width(group) > micro_tokens:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def shared_prefix_groups(rows, micro_tokens):
    """Yields lists of rows with one prompt, cut where a packed sequence would become too long."""
    shared = defaultdict(list)
    for row in rows:
        shared[row.prompt_ids].append(row)
    for members in shared.values():
        used, group, prompt = 0, [], len(members[0].prompt_ids)  # used: tokens of the group's responses
        for row in members:  # masked attention to siblings is wasted: beyond four prompts' length it outweighs sharing
            if group and used + len(row.response_ids) > min(4 * prompt, micro_tokens - prompt):
                yield group
                used, group = 0, []
            group.append(row)
            used += len(row.response_ids)
        yield group


def teacher_parts(micro_batch, micro_tokens):
    """A micro-batch -> lists of groups, each of which has one teacher prompt; the rows keep their order.

    One list, unless teacher prompts differ within a student's group. Then the prompt that siblings share there comes
    once for each, so the groups are dealt out to lists of at most micro_tokens padded tokens, or of a single group.
    """
    groups = [list(alike) for group in micro_batch
              for _, alike in itertools.groupby(group, lambda row: row.teacher_ids)]
    if len(groups) == len(micro_batch):
        return [groups]
    parts, widest = [[]], 0
    for group in groups:
        widest = max(widest, width(group, group[0].teacher_ids))
        if parts[-1] and (len(parts[-1]) + 1) * widest > micro_tokens:
            parts, widest = [*parts, []], width(group, group[0].teacher_ids)
        parts[-1].append(group)
    return parts


def width(group, prompt=None):
    """Length of a group's packed sequence behind `prompt`, by default the student's: the teacher does not change how
    rows are batched."""
    return len(prompt or group[0].prompt_ids) + sum(len(row.response_ids) for row in group)
