"""Group Sequence Policy Optimization, written from its paper.

Zheng et al. (2025), arXiv 2507.18071. For the G responses y_i to a prompt, with rewards R_i:

    A_i = (R_i - mean(R)) / std(R)                                                  (eq. 4)
    s_i = (pi(y_i) / pi_old(y_i)) ^ (1 / |y_i|) = exp(mean_t d_it)                  (eq. 7)
    J   = E[ 1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i) ]     (eq. 5)

This is the independent witness of the power-mean family: it shares sampling, rewards, log-probs
and the trainer's plumbing (`hmpo.trainer.base`), and none of the means, advantages or objectives.
One deviation: a group whose rewards are all equal has advantage 0, where the paper's formula is
0/0.
"""

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from hmpo.config import GSPOConfig
from hmpo.logprobs.responses import token_logprobs_and_entropy
from hmpo.models.policy import autocast
from hmpo.stopwatch import section
from hmpo.trainer.base import Trainer
from hmpo.trainer.learning import backward
from hmpo.trainer.passes import Passes
from hmpo.trainer.rollout import Collected
from hmpo.trainer.rows import joined, rows_of_rank
from hmpo.types import Batch, Metrics, MinibatchGradient, on_host


class GSPOTrainer(Trainer[GSPOConfig]):
    """Trains a policy with GSPO; the methods are those of `PowerMeanTrainer`.

    Args:
        policy_model: a Hugging Face causal LM, or a causal `nn.Module` from ids to logits.
        ref_model: only measured (`kl/ref`); GSPO has no KL term. May be None.
        optimizer: wrapped in QK-clip unless `config.qk_clip` is off.
        config: `GSPOConfig`.
        reward_fn: TRL's signature, or a `Rewards`.
        tokenizer: for prompts given as text or as messages.
        stop: strings that end a completion's text.
        lag: rollouts between the weights that sample and those that learn.
        prompt_options: how text and messages become token ids.
        environment: as in `PowerMeanTrainer`, and so are `tools` and `max_turns`; a conversation
            is one response, whose mean is over what was sampled.
        engine: draws the rollouts instead of `hmpo.sampling`.
    """

    def advantages(self, found: Collected) -> tuple[Float[Tensor, " N"], Metrics]:
        """Equation 4, one group after the other, on the host."""
        config, group, dead = self.config, self.config.group_size, 0
        scores, counted = found.rewards.double().cpu(), found.valid.cpu()
        advantages = torch.zeros_like(scores)
        for start in range(0, len(scores), group):
            scored = [x for x in scores[start : start + group].tolist() if math.isfinite(x)]
            dead += len(scored) < 2 or min(scored) == max(scored)
            rows = [i for i in range(start, start + group) if counted[i]]
            values = scores[rows]
            if len(rows) < 2 or bool((values == values[0]).all()):
                continue
            centred = values - values.mean()
            if config.advantage_scale == "std":
                centred = centred / values.std(correction=config.std_ddof)
            advantages[rows] = centred
        return advantages.to(found.rewards), {"adv/zero_frac": dead * group / len(scores)}

    def gradient(self, batch: Batch) -> MinibatchGradient:
        """Gradient of -J (equations 5 and 7) over one minibatch, in micro-batches."""
        config, rollout = self.config, batch.rollout
        counted = batch.valid.sum().clamp(min=1)
        ranks, passes = self.ranks, Passes(self.policy, self.ranks)
        size = passes.size(config.micro_batch_size)
        micro = rows_of_rank(rollout, ranks).split(size or len(batch.rewards))
        micro = [rows for rows in micro if len(rows)]
        losses, logprobs, entropies, packed = [], [], [], False
        nothing = rollout.old_logprobs.new_zeros(())
        missing = passes.missing(len(micro))
        for rows in micro:
            forward = functools.partial(
                token_logprobs_and_entropy,
                self.policy,
                rollout.input_ids[rows],
                rollout.attention_mask[rows],
                rollout.response_ids.shape[1],
                temperature=config.temperature,
                chunk=config.logprob_chunk,
                counted=None if rollout.counted is None else rollout.counted[rows],
            )
            with section("logprobs"), autocast(rollout.response_ids.device, config):
                result = passes.run(forward)
            with section("objective"):
                new = result.logprobs
                s = self._log_ratio(batch, new, rows).exp()
                advantage = batch.advantages[rows].to(s.dtype) * batch.valid[rows]
                bounded = s.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
                loss = -torch.minimum(s * advantage, bounded * advantage).sum() / counted
            backward(loss, due=True)
            losses.append(loss.detach())
            logprobs.append(new.detach())
            entropies.append(result.entropy.detach())
            packed = result.packed
        passes.make_up(missing, rollout, config, gradient=True)
        return MinibatchGradient(
            loss=ranks.total(torch.stack(losses or [nothing]).sum()),
            logprobs=joined(logprobs, micro, rollout, ranks),
            entropy=joined(entropies, micro, rollout, ranks),
            packed=ranks.any(packed),
        )

    @section("telemetry")
    def measure(self, batch: Batch, gradient: MinibatchGradient, *, applied: bool) -> Metrics:
        """Ratios, clipped shares and divergences of the minibatch, at one wait for the device."""
        config, rows = self.config, batch.valid
        mask = batch.rollout.response_mask & rows[:, None]
        log_s = self._log_ratio(batch, gradient.logprobs).double()
        s, sign = log_s.exp(), batch.advantages.sign() * rows
        high = (s > 1 + config.epsilon_high) & (sign > 0)
        low = (s < 1 - config.epsilon_low) & (sign < 0)
        d = (gradient.logprobs - batch.rollout.old_logprobs).double()

        def per_row(x: Tensor) -> Tensor:
            return torch.where(rows, x, 0).sum() / rows.sum()

        def per_token(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0).sum() / mask.sum()

        variance = per_token((d - per_token(d)).square())
        metrics = {
            "n_seq": rows.sum(),
            "n_tokens": mask.sum(),
            "pg_loss": gradient.loss,
            "ratio/logG": per_row(log_s),
            "ratio/m_mean": per_row(s),
            "ratio/sigma": variance.sqrt(),
            "ratio/sigma_sqrt_l": (variance * mask.sum() / rows.sum()).sqrt(),
            "clip/frac": per_row((high | low).double()),
            "clip/frac_pos": high.sum() / (sign > 0).sum().clamp(min=1),
            "clip/frac_neg": low.sum() / (sign < 0).sum().clamp(min=1),
            "kl/k1": per_token(-d),
            "kl/k3": per_token(d.exp() - 1 - d),
            "entropy": per_token(gradient.entropy.double()),
        }
        if batch.ref_logprobs is not None:
            to_ref = (batch.ref_logprobs - gradient.logprobs).double()
            metrics["kl/ref"] = per_token(to_ref.exp() - 1 - to_ref)
        measured = on_host(metrics)
        if measured["n_seq"] == 0:  # nothing to take a mean of
            measured = {name: measured[name] for name in ("n_seq", "n_tokens", "pg_loss")}
        return measured | {"ratio/p": 0.0, "update/packed": float(gradient.packed)}

    def _log_ratio(
        self, batch: Batch, logprobs: Tensor, rows: Tensor | slice = slice(None)
    ) -> Float[Tensor, " M"]:
        """Log s_i of equation 7: the mean of a response's token log ratios."""
        mask = batch.rollout.response_mask[rows].to(logprobs.dtype)
        return ((logprobs - batch.rollout.old_logprobs[rows]) * mask).sum(1) / mask.sum(1)
