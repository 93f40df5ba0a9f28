"""Loading a model with transformers: paths, devices, weights, chat template, and what both sampler and trainer need."""

import copy
import functools
import json
import re
import warnings
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from lib import lora, parallel
from lib.checkpoints import checkpoints, fault
from lib.folders import ROOT, is_run
from lib.program import Diverged, UserError, describe

TINY = ROOT / "data" / "tiny"


def choose_device(name):
    """auto, cpu, cuda, cuda:1, ... -> torch.device. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter is what a CPU build raises for cuda
        raise UserError(f"--device {name} cannot be used here: {describe(error)}") from error


def is_bundled(model):
    """Whether a --model is the bundled one: "tiny", its folder, or what training or cloning has made of it."""
    try:
        files = [folder / "clone.json" for folder in (Path(model), Path(model).parent)]
        stored = [json.loads(path.read_text()) for path in files if path.is_file()]
        if model == "tiny" or Path(model).resolve() == TINY or any(one.get("bundled") is True for one in stored):
            return True
        made_by = Path(model) / "run.json"  # a checkpoint: of a run that began with another model
        before = json.loads(made_by.read_text())["settings"].get("model", model) if made_by.is_file() else model
        return before != model and is_bundled(before)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):  # said when it loads
        return False


# -------------------------------------------------------------------------------------------------------------- loading

def read_model(path, merge=True):
    """tiny, a folder, or a name that transformers loads -> (model in fp32, tokenizer). An adapter's folder gives its
    base model with the adapter merged into the weights; merge=False keeps it apart.

    Raises UserError if there is none, or if it cannot be trained as it is stored: quantised weights, missing or NaN
    ones, a tokenizer with ids beyond the embedding.
    """
    path = str(TINY) if path == "tiny" else path
    if is_run(path):
        names = ", ".join(checkpoint.name for checkpoint in checkpoints(path)) or "none yet"
        raise UserError(f"{path} is a run folder: give one of the checkpoints in it ({names}).")
    parent = Path(path).parent
    looks_local = parent.is_dir() if parent != Path(".") else Path(path).exists()
    looks_local |= path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(path) / "config.json").is_file() and not lora.is_adapter(path):
        raise UserError(f"There is no model in {path!r} (no config.json): give tiny, a folder written by "
                        "save_pretrained, or a name such as Qwen/Qwen2.5-1.5B-Instruct.")
    wrong = fault(Path(path), ".safetensors") if (Path(path) / "run.json").is_file() else None
    if wrong:
        raise UserError(f"Could not load the model {path!r}: {wrong}. Take another checkpoint.")
    try:
        model, tokenizer, loading = from_pretrained(path) if not lora.is_adapter(path) else adapted(path, merge)
        size, ids = model.get_input_embeddings().num_embeddings, tokenizer.get_vocab().values()
        reset_settings(model)
    except UserError:
        raise
    except KeyError as error:  # an activation, a kind of rope, ...
        raise UserError(f"Could not load the model {path!r}: {error} is missing in its files, or unknown to this "
                        "version of transformers.") from error
    except Exception as error:  # config, weights and tokenizer are foreign data: transformers fails on them in any way
        raise UserError(f"Could not load the model {path!r}: {describe(error)}") from error
    if max(ids) >= size:
        raise UserError(f"The tokenizer of {path!r} has ids up to {max(ids)}, but the model embeds only {size} tokens: "
                        "the two do not belong together.")
    check_weights(path, model, loading)
    fix_date(tokenizer)
    return model, tokenizer


UNSUPPORTED = {  # model type: a fault of transformers that a short trial does not see
    "youtu": "transformers sets the embedding of the padding token of a Youtu model to 0 whenever it loads one",
    "moshi": "transformers loses the window of Moshi's attention where rows are padded and cached"}


def adapted(folder, merge):
    """`from_pretrained` of an adapter's folder; the tokenizer is that beside the adapter, if there is one."""
    base = lora.base_of(folder)
    model, tokenizer, loading = from_pretrained(str(TINY) if base == "tiny" else base)
    if (Path(folder) / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return lora.load(model, folder, merge), tokenizer, loading


def from_pretrained(path):
    """-> (model, tokenizer, what transformers noticed about the weights). Runs no code of the model's own folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.disable_progress_bar()
    data_only = {"trust_remote_code": False}  # a model is data, not a program
    config = AutoConfig.from_pretrained(path, **data_only)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(f"The weights of {path!r} are quantised ({method}), and rounded weights cannot be trained: "
                        "give the model that they were made from.")
    if config.model_type in UNSUPPORTED:
        raise UserError(f"{path} cannot be trained: {UNSUPPORTED[config.model_type]}.")
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter, which would be left out: merge it into its model (peft's "
                        "merge_and_unload), save that, and give that folder.")
    tokenizer = AutoTokenizer.from_pretrained(path, **data_only)
    model, loading = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,  # check_weights names them
        **data_only)
    return model, tokenizer, loading


def shortened(names, most=3):
    """'a, b, c and 5 more'."""
    names = sorted(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_weights(path, model, loading):
    """Raises UserError if a weight was not in the files, with this shape (it is random then), or is not a number."""
    other_shape = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    broken = {name for name, weight in model.named_parameters() if not weight.isfinite().all()}
    for names, what in ((loading["missing_keys"], "are missing"), (other_shape, "do not have the shape of its config"),
                        (broken, "are NaN or infinite")):
        if names:
            unused = loading["unexpected_keys"]
            instead = f" (and unknown: {shortened(unused)})" if unused else ""
            raise UserError(f"Weights in {path!r} {what}: {shortened(names)}{instead}. Repair the files, or give "
                            "another model or checkpoint.")
    if loading["unexpected_keys"]:
        warnings.warn(f"{path!r} holds weights that a model of its config.json does not use: "
                      f"{shortened(loading['unexpected_keys'])}.", RuntimeWarning, stacklevel=3)


def text_config(model):
    """The settings of the language model, also within a composite of text, images and sound."""
    return model.config.get_text_config(decoder=True)


def reset_settings(model):
    """Undoes settings of a stored config that change what a forward pass returns, or that could not be saved again."""
    from transformers import GenerationConfig
    for config in (model.config, text_config(model)):
        config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
        if getattr(config, "output_router_logits", False):  # asks for a loss of its own, over labels
            config.output_router_logits = False
    stored = model.generation_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")  # nothing else is used: sdar.py samples by itself
    model.generation_config = GenerationConfig(**{name: getattr(stored, name, None) for name in kept})


NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def fix_date(tokenizer):
    """Puts today's date as text into a chat template that asks for it: saved with a checkpoint, it stays the same.

    Raises UserError where the format of the date is not written in the call.
    """
    today, template = datetime.now(), tokenizer.chat_template

    def fixed(text):
        text = NOW.sub(lambda call: json.dumps(today.strftime(call[2])), text)
        if "strftime_now(" in text:
            raise UserError(f"The chat template of {tokenizer.name_or_path} computes a date in a way that cannot be "
                            "kept, so that a resumed run would have other prompts: write the date into it.")
        return text

    if isinstance(template, dict):
        tokenizer.chat_template = {name: fixed(text) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = fixed(template)


# -------------------------------------------------------------------------------------------------------- chat template

class Chat:
    """Messages -> ids: the template's own text with control tokens, the message as plain text without any.

    So an observation that contains "<|im_end|>" stays text. Works for every template that contains the message once.
    opened: "<think>" if the template itself opens the response's thought, else "". end_ids: the control token that
    follows an answer in the template, if there is one. Raises UserError for a template that does not fit.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise UserError(f"The tokenizer of {self.name!r} has no chat template: use an instruct model, or put a "
                            "chat_template.jinja into its folder.")
        mark, answer = "\ue000", "\ue001"  # private use: in no template
        question = {"role": "user", "content": mark}
        text = self.render([question], add_generation_prompt=True)
        if text.count(mark) != 1:
            raise UserError(f"The chat template of {self.name} shows a user's message {text.count(mark)} times instead "
                            "of once: such templates are not supported.")
        before, after = text.split(mark)
        self.before, self.after = self.encode(before, control=True), self.encode(after, control=True)
        thought = after.rfind("<think>")
        self.opened = after[thought:] if thought >= 0 and "</think>" not in after[thought:] else ""
        answered = self.render([question, {"role": "assistant", "content": answer}]).partition(answer)[2]
        control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.end_ids = [token for token in self.encode(answered, control=True) if token in control][:1]

    def render(self, messages, **options):
        """The template's text for these messages. Raises UserError with the template's own words if it fails."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)
        except Exception as error:  # a template is a program, and may fail in any way
            roles = " and ".join(f"one {message['role']} message" for message in messages)
            raise UserError(f"The chat template of {self.name} does not take {roles}: {describe(error)}") from error

    def encode(self, text, control=False):
        if not text.isascii():
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # half a surrogate pair, which is no character
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"])

    def ends(self, ids, count):
        """The text of the first and last tokens of a text, `count` in all, with "..." for the others."""
        first, last = ids[:(count + 1) // 2], ids[len(ids) - count // 2:]
        return " ... ".join(self.tokenizer.decode(part).strip("\ufffd") for part in (first, last))

    def prompt(self, text):
        return self.before + self.encode(text) + self.after

    def answer(self, text):
        """The ids of a response that says text, from behind what the template opens to the token that ends it."""
        end = self.end_ids or [self.tokenizer.eos_token_id]
        return self.encode(text.removeprefix(self.opened.rstrip())) + tuple(end)

    def response_text(self, ids):
        """What a response says, with the thought that the template may have opened for it."""
        return self.opened + self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def end_of_turn_ids(model, chat):
    """The tokens that end a response, a frozenset of ids. Raises UserError if there is none."""
    stop = model.generation_config.eos_token_id if model.generation_config else None
    found = frozenset({*(stop if isinstance(stop, list) else [stop]), chat.tokenizer.eos_token_id, *chat.end_ids})
    if found == {None}:
        raise UserError(f"Nothing ends a response of {chat.name}: its tokenizer has no eos_token, and its chat "
                        "template puts no control token behind an answer.")
    return found - {None}


# ------------------------------------------------------------------------------------------------- forward and backward

def recompute_activations(model):
    """Every layer keeps its input alone and runs again in the backward pass.

    transformers does the same in train mode only, where every kind of dropout and router noise comes with it: here the
    model stays in eval mode, so that sampler and trainer are one function. Raises UserError if it has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers that --recompute could run again: leave it out.")
    for layer in layers:
        layer.forward = functools.partial(recomputed, layer.forward)


def recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def autocast(policy):
    """bf16 matrix products over fp32 weights where the device is good at them."""
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=policy.autocast)


