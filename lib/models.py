"""Loading a model with transformers: paths, devices, and what makes sampler and trainer the same function."""

import inspect
import json
from pathlib import Path

import torch

from lib.checkpoints import fault
from lib.runs import ROOT, UserError, checkpoints, first_sentence, is_run

TINY = ROOT / "data" / "tiny"


def choose_device(name):
    """auto, cpu, cuda, cuda:1, ... -> torch.device. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter is what a CPU build raises for cuda
        raise UserError(f"--device {name} cannot be used here: {first_sentence(error)}") from error


def is_bundled(model):
    """Whether a --model is the bundled one: "tiny", its folder, or what tools.clone has made of it."""
    try:
        files = [folder / "clone.json" for folder in (Path(model), Path(model).parent)]
        stored = [json.loads(path.read_text()) for path in files if path.is_file()]
        return model == "tiny" or Path(model).resolve() == TINY or any(one.get("bundled") is True for one in stored)
    except (OSError, ValueError, AttributeError, RecursionError):  # what is wrong with the folder is said when it loads
        return False


def read_model(path):
    """tiny, a folder, or a name that transformers loads -> (model in fp32, tokenizer). UserError if there is none."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    path = str(TINY) if path == "tiny" else path
    if is_run(path):
        names = ", ".join(checkpoint.name for checkpoint in checkpoints(path)) or "none yet"
        raise UserError(f"{path} is a run folder: give one of the checkpoints in it ({names}).")
    parent = Path(path).parent
    looks_local = parent.is_dir() if parent != Path(".") else Path(path).exists()
    looks_local |= path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path) / "config.json").is_file():
        raise UserError(f"There is no model in {path!r} (no config.json): give tiny, a folder written by "
                        "save_pretrained, or a name such as Qwen/Qwen2.5-1.5B-Instruct.")
    wrong = fault(Path(path), ".safetensors") if (Path(path) / "run.json").is_file() else None
    if wrong:
        raise UserError(f"Could not load the model {path!r}: {wrong}. Take another checkpoint.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # a model is data, not a program
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa",
                                                     trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"Could not load the model {path!r}: {first_sentence(error)}") from error
    return model, tokenizer


class Chat:
    """Messages -> ids: the template's own text with control tokens, the message as plain text without any.

    So an observation that contains "<|im_end|>" stays text. Works for every template that contains the message once.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        mark = "\ue000"  # private use: in no template
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], add_generation_prompt=True,
                                             tokenize=False, enable_thinking=False)
        if text.count(mark) != 1:
            raise UserError(f"The chat template of {tokenizer.name_or_path} shows a user's message {text.count(mark)} "
                            "times instead of once: such templates are not supported.")
        before, after = text.split(mark)
        self.before, self.after = self.encode(before, control=True), self.encode(after, control=True)

    def encode(self, text, control=False):
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"])

    def ends(self, ids, count):
        """The text of the first and last tokens of a text, `count` in all, with "..." for the others."""
        first, last = ids[:(count + 1) // 2], ids[len(ids) - count // 2:]
        return " ... ".join(self.tokenizer.decode(part).strip("\ufffd") for part in (first, last))

    def prompt(self, text):
        return self.before + self.encode(text) + self.after


def end_of_turn_ids(model, tokenizer):
    """The tokens that end a response, a frozenset of ids."""
    stop = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset({*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None})


def without_dropout(model):
    """Sampler and trainer must be the same function, also in train mode."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def recompute_activations(model):
    """Keeps no activations in the forward pass; takes effect in train mode only."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.24
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def draw_tokens(logprobs, temperature, noises):
    """logprobs [B, V], a random.Random per row -> sampled tokens [B, 1], the likeliest at temperature 0.

    A row takes one number of its own noise and nothing else, so that a batch does not change what its rows sample.
    Raises UserError if the log-probs have diverged.
    """
    if temperature == 0:
        return logprobs.argmax(-1, keepdim=True)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)  # [B, V]
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise UserError("No token can be sampled, as the model's log-probs are not finite: the weights have diverged "
                        f"(lower --lr), or --temperature {temperature} is too small (raise it).")
    drawn = torch.tensor([[noise.random()] for noise in noises], dtype=torch.float64, device=logprobs.device)
    return torch.searchsorted(cumulative, drawn * total, right=True).clamp(max=logprobs.shape[-1] - 1)


def empty_cache(model):
    """-> (a cache of keys and values that the model fills in place, the keyword arguments that hand it over)."""
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config)
    renamed = "cache" in inspect.signature(model.forward).parameters  # since transformers 5.24
    return cache, {"cache" if renamed else "past_key_values": cache, "use_cache": True}
