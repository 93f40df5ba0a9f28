"""LoRA by peft (arXiv 2106.09685): W x becomes W x + 2 B A x, with W frozen and B, A of rank R trained and saved alone.

    adapter_config.json, adapter_model.safetensors      as peft writes them: it, transformers and vLLM load the folder

The layers are put into the model in place, which stays the class of transformers that it was; without dropout, since
sampler and trainer must be one function. B starts at 0: an untrained adapter changes nothing.
"""

import contextlib
import json
import shlex
import warnings
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lib import parallel
from lib.program import UserError, optional

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder):
    """Whether a folder holds an adapter and not a whole model."""
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / "config.json").is_file()


def has_adapter(model):
    return hasattr(model, "peft_config")


def check_new(model, rank):
    """Raises UserError for a new run with an adapter on top of an adapter: its reference would be the bare base model
    instead of what it starts from."""
    if rank and is_adapter(model):
        raise UserError(f"--lora_rank {rank} starts an adapter of its own, and {model} is one: merge it into its model "
                        f"first (python -m tools.merge {shlex.quote(model)} FOLDER), and give that folder.")


def add(model, rank, seed):
    """Puts a new adapter beside all linear layers but the head, and freezes all else. Nothing at rank 0, or if there is
    an adapter already. Raises UserError under torchrun."""
    if rank and parallel.WORLD.size > 1:  # the reference would run the sharded model, for which all processes must meet
        raise UserError("--lora_rank trains in one process: start it without torchrun, or leave --lora_rank out.")
    if not rank or has_adapter(model):
        return
    peft = optional("peft", "peft")
    base = model.name_or_path
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base)
    model.base_fingerprint = fingerprint(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)


def fingerprint(model):
    """CRC-32 over the first numbers of every weight, a text: tells models of one shape apart without reading them."""
    crc = 0
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().flatten()[:256].float().cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


# ---------------------------------------------------------------------------------------------------- files of adapters

def save(model, folder):
    """Writes the adapter alone. The weights' file also keeps the base's fingerprint, among its metadata."""
    peft = optional("peft", "peft")
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS,
              metadata={"format": "pt", "base_fingerprint": model.base_fingerprint})
    model.peft_config["default"].save_pretrained(folder)


def base_of(folder):
    """-> the model that the adapter in a folder was trained beside: a folder, or a name that transformers loads.

    adapter_config.json names it, a folder by its absolute path. Where that is gone, as on another machine, it is what
    --model said to the run whose checkpoint this is: tiny, or a path from the current directory. Raises UserError.
    """
    read = lambda name: json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    try:
        base = stored = read(CONFIG)["base_model_name_or_path"]
        gone = Path(stored).is_absolute() and not Path(stored).is_dir()
        if gone and (Path(folder) / "run.json").is_file():
            base = read("run.json")["settings"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not say beside which model its adapter was trained: write that one's folder or "
                        f"name into its {CONFIG} as base_model_name_or_path.") from error
    if gone and base != "tiny" and not Path(base).is_dir():
        raise UserError(f"{folder} is an adapter beside the model {stored}, which is not there: copy that model to "
                        "this place.")
    return base


def load(model, folder, merge):
    """The base model -> the model with the adapter of a folder: merged into the weights, which are then trained, or
    beside them, to be trained itself. Raises UserError if the two do not belong together."""
    peft = optional("peft", "peft")
    before = fingerprint(model)
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        stored, expected = set(file.keys()), (file.metadata() or {}).get("base_fingerprint", before)
    if expected != before:
        raise UserError(f"{model.name_or_path} is not the model beside which the adapter in {folder} was trained, but "
                        "another of its name: put that one in its place.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names of its older versions
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below in one sentence
        adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    own = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != own:
        raise UserError(f"The adapter in {folder} does not fit {model.name_or_path}: {len(own - stored)} of its "
                        f"weights are missing, {len(stored - own)} are of no layer there.")
    if merge:
        return adapted.merge_and_unload().requires_grad_(True)
    model.base_fingerprint = before
    return adapted.get_base_model()


# ----------------------------------------------------------------------------------------------------- base and adapter

class Base:
    """The reference model of a run with an adapter, as sdar.head_inputs calls a model: the same weights with the
    adapter off, no copy. decoder: the part of the model that gives hidden states."""

    def __init__(self, model, decoder):
        self.model, self.decoder, self.config = model, decoder, model.config

    def base_model(self, **inputs):
        with adapter_off(self.model):
            return self.decoder(**inputs)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def parameters(self):
        return iter(())  # none of its own


def adapted_layers(model):
    tuners = optional("peft.tuners.tuners_utils", "peft")
    return [module for module in model.modules() if isinstance(module, tuners.BaseTunerLayer)]


@contextlib.contextmanager
def adapter_off(model):
    layers = adapted_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def round_frozen(model):
    """Rounds the frozen matrices, the head's too, to bf16, as autocast would at every use: the same numbers in half the
    memory. An embedding that the head shares stays fp32."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            module.weight = torch.nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)


@torch.no_grad()
def merged_weights(model):
    """(name, tensor) of each weight of the base model, under its own name and with the adapter merged in, one by one:
    what an engine with a copy of its own loads."""
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.get_base_layer().weight
            yield f"{name}.weight", base.float() + module.get_delta_weight("default")
    for name, weight in model.named_parameters():
        layer, _, kind = name.rpartition(".base_layer.")
        if kind != "weight" and ".lora_" not in name:
            yield f"{layer}.{kind}" if layer else name, weight.detach()