def decoder(model):
    """The part of a causal LM that gives hidden states; some (Llama 4) declare another name for it than it has."""
    if hasattr(model, "sharded_decoder"):  # lib/parallel.py
        return model.sharded_decoder
    base = model.base_model
    return model.model if base is model and hasattr(model, "model") else base


def attention_masks(model, mask, positions, dtype):
    """A packing mask [S, 1, L, L], True = may attend, and positions [S, L] -> the mask argument of a decoder that
    computes attention in dtype.

    transformers applies the windows of sliding layers only to masks that it makes itself, so they are applied here,
    in positions, which are not places in a packed sequence.
    """
    config = text_config(model)
    window, kinds = attention_window(config), set(getattr(config, "layer_types", None) or ())
    masks = {"full_attention": mask}
    if window:
        near = positions[:, None, :, None] - positions[:, None, None, :] < window
        masks["sliding_attention"] = mask & near
    if config._attn_implementation in ("eager", "sdpa"):  # these add a mask to the scores; SDPA would make such a one,
        least = torch.finfo(dtype).min                     # and keep it for the backward pass, in each layer
        masks = {kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~one, least)
                 for kind, one in masks.items()}
    if window and kinds > {"sliding_attention"}:
        return masks
    return masks["sliding_attention" if window else "full_attention"]


