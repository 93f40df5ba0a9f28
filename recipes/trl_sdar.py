"""SDAR in TRL: GRPOTrainer plus the gated term of eq. (5). Written for TRL 1.16; text models.

    from recipes.trl_sdar import SDARTrainer
    trainer = SDARTrainer(model, reward_funcs, args=GRPOConfig(loss_type="dapo", delta=3.0, beta=0.01, ...),
                          train_dataset=rows, sdar_coef=0.01, gate_beta=5.0)

Each row of the dataset has, beside `prompt`, a `teacher_prompt` of the same kind (text or messages): the same request
with the skill text in it. The teacher is the model being trained: it scores the sampled ids after that prompt, without
gradient. GRPOConfig's delta is dual_clip, its beta is kl_coef; loss_type "dapo", TRL's default, divides by the response
tokens of the optimiser step, as Agg does. On the same tokens the loss is that of sdar.py, except that TRL
divides advantages by std + 1e-4, not 1e-6, and does not clamp the log-ratio of the KL term at +-10.
"""

import torch
from trl import GRPOTrainer
from trl.trainer.utils import pad

from sdar import sdar_loss  # or paste the block between the first two rulers of sdar.py here


class SDARTrainer(GRPOTrainer):
    """GRPOTrainer whose loss is eq. (5). sdar_coef: lambda; gate_beta: beta of eq. (4)."""

    def __init__(self, *args, sdar_coef=0.01, gate_beta=5.0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.loss_type != "dapo":
            raise ValueError(f"SDAR is a mean over tokens: set loss_type to dapo, not {self.loss_type}.")
        self.sdar_coef, self.gate_beta = sdar_coef, gate_beta

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "teacher_prompt" not in self._signature_columns:  # or else remove_unused_columns drops it
            self._signature_columns.append("teacher_prompt")

    def _generate_and_score_completions(self, inputs):
        """TRL's batch with the teacher's prompts, padded on the left: teacher_ids and teacher_mask [B, P]."""
        batch = super()._generate_and_score_completions(inputs)
        prompts = [torch.tensor(ids) for ids in self._tokenize_prompts([row["teacher_prompt"] for row in inputs])[0]]
        for name, rows, padding in [("teacher_ids", prompts, self._tokenizer.pad_token_id),
                                    ("teacher_mask", map(torch.ones_like, prompts), 0)]:
            batch[name] = pad(list(rows), padding_value=padding, padding_side="left").to(batch["completion_ids"].device)
        return batch

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        """Keeps what TRL computes, log-probs [B, T] and entropies, for the gated term."""
        self._scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self._scores

    def _compute_loss(self, model, inputs):
        """TRL's loss of a micro-batch plus lambda times the gated term, over the same number of tokens."""
        loss = super()._compute_loss(model, inputs)
        logp = self._scores[0]  # [B, T] with its gradient: TRL's own forward pass is used again
        ids = torch.cat([inputs["teacher_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["teacher_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            teacher_logp = self._get_per_token_logps_and_entropies(model, ids, seen, logp.size(1))[0]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        distill, metrics = sdar_loss(logp, teacher_logp, mask, beta=self.gate_beta, num_tokens=mask.sum().clamp(min=1))
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())
        return loss + self.sdar_coef * distill * mask.sum() / self._step_tokens(inputs, mode)

    def _step_tokens(self, inputs, mode):
        """Response tokens of an optimiser step, per process. TRL's num_items_in_batch is that of a generation batch."""
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens
