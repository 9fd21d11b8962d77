"""The probes of a policy: log-probs, gradients, sampling, end tokens.

QK-clip is asked in `hmpo.probes.clip`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hmpo.attention.packing_check import packing_obstacle
from hmpo.errors import HmpoError, ModelError
from hmpo.logprobs.responses import response_loss, token_logprobs_and_entropy
from hmpo.models.chat import PromptOptions, prompt_rows, turn_end_ids
from hmpo.models.evaluation import evaluating
from hmpo.models.loading import checkpoint_layers
from hmpo.models.policy import unwrap
from hmpo.models.probe import COARSE, masked_inputs, policy_facts
from hmpo.models.tokens import end_token_ids, pad_token_id
from hmpo.probes.clip import clip_finding
from hmpo.probes.finding import Finding
from hmpo.probes.rows import Rows, logits_alone, logprobs_alone, padded, rows_for
from hmpo.randomness import random_state_kept
from hmpo.sampling import sample_responses
from hmpo.trainer.learning import differentiable

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Difference of two log-probs, as a share of the logits' spread, that is rounding and no more."""
GRADIENT = {torch.float64: 1e-5, torch.float32: 5e-3}
"""Error of a weight's gradient, relative to its norm, that is."""
COARSE_GRADIENT = 0.3
"""The same for 16-bit weights."""
SAMPLED = 8
"""Tokens of a sampled response, at most."""


def probe_policy(
    policy: nn.Module,
    tokenizer: Any,
    *,
    temperature: float = 1.0,
    eos_token: int | tuple[int, ...] | None = None,
) -> Iterator[Finding]:
    """Ask every probe, one after the other; the policy is left as it was.

    A probe that ends in an error has failed: a run would end there, or be wrong.

    Args:
        policy: a transformers causal LM, or one wrapped by peft, as it would be trained.
        tokenizer: its tokenizer.
        temperature: of the run.
        eos_token: ids that the run says end a response; None takes what tokenizer and policy name.
    """
    ends = (eos_token,) if isinstance(eos_token, int) else eos_token
    asked = Probes(policy, tokenizer, temperature, ends)
    training = [module.training for module in policy.modules()]
    gradients = [(parameter, parameter.grad) for parameter in policy.parameters()]
    for name, ask in asked.every().items():
        with random_state_kept():
            try:
                finding = ask()
            except Exception as error:  # a model may fail in any way; that is what is asked
                kind = "" if isinstance(error, HmpoError) else f"{type(error).__name__}: "
                first = (str(error).splitlines() or [""])[0]
                finding = asked.finding(False, f"{kind}{first}")
        for module, flag in zip(policy.modules(), training, strict=True):
            module.training = flag
        for parameter, own in gradients:
            parameter.grad = own
        yield Finding(name=name, status=finding.status, line=finding.line)


