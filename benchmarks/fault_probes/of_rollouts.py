"""Probes of rollouts: sampling, end tokens, masks, rewards."""

import math
from typing import Any

import torch

from benchmarks.fault_probes import models
from benchmarks.fault_probes.of_policy import CLOSE, alone
from benchmarks.fault_probes.protocol import Outcome, Sampled, Subject, judge, probe

END, OTHER = models.END, models.OTHER_END


def both_ends(seed: int = 0) -> Any:
    """A model whose own settings name two end tokens."""
    model = models.llama(seed)
    model.generation_config.eos_token_id = [END, OTHER]
    return model


def _share(values: list[bool]) -> str:
    return f"{sum(values)} of {len(values)}"


@probe("only one of several end tokens is known", "trl PR 7039")
def several_end_tokens(subject: Subject) -> Outcome:
    """Responses end at either token, count it, and are not called truncated."""
    found: Sampled = subject.sample(both_ends(), limit=12)
    last = [response[-1] in (END, OTHER) for response in found.responses]
    inside = [END in r[:-1] or OTHER in r[:-1] for r in found.responses]
    wrong = [a != b for a, b in zip(found.finished, last, strict=True)]
    return judge(
        not any(inside) and not any(wrong) and any(r[-1] == OTHER for r in found.responses),
        f"{_share(last)} end by themselves, {sum(wrong)} misread, {sum(inside)} went on behind one",
    )


@probe("the truncation mask hides finished responses", "trl PR 7039, #6369")
def truncation_mask(subject: Subject) -> Outcome:
    """With truncated responses masked, those that ended, at either token, still learn."""
    found = subject.sample(both_ends(), limit=12, mask_truncated=True)
    ends = [bool(r) and r[-1] in (END, OTHER) for r in found.responses]
    lost = sum(end and not learns for end, learns in zip(ends, found.learns, strict=True))
    kept = sum(learns and not end for end, learns in zip(ends, found.learns, strict=True))
    return judge(lost == kept == 0, f"{lost} finished responses masked, {kept} truncated ones not")


@probe("the end token is masked where it is the padding token too", "own list")
def end_token_as_padding(subject: Subject) -> Outcome:
    """Padding and end share an id: the first end token still counts."""
    tokenizer = models.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = models.llama(pad_token_id=END)
    found = subject.sample(model, limit=12, tokenizer=tokenizer)
    finished = [r for r, end in zip(found.responses, found.finished, strict=True) if end]
    counted = [bool(r) and r[-1] == END and END not in r[:-1] for r in finished]
    return judge(
        bool(finished) and all(counted), f"{_share(counted)} finished responses keep their end"
    )


@probe("all responses truncated and masked gives NaN", "trl#6369")
def all_truncated(subject: Subject) -> Outcome:
    """No response ends within two tokens; all are masked; the update is finite."""
    trace = subject.train(models.decided(-2.0), updates=1, limit=2, mask_truncated=True)
    return judge(trace.finite, f"weights {'finite' if trace.finite else 'not finite'} after it")


@probe("an empty response breaks the batch", "own list")
def empty_responses(subject: Subject) -> Outcome:
    """Every response is the end token alone."""
    found = subject.sample(models.decided(2.0), limit=6)
    lengths = {len(r) for r in found.responses}
    ok = lengths == {1} and all(found.finished) and all(map(math.isfinite, found.advantages))
    return judge(ok, f"lengths {sorted(lengths)}, finished {_share(found.finished)}")


@probe("the share of truncated responses is measured wrongly", "verl#7817, trl#7011")
def truncation_metric(subject: Subject) -> Outcome:
    """The reported share is that of the responses without an end token."""
    found = subject.sample(both_ends(), limit=12)
    truth = sum(r[-1] not in (END, OTHER) for r in found.responses) / len(found.responses)
    told = found.metrics.get("truncated", math.nan)
    return judge(abs(told - truth) < 1e-6, f"reported {told:.3f}, truth {truth:.3f}")


@probe("log-probs ignore that top-p cut the distribution", "trl#6789, #6945, #7269")
def truncated_sampling(subject: Subject) -> Outcome:
    """Under top_p = 0.6 the behaviour's log-probs are those of what was sampled from, or a word."""
    model = models.llama()
    found = subject.sample(model, limit=6, top_p=0.6)
    full = [alone(model, p, r) for p, r in zip(found.prompts, found.responses, strict=True)]
    if found.behaviour is None:
        said = f"told: {found.told[0][:70]}" if found.told else "nothing recorded or said"
        return judge(bool(found.told), f"{said}; ratios are formed against the uncut distribution")
    worst, mass = 0.0, []
    for values, prompt, response, whole in zip(
        found.behaviour, found.prompts, found.responses, full, strict=True
    ):
        truth = _nucleus(model, prompt, response, 0.6)
        worst = max(worst, float((values.double() - truth).abs().max()))
        mass.append(float((whole - truth).exp().mean().detach()))
    share = sum(mass) / len(mass)
    return judge(
        worst < 1e-3, f"recorded within {worst:.1e} nat; uncut would give ratios of {share:.2f}"
    )


