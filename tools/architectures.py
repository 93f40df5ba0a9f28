"""Which architectures are trained right: a small random model of every causal LM of transformers goes through sdar.py.

    python -m tools.architectures                     all of them, into docs/models.md
    python -m tools.architectures gemma3 mamba        these alone, printed

Each is saved and loaded as a user's model would be, with every kind of dropout set, windows far shorter than the
prompts, and weights large enough that logits are not flat. It is RIGHT if the sampler's and the trainer's log-probs are
those of a freshly loaded copy's plain forward passes, if activations that are recomputed give the same gradient, if an
optimiser step moves its weights, and if a checkpoint holds the same weights when it is loaded again; REFUSED if sdar.py
says in one sentence why it will not train it. Anything else is a fault of ours, and the exit status is then 1.
"""

import argparse
import dataclasses
import random
import re
import sys
import tempfile
import textwrap
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import sdar
from lib import models
from lib.checkpoints import save_checkpoint
from lib.folders import ROOT
from lib.program import UserError, describe

LIMIT = 1e-5  # of a log-prob's difference, in nats
LENGTHS = (9, 40, 90)  # of prompts: windows, chunks and indices below end within the longest
WINDOW, POSITIONS = 24, 256

SIZES = {  # of whatever field has such a name in a config class
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size", "emb_dim",
                     "lru_width", "attention_hidden_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff",
                     "dim_ff", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "shared_intermediate_size", "moe_shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
                     "o_lora_rank", "index_head_dim", "state_size", "mamba_d_state", "ssm_state_size", "qk_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_topk",
                     "hidden_size_per_layer_input", "laurel_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads",
                     "encoder_attention_heads", "attention_heads", "num_experts", "n_routed_experts",
                     "num_local_experts", "moe_num_experts", "index_n_heads", "linear_num_value_heads",
                     "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts",
                     "linear_num_key_heads", "num_decoder_layers", "n_group", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
                     "attention_head_dim", "d_kv", "global_head_dim", "mamba_n_heads", "mamba_d_head", "rotary_dim",
                     "mamba_num_heads", "mamba_head_dim", "n_mamba_heads", "time_step_rank", "mamba_dt_rank",
                     "dim_head", "query_pre_attn_scalar", "swa_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length",
                     "model_max_length", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size", "local_attention",
                     "attention_window_size", "mamba_chunk_size", "chunk_size", "local_attention_window_len"), WINDOW),
    "first_k_dense_replace": 1, "topk_group": 1, "use_sliding_window": True, "max_window_layers": 2,
    "router_jitter_noise": 0.1, "is_decoder": True, "bos_token_id": 1, "pad_token_id": 0,
    "decoder_start_token_id": 1, "vocab_size_per_layer_input": 2048}