def attention_window(config):
    """Positions that a sliding layer sees, or None where no layer slides."""
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return getattr(config, "sliding_window", None) if used else None


def cause_of_nan(temperature):
    """Why log-probs are not finite, and what to do. Divided by less than 1e-30, ordinary logits overflow in fp32."""
    if 0 < temperature < 1e-30:
        return f"the temperature {temperature:g} is too small; raise it to 0.01 or more"
    return ("the weights have diverged, or activations overflow; take an earlier checkpoint or another model, train "
            "with a lower --lr, or use --dtype float32")


def draw_tokens(logprobs, temperature, noises):
    """logprobs [B, V], a random.Random per row -> sampled tokens [B, 1], the likeliest at temperature 0.

    A row takes one number of its own noise and nothing else, so that a batch does not change what its rows sample.
    Raises UserError if the log-probs have diverged.
    """
    if not logprobs.amax(-1).isfinite().all():  # NaN anywhere, or nothing but -inf
        raise Diverged("No token can be sampled, as the model's log-probs are not finite: "
                       f"{cause_of_nan(temperature)}.")
    if temperature == 0:
        return logprobs.argmax(-1, keepdim=True)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)  # [B, V]
    total = cumulative[:, -1:]
    drawn = torch.tensor([[noise.random()] for noise in noises], dtype=torch.float64, device=logprobs.device)
    return torch.searchsorted(cumulative, drawn * total, right=True).clamp(max=logprobs.shape[-1] - 1)