def _nucleus(model: Any, prompt: list[int], response: list[int], top_p: float) -> torch.Tensor:
    """Log-probs under top-p, token by token."""
    model.eval()
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    values = []
    for row, token in zip(logits.softmax(-1).detach(), response, strict=True):
        order = row.argsort(descending=True)
        before = row[order].cumsum(0) - row[order]
        kept = order[before < top_p]
        values.append(float(torch.log(row[token] / row[kept].sum())))
    return torch.tensor(values, dtype=torch.float64)


@probe("the sampler's log-probs are not the trainer's", "trl#4159, verl#2996")
def sampler_against_trainer(subject: Subject) -> Outcome:
    """Old log-probs at temperature 0.7 are those of the weights that sampled."""
    model = models.llama()
    found = subject.sample(model, limit=6, temperature=0.7)
    if found.old is None:
        return judge(True, "none kept on-policy: the update's own serve")
    worst = max(
        float((old.double() - alone(model, p, r, 0.7)).detach().abs().max())
        for old, p, r in zip(found.old, found.prompts, found.responses, strict=True)
    )
    return judge(worst < CLOSE, f"old log-probs differ by {worst:.1e} nat")


@probe("the responses of a group are one response", "own list")
def group_differs(subject: Subject) -> Outcome:
    """Sixteen tokens' worth of chance: not all responses of a group are equal."""
    found = subject.sample(models.llama(spread=0.02), limit=6)
    distinct = len({tuple(r) for r in found.responses})
    return judge(distinct > len(found.responses) // 2, f"{distinct} of {len(found.responses)}")


@probe("columns reach another prompt's responses", "own list")
def columns_of_their_prompt(subject: Subject) -> Outcome:
    """Each completion is scored with the columns of its own prompt."""
    wrong: list[str] = []

    def reward(prompts: Any, completions: Any, digit: Any, **_: Any) -> list[float]:
        wrong.extend(p for p, d in zip(prompts, digit, strict=True) if d not in p)
        return [float(len(c)) for c in completions]

    prompts = ["1>", "23>", "4>", "56>"]
    columns = {"digit": [prompt[0] for prompt in prompts]}
    found = subject.sample(models.llama(), limit=4, prompts=prompts, columns=columns, reward=reward)
    return judge(
        not wrong and len(found.responses) == 16, f"{len(wrong)} of 16 scored with another's column"
    )


@probe("a reward of the wrong length is stretched", "trl#6533")
def rewards_of_wrong_length(subject: Subject) -> Outcome:
    """One reward for eight completions is refused."""
    found = subject.sample(models.llama(), limit=4, reward=lambda completions, **_: [1.0])
    return judge(False, f"accepted: {len(found.advantages)} advantages of one reward")


@probe("a reward that is always None trains on, untold", "trl#6966, #7364")
def reward_always_none(subject: Subject) -> Outcome:
    """A word, or an error."""
    found = subject.sample(
        models.llama(), limit=4, reward=lambda completions, **_: [None] * len(completions)
    )
    silent = all(a == 0 for a in found.advantages)
    line = f"told: {found.told[0][:80]}" if found.told else "nothing said"
    return judge(bool(found.told) and silent, line.replace("\n", " "))


@probe("a reward that is always 0 trains on, unmeasured", "verl#7405")
def reward_always_zero(subject: Subject) -> Outcome:
    """The share of groups without a signal is reported, or told."""
    found = subject.sample(models.llama(), limit=4)
    share = found.metrics.get("silent", math.nan)
    return judge(
        share == 1.0 or bool(found.told), f"share of groups without signal reported: {share:.3g}"
    )


@probe("a reward changes the data of later ones", "own history")
def reward_that_changes_columns(subject: Subject) -> Outcome:
    """A list in a column, emptied by the reward function, is whole at the next rollout."""
    data = {"parts": [["a", "b"], ["c", "d"]]}
    seen: list[int] = []

    def reward(completions: Any, parts: Any, **_: Any) -> list[float]:
        seen.extend(len(part) for part in parts)
        for part in parts:
            part.clear()
        return [0.0] * len(completions)

    for _ in range(2):
        subject.sample(
            models.llama(), limit=2, prompts=["1>", "2>"], columns=data, reward=reward, group=4
        )
    return judge(seen.count(2) == len(seen), f"{seen.count(0)} of {len(seen)} columns came empty")


@probe("a prompt that has its BOS gets another", "own list")
def doubled_bos(subject: Subject) -> Outcome:
    """Rendered text that begins with BOS, and messages whose template writes it: one BOS each."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    )
    bos = tokenizer.bos_token_id
    chat = subject.tokenised([{"role": "user", "content": "12"}], tokenizer)
    text = subject.tokenised(f"{tokenizer.bos_token}12>", tokenizer)
    counts = [ids.count(bos) for ids in (chat, text)]
    return judge(counts == [1, 1], f"BOS tokens: {counts[0]} of messages, {counts[1]} of text")