MOST = 1.5e7  # parameters of a model that counts as small

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES = {  # what a class asks for beside the sizes above; a name in brackets is a variant
    "llama (yarn)": {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0,
                                                "original_max_position_embeddings": 32}},
    "llama (llama3)": {"rope_parameters": ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "llama (linear)": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}},
    "llama (dynamic)": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0,
                                                   "original_max_position_embeddings": 32}},
    "phi3 (longrope)": {"rope_parameters": ROPE | {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32}, "original_max_position_embeddings": 32},
    "gpt2 (64 positions)": {"n_positions": 64},
    "falcon (alibi)": {"alibi": True},
    "diffllama": {"attention_dropout": 0.0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "kimi_linear": {"num_experts_per_token": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "dots3_note": {"adapter_in_dim": SIZES["hidden_size"]}}


class Verdict(NamedTuple):
    kind: str  # right, refused, wrong, traceback, or not made: no small model of this class
    says: str


# -------------------------------------------------------------------------------------------------------- small models

def small_config(kind, overrides, words):
    """A config class -> a small config of it, of `words` tokens, with every kind of dropout and all its layer types."""
    default = kind()
    fields, values = default.to_dict(), {}
    for name, value in fields.items():
        if name in SIZES:
            values[name] = SIZES[name]
        elif isinstance(value, float) and re.search("dropout|pdrop", name):
            values[name] = 0.1
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            values[name] = (kinds * SIZES["num_hidden_layers"])[:SIZES["num_hidden_layers"]]
    if "vocab_size" in fields:
        values |= {"vocab_size": words, "eos_token_id": words - 1}
    if "kv_lora_rank" in fields:  # latent attention has no groups of heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            values[name] = small_config(type(part), overrides.get(name, {}), words).to_dict()
    return kind(**(values | {name: value for name, value in overrides.items() if name not in kind.sub_configs}))


def small_model(name, words):
    """A random model of this architecture whose logits are not flat: weights of unit gain, biases that are not 0."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    torch.manual_seed(0)
    config = small_config(CONFIG_MAPPING[name.split()[0]], OVERRIDES.get(name, {}), words)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            else:
                weight.add_(torch.randn_like(weight), alpha=0.1)
        model.eval()(input_ids=torch.arange(40)[None])  # sizes that do not fit each other raise
    return model


# -------------------------------------------------------------------------------------------------------------- verdict

def settings(folder):
    return sdar.Config(model=str(folder), max_prompt_tokens=max(LENGTHS), max_response_tokens=16, kl_coef=0.0, lr=1.0,
                       device="cpu", micro_tokens=400)


def played_rows(policy, cfg):
    """Rows of two siblings for each of LENGTHS, with random prompts, and teacher prompts that are longer."""
    words = torch.Generator().manual_seed(1)
    draw = lambda n: tuple(torch.randint(5, 2000, (n,), generator=words).tolist())
    prompts = [draw(n) for n in LENGTHS]
    teachers = {prompt: draw(5) + prompt for prompt in prompts}
    noises = [random.Random(number) for number in range(2 * len(prompts))]
    responses = sdar.sample(policy, prompts * 2, cfg, cfg.temperature, noises)
    return [sdar.Row(prompt, teachers[prompt], response.ids, advantage, response.logp)
            for prompt, response, advantage in zip(prompts * 2, responses, [1.0, -1.0, 0.5] * 2)]


def plain_logp(folder, rows, teacher=False, dtype=torch.float32):
    """Log-probs of the rows' responses by a freshly loaded model, one row at a time, with nothing of sdar.py."""
    from transformers import AutoModelForCausalLM
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval(), []
    for row in rows:
        prompt = row.teacher_ids if teacher else row.prompt_ids
        ids = torch.tensor([prompt + row.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, return_dict=True).logits[0, len(prompt) - 1:-1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt):, None])[:, 0])
    return torch.cat(found)


def largest_difference(policy, cfg, folder, rows):
    """Of sampler, student and teacher from plain forward passes, in nats."""
    worst = 0.0
    for teacher in (False, True):
        trained, plain = sdar.response_logp(policy, policy.model, rows, cfg, teacher), plain_logp(folder, rows, teacher)
        for found in (trained,) if teacher else (trained, {row: row.logp for row in rows}):
            logp = torch.tensor([x for row in rows for x in found[row]])
            worst = max(worst, (logp - plain).abs().max().item())
    return worst


def rounding_error(folder, rows):
    """How far plain forward passes are from those in fp64, in nats; 0 where an architecture cannot compute in fp64."""
    try:
        exact = [plain_logp(folder, rows, teacher, torch.float64) for teacher in (False, True)]
    except RuntimeError:
        return 0.0
    return max((plain_logp(folder, rows, bool(teacher)) - exact[teacher]).abs().max().item() for teacher in (0, 1))


def plain_step(policy, cfg, rows):
    """One step of gradient descent -> (metrics, what it changes in the weights, flat)."""
    flat = lambda: torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    before = flat()
    metrics, _ = sdar.train_step(policy, torch.optim.SGD(policy.model.parameters(), lr=cfg.lr), rows, cfg, 0)
    return metrics, flat() - before


def train_faults(policy, cfg, folder, rows, limit):
    """What is wrong with a step, with one that recomputes activations, or with a checkpoint that is loaded again."""
    faults, (metrics, change) = [], plain_step(policy, cfg, rows)
    if not change.norm() > 0:
        faults.append("a step moves nothing")
    if not metrics["rollout/logp_diff_max"] <= 2 * limit:
        faults.append(f"rollout/logp_diff_max is {metrics['rollout/logp_diff_max']:.1g}")
    try:
        thrifty = dataclasses.replace(cfg, recompute=True)
        _, again = plain_step(sdar.load_policy(thrifty), thrifty, rows)
        if not (again - change).norm() <= 1e-3 * change.norm():
            faults.append("another step with --recompute")
    except UserError:
        pass  # it refuses --recompute in a sentence
    (folder / "run").mkdir()
    saved = save_checkpoint(folder / "run", policy.model, policy.chat.tokenizer,
                                 sdar.make_optimizer(policy.model, cfg), 1)
    resumed, after = models.read_model(str(saved))[0].state_dict(), policy.model.state_dict()
    if resumed.keys() != after.keys() or not all(torch.equal(resumed[name], after[name]) for name in after):
        faults.append("a checkpoint has other weights when it is loaded again")
    return faults