class Probes:
    """A policy, the rows that it is asked with, and the probes as methods."""

    def __init__(
        self,
        policy: nn.Module,
        tokenizer: Any,
        temperature: float,
        ends: tuple[int, ...] | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.temperature = policy, tokenizer, temperature
        self.ends = ends
        self.core: Any = unwrap(policy)
        config: Any = self.core.config
        self.vocabulary = config.get_text_config().vocab_size
        self.dtype = next(policy.parameters()).dtype
        self._rows: Rows | None = None
        self._spread = 1.0

    def every(self) -> dict[str, Callable[[], Finding]]:
        """In the order in which they are asked."""
        return {
            "finite logits": self.finite,
            "batch invariance": self.batch,
            "left padding": self.left_padding,
            "packing": self.packing,
            "temperature": self.tempered,
            "recomputed log-probs": self.twice,
            "gradient": self.gradient,
            "recomputed layers": self.recomputed_layers,
            "end tokens": self.end_tokens,
            "begin token": self.begin_token,
            "sampler": self.sampler,
            "QK-clip": lambda: clip_finding(self.policy, self.rows.ids[2:3, 2:]),
        }

    def finding(self, ok: bool | None, line: str) -> Finding:
        """A finding whose name is not known here; None is not applicable."""
        status = "not applicable" if ok is None else "ok" if ok else "FAILED"
        return Finding(name="", status=status, line=line)

    @property
    def rows(self) -> Rows:
        """Made at the first call."""
        if self._rows is None:
            self._rows = rows_for(self.policy, self.vocabulary)
        return self._rows

    @property
    def limit(self) -> float:
        """Difference in nat that is rounding."""
        return ROUNDING.get(self.dtype, COARSE) * max(1.0, self._spread) / self.temperature

    # ------------------------------------------------------------------------------ log-probs

    @torch.no_grad()
    def finite(self) -> Finding:
        """Logits of each row alone."""
        with evaluating(self.policy):
            pairs = zip(self.rows.prompts, self.rows.responses, strict=True)
            logits = torch.cat([logits_alone(self.policy, *pair) for pair in pairs]).float()
        bad = int((~logits.isfinite()).sum())
        spread = float(logits[logits.isfinite()].std())
        self._spread = spread if spread == spread else 1.0
        kind = str(self.dtype).removeprefix("torch.")
        return self.finding(bad == 0, f"{bad} of {logits.numel()} not finite, {kind}")

    def ours(self, rows: Rows, temperature: float = 1.0) -> tuple[list[Tensor], bool]:
        """Log-probs as the trainer computes them, and whether rows were packed."""
        with torch.no_grad():
            found = token_logprobs_and_entropy(
                self.policy, rows.ids, rows.mask, rows.length, temperature=temperature
            )
        return real(found.logprobs, rows.responses), found.packed

    def off(self, found: list[Tensor], rows: Rows, temperature: float = 1.0) -> float:
        """Largest difference in nat from the rows alone."""
        with torch.no_grad():
            pairs = zip(rows.prompts, rows.responses, strict=True)
            truth = [logprobs_alone(self.policy, *pair, temperature) for pair in pairs]
        return worst(found, truth)

    def batch(self) -> Finding:
        """A row beside two different others."""
        first = self.ours(self.rows.select([0, 1]))[0][0]
        second = self.ours(self.rows.select([0, 2]))[0][0]
        off = max(worst([first], [second]), self.off([first], self.rows.select([0])))
        return self.finding(off <= self.limit, f"a row among others differs by {nats(off)}")

    @torch.no_grad()
    def left_padding(self) -> Finding:
        """Masked padding before a row, straight through the model."""
        facts = policy_facts(self.policy)
        if not facts.left_padding:
            why = facts.obstacles.get("left_padding", "")
            return self.finding(None, f"rows are moved left, which is exact and slower ({why})")
        rows = self.rows
        with evaluating(self.policy):
            inputs = masked_inputs(rows.mask, positions=facts.positions)
            out: Any = self.policy(input_ids=rows.ids, use_cache=False, return_dict=True, **inputs)
        wide = torch.promote_types(out.logits.dtype, torch.float32)
        table = out.logits[:, -rows.length - 1 : -1].to(wide).log_softmax(-1)
        chosen = rows.ids[:, -rows.length :, None]
        off = self.off(real(table.gather(-1, chosen)[..., 0], rows.responses), rows)
        return self.finding(off <= self.limit, f"padded rows differ by {nats(off)}")

    def packing(self) -> Finding:
        """Rows in one sequence, as an update has them."""
        obstacle = packing_obstacle(self.policy, self.core)
        found, packed = self.ours(self.rows)
        off, how = self.off(found, self.rows), "packed" if packed else "padded"
        line = f"{how} rows differ by {nats(off)}" + (f" (not packed: {obstacle})" * bool(obstacle))
        return self.finding(off <= self.limit, line)

    def tempered(self) -> Finding:
        """At the temperature of the run, or 0.7."""
        value = self.temperature if self.temperature != 1 else 0.7
        off = self.off(self.ours(self.rows, value)[0], self.rows, value)
        limit = self.limit * self.temperature / value
        return self.finding(off <= limit, f"at {value:g}, log-probs differ by {nats(off)}")

    def twice(self) -> Finding:
        """The same log-probs again, the policy in training mode."""
        self.policy.train()
        off = worst(self.ours(self.rows)[0], self.ours(self.rows)[0])
        count = sum(isinstance(m, nn.Dropout) and m.p > 0 for m in self.policy.modules())
        line = f"twice the same rows differ by {nats(off)}, {count} dropout layers switched off"
        return self.finding(off <= self.limit, line)

    # ------------------------------------------------------------------------------- gradients

    def weights(self) -> dict[str, nn.Parameter]:
        """Those that train."""
        return {n: p for n, p in self.policy.named_parameters() if p.requires_grad}

    def taken(self) -> dict[str, Tensor]:
        """Their gradients, which are gone from the policy then."""
        found = {n: p.grad for n, p in self.weights().items() if p.grad is not None}
        self.policy.zero_grad(set_to_none=True)
        return found

    def own_gradient(self) -> dict[str, Tensor]:
        """By plain autograd, row by row."""
        self.policy.zero_grad(set_to_none=True)
        with differentiable():
            pairs = zip(self.rows.prompts, self.rows.responses, strict=True)
            for k, (prompt, response) in enumerate(pairs):
                weight = (-1.0) ** k / len(response)
                with evaluating(self.policy):
                    (weight * logprobs_alone(self.policy, prompt, response).sum()).backward()
        return self.taken()

    def trainers_gradient(self) -> dict[str, Tensor]:
        """By the pass that an update takes."""
        rows = self.rows
        lengths = torch.tensor([len(r) for r in rows.responses], device=rows.ids.device)
        signs = torch.tensor([(-1.0) ** k for k in range(len(lengths))], device=rows.ids.device)

        def loss(new: Tensor, some: Any) -> Tensor:
            return ((signs / lengths)[some, None].to(new) * new).sum()

        self.policy.zero_grad(set_to_none=True)
        with differentiable(), evaluating(self.policy):
            response_loss(self.policy, rows.ids, rows.mask, rows.length, loss).loss.backward()
        return self.taken()

    def compared(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
        """Largest error of a weight's gradient, relative to its norm, and whose."""
        norms = {n: float(g.float().norm()) for n, g in other.items()}
        least = 1e-3 * max(filter(math.isfinite, norms.values()), default=0.0)
        errors: dict[str, float] = {}
        for n, norm in norms.items():
            if norm == 0:
                continue
            gap = float((one[n].float() - other[n].float()).norm()) if n in one else math.inf
            error = gap / max(norm, least)
            errors[n] = error if math.isfinite(error) else math.inf  # one that is no number
        name = max(errors, key=lambda n: errors[n], default="none")
        return errors.get(name, math.inf), name

    def gradient(self) -> Finding:
        """Of an update's pass, tied head or not, against autograd of the rows alone."""
        if not self.weights():
            return self.finding(None, "no weight trains")
        self.policy.train()
        error, name = self.compared(self.trainers_gradient(), self.own_gradient())
        limit = GRADIENT.get(self.dtype, COARSE_GRADIENT)
        return self.finding(error <= limit, f"{self.tied()}, worst {error:.1e} at {name}")

    def tied(self) -> str:
        """Whether embedding and head are one."""
        head, table = self.core.get_output_embeddings(), self.core.get_input_embeddings()
        one = head is not None and getattr(head, "weight", None) is getattr(table, "weight", 0)
        return "tied head" if one else "untied head"

    def recomputed_layers(self) -> Finding:
        """`policy.gradient_checkpointing`: the same gradient."""
        if not self.weights():
            return self.finding(None, "no weight trains")
        if any(getattr(module, "gradient_checkpointing", False) for module in self.core.modules()):
            return self.finding(None, "they are recomputed already, see gradient")
        self.policy.train()
        plain = self.trainers_gradient()
        hooks = {module: set(module._forward_hooks) for module in self.core.modules()}
        try:
            checkpoint_layers(self.core)
            error, name = self.compared(self.trainers_gradient(), plain)
        except ModelError:
            return self.finding(None, "transformers recomputes none of its layers")
        finally:
            former = "gradient_checkpointing_disable"  # the name that older transformers have
            name_now = "activation_checkpointing_disable"
            (getattr(self.core, name_now, None) or getattr(self.core, former))()
            for module, kept in hooks.items():  # one that makes embeddings require gradients stays
                for key in set(module._forward_hooks) - kept:
                    del module._forward_hooks[key]
        limit = GRADIENT.get(self.dtype, COARSE_GRADIENT)
        return self.finding(error <= limit, f"worst gradient {error:.1e} off at {name}")

    # ---------------------------------------------------------------------------------- tokens

    def end_tokens(self) -> Finding:
        """That there are some, in the vocabulary; what they are, and the padding."""
        ends, turns = set(self.ends or ()), set[int]()
        if self.ends is None:
            ends = set(end_token_ids(self.tokenizer, self.policy))
            turns = set(turn_end_ids(self.tokenizer))
        pad = pad_token_id(self.tokenizer, self.policy)
        if not ends | turns:
            return self.finding(False, "no token ends a response: trainer.eos_token must name one")
        outside = [i for i in ends | turns if i >= self.vocabulary]
        names = [f"{i} {self.tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ends | turns)]
        line = f"{', '.join(names)}; padding {pad}" + (" (an end token)" * (pad in ends))
        if outside:
            line += f"; {outside} beyond the vocabulary of {self.vocabulary}"
        return self.finding(not outside, line)

    def begin_token(self) -> Finding:
        """One BOS before a conversation, not two."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None or not getattr(self.tokenizer, "chat_template", None):
            return self.finding(None, "no chat template, or no begin token")
        asked = [{"role": "user", "content": "1"}]
        (row,) = prompt_rows(self.tokenizer, [asked], PromptOptions())
        leading = next((k for k, token in enumerate(row) if token != bos), len(row))
        return self.finding(leading <= 1, f"{leading} before a conversation of {len(row)} tokens")

    def sampler(self) -> Finding:
        """What sampling recorded, against each row alone and against the trainer."""
        rows, device = self.rows, self.rows.ids.device
        rollout = sample_responses(
            self.policy,
            rows.prompt_ids,
            rows.prompt_mask,
            group_size=2,
            max_length=SAMPLED,
            temperature=self.temperature,
            eos_token=self.ends,
            generator=torch.Generator(device=device).manual_seed(0),
            tokenizer=self.tokenizer,
        )
        prompts = [rows.prompts[k // 2] for k in range(len(rollout.finished))]
        masks = zip(rollout.response_ids, rollout.response_mask, strict=True)
        sampled = padded(prompts, [ids[mask].tolist() for ids, mask in masks], rows.ids)
        old = real(rollout.old_logprobs, sampled.responses)
        trainer = self.ours(sampled, self.temperature)[0]
        off = max(self.off(old, sampled, self.temperature), worst(old, trainer))
        how = "fast decoder" if rollout.fast else "the model's own modules"
        return self.finding(
            off <= self.limit, f"{how}, log-probs differ by {nats(off)} from the trainer's"
        )


def real(values: Tensor, responses: list[list[int]]) -> list[Tensor]:
    """Each row without its padding."""
    return [row[: len(response)] for row, response in zip(values, responses, strict=True)]


def worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference; infinite where one is not a number or a length is another."""
    largest = 0.0
    for one, other in zip(found, truth, strict=True):
        if one.shape != other.shape:
            return float("inf")
        gap = float((one.double() - other.double()).abs().max())
        largest = max(largest, gap if gap == gap else float("inf"))
    return largest


def nats(value: float) -> str:
    """A difference of log-probs in words."""
    return f"{value:.1e} nat"
