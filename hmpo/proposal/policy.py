"""What a policy is, as far as it can be seen without its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hmpo.config import PolicyConfig
from hmpo.errors import HmpoError, ModelError
from hmpo.models.chat import refuse_options, render
from hmpo.models.hub import check_architecture
from hmpo.models.loading import load_tokenizer
from hmpo.models.memory import meta_policy
from hmpo.models.paths import is_adapter, resolve_policy_path
from hmpo.models.policy import unwrap
from hmpo.models.precision import stored_precision
from hmpo.models.probe import longest_row
from hmpo.models.source import whole_policy

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates let a model think before it answers, or not."""
ASKED = ({"role": "user", "content": "0"},)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Layers that get LoRA adapters where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """A policy without its weights.

    Example: `PolicyFacts(kind="qwen2", parameters=494_032_768, stored="bfloat16", ...)`.
    """

    kind: str
    """`model_type` of its configuration."""
    parameters: int
    """Numbers in its weights, tied ones counted once."""
    stored: str
    """Precision of most weights in the files; empty where that is no usual one."""
    context: int | None
    """Tokens of the longest row that it reads; None without a limit."""
    adapter: bool
    """Whether the folder holds LoRA adapters on top of another policy."""
    projections: bool
    """Whether every layer has the four projections that LoRA takes of itself."""
    template: bool
    """Whether the tokenizer renders messages."""
    switch: str
    """Variable of the template that keeps it from thinking when false; empty where it has none, or
    does not think of itself."""
    thinks: bool
    """Whether the template itself opens `<think>`."""
    tokenizer: Any

    def renders(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Whether the template accepts these messages."""
        return _rendered(self.tokenizer, messages) is not None

    def __str__(self) -> str:
        """In a line."""
        parts = [f"{self.kind}, {count_of(self.parameters)} parameters"]
        if self.stored:
            parts[0] += f" stored as {self.stored}"
        if self.adapter:
            parts.append("LoRA adapters")
        parts.append("chat template" if self.template else "no chat template")
        if self.switch or self.thinks:
            parts.append("thinks before it answers")
        if self.context is not None:
            parts.append(f"context {self.context}")
        return ", ".join(parts)


def count_of(number: int) -> str:
    """A number of parameters as it is read: `494.0M`, `7.6B`, `812`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def look_at_policy(policy: PolicyConfig) -> PolicyFacts:
    """Configuration, tokenizer and the headers of the weights' files; a hub's is downloaded.

    Args:
        policy: its `path` and `revision`.

    Raises:
        ModelError: one line; there is no such policy, or it is none that is trained.
    """
    given = resolve_policy_path(policy.path, policy.revision)
    folder = whole_policy(policy)
    check_architecture(folder, policy.path)
    tokenizer = load_tokenizer(folder, policy.path)
    plain = PolicyConfig(path=policy.path, revision=policy.revision)
    model = meta_policy(plain)
    core: Any = unwrap(model)
    stored = stored_precision(folder).main
    template = _has(tokenizer, {})
    opening = _rendered(tokenizer, ASKED) if template else None
    return PolicyFacts(
        kind=str(core.config.model_type),
        parameters=sum(p.numel() for p in model.parameters()),
        stored="" if stored is None else str(stored).removeprefix("torch."),
        context=longest_row(model),
        adapter=is_adapter(given),
        projections=_projected(core),
        template=template,
        switch=next((n for n in SWITCHES if template and _switches(tokenizer, n)), ""),
        thinks=opening is not None and str(tokenizer.decode(opening)).rstrip().endswith("<think>"),
        tokenizer=tokenizer,
    )


def _has(tokenizer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the tokenizer has a template, and that these variables."""
    try:
        refuse_options(tokenizer, options)
    except ModelError:
        return False
    return True


def _switches(tokenizer: Any, name: str) -> bool:
    """Whether a question is rendered otherwise once the variable is false."""
    if not _has(tokenizer, {name: False}):
        return False
    off = _rendered(tokenizer, ASKED, {name: False})
    return off is not None and off != _rendered(tokenizer, ASKED)


def _rendered(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any] | None = None
) -> list[int] | None:
    """Ids of messages; None where the template refuses them."""
    try:
        return render(tokenizer, messages, options=options)
    except HmpoError:
        return None


def _projected(core: Any) -> bool:
    """Whether each of the four projections is there at least once a layer."""
    layers = int(getattr(core.config.get_text_config(), "num_hidden_layers", 1))
    names = [name.rpartition(".")[2] for name, _ in core.named_modules()]
    return all(names.count(projection) >= layers for projection in PROJECTIONS)
