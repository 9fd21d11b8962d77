"""The blocks of docs/hosts.md, run by stand-ins that call and reduce as each host documents."""

import enum
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hmpo import members
from hmpo.errors import ConfigError
from hmpo.objective.loss import power_mean_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hosts.md"
LENGTHS = (6, 3, 1, 5, 6, 2)
TOKENS = 21  # counted: a hole of two in row 4
N, T, PROMPT = 6, 6, 2


@dataclass
class Case:
    logp: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor

    @property
    def per_token(self) -> Tensor:
        return self.advantages[:, None] * self.mask


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(N, T, generator=generator, dtype=torch.float64) * 2
    logp = old + 0.4 * torch.randn(N, T, generator=generator, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[4, 1:3] = False
    assert int(mask.sum()) == TOKENS
    advantages = torch.tensor([1.1, -0.8, 0.5, 0.0, -1.3, 0.7], dtype=torch.float64)
    return Case(logp, old, mask, advantages)


def module(monkeypatch, name: str, **names) -> None:
    """A stand-in module under a host's name, with its parent packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    for key, value in names.items():
        setattr(sys.modules[name], key, value)


def names_of(section: str) -> dict:
    """What the page's shared block and this section's Python blocks define."""
    pages = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    own = [page for page in pages if page.startswith(f"{section}\n")]
    code = re.findall(r"```python\n(.*?)```", pages[0] + own[0], flags=re.DOTALL)
    names: dict = {"__name__": "hosts"}
    for block in code:
        if "training_client" not in block:
            exec(compile(block, f"docs/hosts.md, {section}", "exec"), names)
    return names


def gradient(case: Case, run: Callable[[Tensor], list[Tensor]]) -> Tensor:
    """Gradient after each of the host's micro-batch losses was back-propagated on its own."""
    leaf = case.logp.clone().requires_grad_()
    for loss in run(leaf):
        loss.backward()
    return leaf.grad


def expected(case: Case, reduction: str) -> Tensor:
    config = replace(members.hmpo(), reduction=reduction)
    return gradient(
        case,
        lambda leaf: [power_mean_loss(leaf, case.old, case.mask, case.advantages, config)],
    )


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    assert float(wanted.abs().max()) > 1e-3


def test_prime_rl_weights_responses_by_length(case: Case, monkeypatch) -> None:
    @dataclass
    class LossInputs:
        trainer_logprobs: Tensor
        inference_logprobs: Tensor
        ref_logprobs: Tensor | None
        advantages: Tensor
        loss_mask: Tensor
        loss_weights: Tensor | None = None

    @dataclass
    class LossOutputs:
        loss: Tensor
        metrics: dict

    module(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    function = names_of("prime-rl")["prime_rl_loss"]

    def run(leaf: Tensor) -> list[Tensor]:
        losses = []
        for i, length in enumerate(LENGTHS):
            row = [x[i, :length] for x in (leaf, case.old, case.per_token, case.mask)]
            out = function(LossInputs(row[0], row[1], None, row[2], row[3]), member="hmpo", p=-1.0)
            assert all(isinstance(value, Tensor) for value in out.metrics.values())
            losses.append(out.loss / TOKENS)
        return losses

    assert_same(gradient(case, run), expected(case, "token_mean"))


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_slime_reduces_by_its_own_option(case: Case, monkeypatch, reduction: str) -> None:
    def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, total_lengths, **options):
        assert options.keys() == {"response_lengths", "with_entropy"}
        found, start = [], 0
        for tokens, total, length in zip(
            unconcat_tokens, total_lengths, options["response_lengths"], strict=True
        ):
            picked = logits[0, start : start + total].gather(1, tokens[:, None]).squeeze(1)
            found.append(picked[total - length - 1 : total - 1])
            start += total
        return torch.empty(0), {"log_probs": found}

    host = "slime.backends.megatron_utils.loss"
    module(monkeypatch, host, get_log_probs_and_entropy=get_log_probs_and_entropy)
    function = names_of("slime")["slime_loss"]
    args = SimpleNamespace(context_parallel_size=1, use_rollout_logprobs=False)

    def reducer(masks: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def sum_of_sample_mean(values: Tensor) -> Tensor:
            rows = zip(values.split([len(m) for m in masks]), masks, strict=True)
            each = [
                (v * m).sum() / (m.sum() if reduction == "sequence_mean" else 1) for v, m in rows
            ]
            return torch.stack(each).sum()

        return sum_of_sample_mean

    def run(leaf: Tensor) -> list[Tensor]:
        losses = []
        for rows in (range(2), range(2, 6)):
            masks = [case.mask[i, : LENGTHS[i]].long() for i in rows]
            batch = {
                "unconcat_tokens": [torch.zeros(PROMPT + len(m), dtype=torch.long) for m in masks],
                "total_lengths": [PROMPT + len(m) for m in masks],
                "response_lengths": [len(m) for m in masks],
                "loss_masks": masks,
                "log_probs": [case.old[i, : LENGTHS[i]] for i in rows],
                "advantages": [case.per_token[i, : LENGTHS[i]] for i in rows],
            }
            edge = leaf.new_zeros(1)  # position t predicts token t + 1
            packed = [x for i in rows for x in (edge, leaf[i, : LENGTHS[i]], edge)]
            logits = torch.cat(packed)[None, :, None]
            loss, metrics = function(args, batch, logits, reducer(masks))
            assert not any(value.requires_grad for value in metrics.values())
            losses.append(loss / (N if reduction == "sequence_mean" else TOKENS))
        return losses

    assert_same(gradient(case, run), expected(case, reduction))
    args.context_parallel_size = 2
    with pytest.raises(ValueError, match="whole responses"):
        function(args, {}, torch.zeros(1, 1, 1), None)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_skyrl_has_the_reduction_in_its_advantages(case: Case, monkeypatch, reduction: str) -> None:
    registered = {}
    registry = SimpleNamespace(register=registered.__setitem__)
    host = "skyrl.backends.skyrl_train.utils.ppo_utils"
    module(monkeypatch, host, PolicyLossRegistry=registry)
    names_of("SkyRL")
    lengths = case.mask.sum(1, keepdim=True)
    scaled = case.per_token / (N * lengths if reduction == "sequence_mean" else TOKENS)

    def run(leaf: Tensor) -> list[Tensor]:
        losses = []
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            loss, metrics = registered["power_mean"](
                leaf[rows],
                case.old[rows],
                scaled[rows],
                config=None,
                loss_mask=case.mask[rows].double(),
                rollout_logprobs=case.old[rows],
            )
            assert all(type(value) is float for value in metrics.values())
            losses.append(loss)
        return losses

    assert_same(gradient(case, run), expected(case, reduction))


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_nemo_rl_gives_both_global_counts(case: Case, monkeypatch, reduction: str) -> None:
    kinds = enum.Enum("LossType", ["TOKEN_LEVEL", "SEQUENCE_LEVEL"])
    inputs = enum.Enum("LossInputType", ["LOGIT", "LOGPROB"])
    host = "nemo_rl.algorithms.loss.interfaces"
    module(monkeypatch, host, LossType=kinds, LossInputType=inputs)
    function = names_of("NeMo-RL")["PowerMeanLoss"](replace(members.hmpo(), reduction=reduction))
    assert function.input_type is inputs.LOGPROB
    assert function.loss_type.name == {"token_mean": "TOKEN_LEVEL"}.get(reduction, "SEQUENCE_LEVEL")
    shown = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # row 2 is masked

    def unshifted(values: Tensor) -> Tensor:
        return torch.cat([torch.full((len(values), 1), 9.0, dtype=torch.float64), values], 1)

    def run(leaf: Tensor) -> list[Tensor]:
        losses = []
        for rows in (slice(0, 3), slice(3, 6)):
            data = {
                "token_mask": unshifted(case.mask[rows].double()),
                "sample_mask": shown[rows],
                "prev_logprobs": unshifted(case.old[rows]),
                "advantages": unshifted(case.per_token[rows]),
            }
            loss, metrics = function(
                next_token_logprobs=leaf[rows],
                data=data,
                global_valid_seqs=torch.tensor(N - 1),
                global_valid_toks=torch.tensor(TOKENS - 1),
            )
            assert all(type(value) is float for value in metrics.values())
            losses.append(loss)
        return losses

    found = gradient(case, run)
    case.mask[2] = False
    assert_same(found, expected(case, reduction))


def test_tinker_divides_by_the_number_of_datums(case: Case) -> None:
    function = names_of("tinker")["tinker_loss"](N)

    def datum(i: int) -> SimpleNamespace:
        values = {"logprobs": case.old, "advantages": case.per_token, "mask": case.mask.double()}
        fields = {
            name: SimpleNamespace(to_torch=lambda v=value: v[i, : LENGTHS[i]])
            for name, value in values.items()
        }
        return SimpleNamespace(loss_fn_inputs=fields)

    def run(leaf: Tensor) -> list[Tensor]:
        losses = []
        for rows in (range(4), range(4, 6)):
            logprobs = [leaf[i, : LENGTHS[i]] for i in rows]
            loss, metrics = function([datum(i) for i in rows], logprobs)
            assert all(type(value) is float for value in metrics.values())
            losses.append(loss)
        return losses

    assert_same(gradient(case, run), expected(case, "sequence_mean"))


def test_a_band_of_the_whole_minibatch_is_refused_in_its_parts(case: Case) -> None:
    shared = names_of("tinker")
    config = replace(members.gspo(), clip_center="drift")
    with pytest.raises(ConfigError, match="minibatch_band"):
        power_mean_loss(
            case.logp, case.old, case.mask, case.advantages, config, denominators=shared["SUM"]
        )