def empty_cache(model):
    """A cache of keys and values, or of what else a layer keeps, that a forward pass fills."""
    from transformers import DynamicCache
    return DynamicCache(config=model.config)


def fast_copy(model, alone=True):
    """The same function under autocast to bf16, bit for bit, for what needs no gradient: its matrices are bf16, so that
    no call casts them. All else (embeddings, norms) is fp32, a copy, or unless `alone` the model's own tensors."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    rounded = {id(matrix): matrix for matrix in matrices(model) if id(matrix) not in embedded}
    copies = {} if alone else {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copies |= {key: torch.nn.Parameter(matrix.detach().bfloat16(), False) for key, matrix in rounded.items()}
    fast, head = copy.deepcopy(model, copies), model.get_output_embeddings()
    if id(head.weight) in embedded:  # tied: the embedding stays fp32
        fast.get_output_embeddings().weight = torch.nn.Parameter(head.weight.detach().bfloat16(), False)
    return fast.requires_grad_(False) if alone else fast


def reference(model, autocast):
    """The initial weights, frozen: a copy, or beside an adapter the model itself with the adapter off."""
    if lora.has_adapter(model):
        return lora.Base(model, decoder(model))
    return fast_copy(model) if autocast else copy.deepcopy(model).requires_grad_(False)


def matrices(model):
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


@torch.no_grad()
def refresh(fast, model):
    """Copies the trained weights into what fast_copy made of the model, or into a whole copy of a sharded model; what
    both share needs nothing."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, mine in fast.named_parameters():
        if mine is not weights[name] and weights[name].requires_grad:
            mine.copy_(parallel.full(weights[name]))


@torch.no_grad()
def move_average(average, model, keep):
    """Moves the average's weights towards the model's, of which it keeps the share `keep` of its own."""
    for old, new in zip(average.parameters(), model.parameters()):
        old.lerp_(parallel.full(new), 1 - keep)