def judge(name, folder):
    """-> Verdict on one architecture; folder: an empty one."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(models.TINY)
    try:
        small_model(name, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a class that asks for other sizes: nothing is known about it
        return Verdict("not made", describe(error))
    try:
        cfg = settings(folder)
        policy = sdar.load_policy(cfg)
        rows = played_rows(policy, cfg)
        worst = largest_difference(policy, cfg, folder, rows)
        rounding = rounding_error(folder, rows) if worst > LIMIT else 0.0
        limit = max(LIMIT, 4 * rounding)
        faults = [] if worst <= limit else [f"log-probs differ by {worst:.2g}, by rounding {rounding:.2g}"]
        faults += train_faults(policy, cfg, folder, rows, limit)
    except UserError as error:
        return Verdict("refused", str(error).replace(repr(str(folder)), name).replace(str(folder), name))
    except Exception as error:  # the very thing that this tool is to find
        return Verdict("traceback", describe(error))
    how = "siblings packed" if policy.packs else "a sequence per response"
    beyond = f" (its own rounding: {rounding:.1e})" if worst > LIMIT else ""
    return Verdict("wrong", "; ".join(faults)) if faults else Verdict("right", f"{worst:.1e}{beyond}, {how}")


# -------------------------------------------------------------------------------------------------------------- report

INTRODUCTION = """# Models

`--model` takes what `AutoModelForCausalLM` of transformers loads. Before a run starts, sdar.py samples a few responses
to two prompts, one as long as the settings allow (or as time allows, for a large model on a CPU), and compares the
log-probs of sampler, trainer and the model's own forward pass. Where they are not one function it refuses the model
in one sentence; where responses of one prompt can't be packed into one sequence it trains a sequence per response,
which gives the same numbers and takes longer. The model stays in eval mode throughout, so that no dropout and no router
noise gets between sampler and trainer, with `--recompute` too. Refused as well: quantised weights, weights that are
missing or NaN, and prompts beyond the positions that a model has learned (lower `--max_prompt_tokens`; beyond those
that a rotary model was made for there is a warning). Code in a model's own folder never runs.

The table is what became of a small random model of every causal LM of transformers. Right: sampler, trainer (student
and teacher, siblings, padding) and plain forward passes of a freshly loaded copy agree in fp32 within 1e-5 nats, or
within four times what the plain forward pass itself is off its value in fp64; activations that are recomputed give the
same gradient; a GRPO + SDAR step moves the weights; and the checkpoint holds the same weights when it is loaded again.
"""


def report(verdicts, seconds):
    """{name: Verdict} -> the text of docs/models.md."""
    count = lambda kind: sum(verdict.kind == kind for verdict in verdicts.values())
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "tokenizers"))
    lines = [INTRODUCTION, f"`python -m tools.architectures`, {seconds / 60:.0f} minutes on a CPU, {packages}: "
             f"**{count('right')} right, {count('refused')} refused, {count('wrong')} silently wrong, "
             f"{count('traceback')} tracebacks**.\n",
             "| model type | verdict | largest difference in nats, or what sdar.py says |", "|---|---|---|"]
    lines += [f"| {name} | {one.kind} | {one.says.replace('|', '/')} |" for name, one in verdicts.items()
              if one.kind != "not made"]
    not_made = ", ".join(name for name, one in verdicts.items() if one.kind == "not made")
    lines += ["", *textwrap.wrap(f"Not tried, since no small model of the class could be made: {not_made}.", 120)]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- command line

def every_name():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OVERRIDES})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types of transformers; default: all")
    names = parser.parse_args(argv).names
    warnings.filterwarnings("ignore")
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    verdicts, start = {}, time.perf_counter()
    for name in names or every_name():
        with tempfile.TemporaryDirectory() as folder:
            verdicts[name] = judge(name, Path(folder))
        print(f"{name:28} {verdicts[name].kind:10} {verdicts[name].says}", flush=True)
    if not names:
        (ROOT / "docs" / "models.md").write_text(report(verdicts, time.perf_counter() - start))
    return int(any(verdict.kind in ("wrong", "traceback") for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
