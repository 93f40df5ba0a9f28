"""Tests of what is said of memory (lib/memory.py), held to what torch allocates, and of the settings that save it."""

import contextlib
import dataclasses
import types
from unittest.mock import patch

import pytest
import torch

import kernels
import sdar
from conftest import config, flags, refused
from lib import cache, memory, models
from lib.folders import read_settings
from lib.program import UserError
from tools import memory as tool

WIDE = 3, 128, 512, 4, 2, 1024, True  # layers, hidden, feed-forward, heads, heads of keys, vocabulary, tied
LIMITS = {"max_prompt_tokens": 128, "max_response_tokens": 16, "micro_tokens": 1024, "rollout_batch": 4}


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"dtype": "bfloat16"}], ids=str)
def test_the_predicted_peak_is_within_15_percent_of_what_torch_allocates(changes):
    torch.manual_seed(0)
    cfg = tool.config(**LIMITS | changes)
    policy = tool.make_policy(tool.qwen(*WIDE), cfg)
    parts, measured = memory.predict(cfg, policy), tool.measure(policy, cfg)
    assert max(measured, key=measured.get) == "update"
    assert 1 / 1.15 < memory.peak(parts) / max(measured.values()) < 1.15


def test_weights_and_copies_are_counted_once_and_to_the_byte(policy):
    size = sum(p.numel() for p in policy.model.parameters())
    embedded = policy.model.get_input_embeddings().weight.numel()
    matrices = sum(m.numel() for m in models.matrices(policy.model))
    cfg = config(kl_coef=0.01, updates=2, micro_tokens=4096)
    parts = memory.predict(cfg, policy)
    assert parts["always"] == {"weights": 4 * size, "AdamW": 8 * size, "reference": 4 * size}
    assert parts["update"]["gradients"] == 4 * size and parts["update"]["copy to undo a step"] == 12 * size
    half = tool.make_policy(policy.model, dataclasses.replace(cfg, dtype="bfloat16"))
    half.ema, frozen = half.model, 4 * (size - matrices + embedded)  # the head is tied: its copy is a matrix more
    always = memory.predict(cfg, half)["always"]
    assert always == {"weights": 4 * size, "AdamW": 8 * size, "average": 4 * size, "bf16 copy": 2 * matrices,
                      "reference": frozen + 2 * matrices}
    waiting = memory.predict(dataclasses.replace(cfg, offload_reference=True), half)
    assert "reference" not in waiting["always"] and waiting["scoring"]["reference"] == always["reference"]


def test_a_frozen_base_has_neither_gradients_nor_optimiser_state_nor_bf16_casts():
    policies = [tool.on_paper("Qwen2.5-0.5B", rank) for rank in (0, 8)]
    whole, adapter = (memory.predict(tool.config(), policy) for policy in policies)
    trained = adapter["update"]["gradients"]
    assert adapter["always"]["AdamW"] == 2 * trained < whole["always"]["AdamW"] / 50
    assert adapter["update"]["bf16 weights"] == 0 < whole["update"]["bf16 weights"]
    assert "reference" not in adapter["always"] and [memory.held(p) for p in policies] == [4 * 151936 * 896, 0]


def test_layers_that_differ_in_width_count_as_the_widest():
    from transformers import Gemma3nTextConfig, Gemma4TextConfig
    of = lambda config: memory.shape_of(types.SimpleNamespace(config=config))
    assert of(Gemma3nTextConfig(num_hidden_layers=3, intermediate_size=[32, 64, 48])).wide == 64
    one = Gemma4TextConfig(num_attention_heads=2, head_dim=8, global_head_dim=16, num_key_value_heads=1)
    assert (of(one).query, of(one).keys) == (2 * 16, 2 * 16)


def test_where_rows_join_an_empty_cache_alone_all_their_prompts_count(policy, monkeypatch):
    cfg = config(rollout_batch=512, max_prompt_tokens=4096)
    bounded = memory.sampling(cfg, memory.shape_of(policy.model), policy)
    monkeypatch.setattr(cache, "make_cache", lambda model: cache.Grown())
    whole = memory.sampling(cfg, memory.shape_of(policy.model), policy)
    assert whole["activations"] == bounded["activations"] * 512 * 4096 // memory.PREFILL


def test_bounds_of_the_kernels_are_those_that_predictions_use():
    assert (memory.KEPT_LOGITS, memory.CHUNK) == (kernels.KEEP_BYTES, kernels.GPU_CHUNK)


@contextlib.contextmanager
def gpu_with(gigabytes):
    """With so much free, of which torch holds one."""
    with patch.object(torch.cuda, "mem_get_info", lambda _: (gigabytes * 1e9 - 1e9, 0)), \
            patch.object(torch.cuda, "memory_reserved", lambda _: 9e9), \
            patch.object(torch.cuda, "memory_allocated", lambda _: 8e9):
        yield


def test_auto_takes_the_largest_micro_batch_that_fits_on_the_gpu_and_the_default_on_a_cpu(policy):
    cfg, on_gpu = tool.config(micro_tokens=0), tool.on_paper("Qwen2.5-1.5B", 0)
    predict = lambda size: memory.predict(dataclasses.replace(cfg, micro_tokens=size), on_gpu)
    there = sum(predict(0)["always"].values()) - predict(0)["always"]["AdamW"]
    for vllm in None, types.SimpleNamespace(cache_bytes=9e9, stays_awake=True):
        on_gpu.vllm, there = vllm, there + (9e9 + 2 * 1543.7e6 if vllm else 0)
        with gpu_with(70):
            chosen = memory.choose_micro_tokens(cfg, on_gpu)
        need = [memory.peak(predict(size)) - there for size in (chosen, chosen + 1024)]
        assert chosen > 4096 and need[0] < memory.USABLE * 70e9 < need[1]
        assert ("cache" in predict(0)["sampling"]) == (vllm is None)
    on_gpu.vllm.stays_awake = False
    assert predict(0)["sampling"] == {"vLLM": memory.vllm_bytes(on_gpu)} and "vLLM" not in predict(0)["always"]
    with gpu_with(5):
        assert memory.choose_micro_tokens(cfg, on_gpu) == memory.MICRO_TOKENS[0]
    assert memory.choose_micro_tokens(cfg, policy) == 4096


def test_auto_is_resolved_once_and_stored_with_the_run(model_folder, tmp_path, capsys):
    assert sdar.parse_args(["--micro_tokens", "auto"])[0] == {"micro_tokens": 0}
    refused(sdar.main, ["--micro_tokens", "some"], "--micro_tokens: 'some' is not a whole number", capsys)
    assert sdar.main(flags(model_folder, tmp_path / "run", steps=0, eval_every=0, eval_tasks=None,
                           micro_tokens="auto")) == 0
    assert read_settings(tmp_path / "run", sdar.Config).micro_tokens == 4096
    assert "micro-batches of 4096 tokens" in capsys.readouterr().out


def test_weights_that_wait_elsewhere_are_on_the_device_within_the_block_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor.clone()):
        memory.offloaded(types.SimpleNamespace(ref=model, device=torch.device("cuda")))
        for ref, device in (None, "cuda"), (model, "cpu"):  # an evaluation of such a run; a run that goes on on a CPU
            memory.offloaded(types.SimpleNamespace(ref=ref, device=torch.device(device)))
    home = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    for error in (None, MemoryError()):
        moved = lambda tensor, device, **_: (tensor + 0 if device == "gpu" else tensor)
        with patch.object(torch.Tensor, "to", moved), contextlib.suppress(MemoryError), memory.on_device(model, "gpu"):
            assert not {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} & {*home}
            if error:
                raise error
        assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == home


@pytest.mark.parametrize("changes, culprit", [
    ({"device": "cpu"}, "on a CPU all models are in host memory"), ({"kl_coef": 0.0}, "there is no reference model"),
    ({"lora_rank": 4}, "there is no reference model")])
def test_offloading_that_would_do_nothing_is_refused(changes, culprit):
    device = lambda name: types.SimpleNamespace(type="cpu" if name == "cpu" else "x")
    with patch.object(models, "choose_device", device):
        with pytest.raises(UserError, match=f"--offload_reference would do nothing here, since {culprit}"):
            sdar.make_config({"offload_reference": True, "model": "other"} | changes)
        assert sdar.make_config({"offload_reference": True, "model": "other"}).offload_reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autograd_keeps_what_is_predicted_and_one_mask_for_all_layers(dtype):
    cfg = tool.config(dtype=dtype)
    policy = tool.make_policy(tool.qwen(*WIDE), cfg)
    batch = sdar.pack([tuple(range(200))], [[tuple(range(30)), tuple(range(26))]], policy.device)
    weights, kept, masks = {p.data_ptr() for p in policy.model.parameters()}, {}, set()

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        if tensor.shape[-2:] == batch.mask.shape[-2:]:
            masks.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden, _ = sdar.head_inputs(policy, policy.model, batch)
    shape, half = memory.shape_of(policy.model), dtype == "bfloat16"
    casts = 2 * (sum(m.numel() for m in models.matrices(policy.model)) - shape.vocab * shape.hidden) if half else 0
    expected = 256 * (shape.layers * memory.kept(shape, half) + 8 * shape.hidden + (2 if half else 4) * 256) + casts
    assert hidden.requires_grad and len(masks) == 1 and expected == pytest.approx(sum(kept.values()), rel=0.03)


@pytest.mark.slow
def test_memory_stays_flat_over_many_steps():
    row, = tool.flat(60)  # `python -m tools.memory flat` plays 150
    assert abs(row["last / early"] - 1) < 0.02
