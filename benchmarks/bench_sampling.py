"""Group rollouts against Hugging Face `generate` called as TRL 1.16 calls it.

python benchmarks/bench_sampling.py [--only NAME]
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import ceilings, one_thread, roofline, save
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from work import rollout_work

from hmpo.sampling.responses import sample_responses

SIZES = {
    "1M": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4},
    "11M": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_hidden_layers": 4,
    },
    "58M": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
    },
}
HEADS = {"1M": 4, "11M": 6, "58M": 8}


@dataclass(frozen=True)
class Case:
    """One workload: prompts x group, prompt lengths from half of `prompt` to `prompt`."""

    name: str
    size: str
    prompts: int
    group: int
    prompt: int
    new: int
    ends: int = 0
    """End tokens of the vocabulary; a random model ends with probability ends / vocabulary."""
    target: float = 1.0
    repeats: int = 5


CASES = (
    Case("1M", "1M", 16, 8, 64, 64, target=0.50, repeats=5),
    Case("11M", "11M", 16, 8, 64, 32, target=0.25, repeats=5),
    Case("58M", "58M", 8, 8, 64, 12, target=0.20, repeats=5),
    Case("1M, long response", "1M", 16, 8, 32, 256, target=0.55, repeats=3),
    Case("1M, long prompt", "1M", 8, 16, 256, 32, target=0.15, repeats=5),
    Case("1M, spread lengths", "1M", 16, 8, 32, 192, ends=11, target=0.25, repeats=5),
)


def build(case: Case) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """(model, prompt ids, prompt mask)."""
    torch.manual_seed(0)
    settings = SIZES[case.size] | {"num_attention_heads": HEADS[case.size]}
    model = LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=1024)).eval()
    ids = torch.randint(16, settings["vocab_size"], (case.prompts, case.prompt))
    lengths = torch.randint(case.prompt // 2, case.prompt + 1, (case.prompts, 1))
    lengths[0] = case.prompt
    mask = torch.arange(case.prompt) >= case.prompt - lengths
    return model, ids.masked_fill(~mask, 0), mask


def sides(case: Case, model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The sides as functions that return the number of tokens made."""
    ends = tuple(range(3, 3 + case.ends)) or (10**6,)
    config = GenerationConfig(
        max_new_tokens=case.new,
        do_sample=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=list(ends),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
    )
    wide, wide_mask = (x.repeat_interleave(case.group, 0) for x in (ids, mask))

    def generate() -> int:
        with torch.no_grad():
            out = model.generate(
                input_ids=wide, attention_mask=wide_mask.long(), generation_config=config
            )[:, case.prompt :]
        ended = torch.isin(out, torch.tensor(ends, device=out.device)).int().cumsum(1)
        return int((ended == 0).sum() + (ended.amax(1) > 0).sum())

    def ours(decoder: str) -> int:
        rollout = sample_responses(
            model,
            ids,
            mask,
            group_size=case.group,
            max_length=case.new,
            eos_token=ends,
            decoder=decoder,
        )
        assert rollout.fast == (decoder == "auto")
        return int(rollout.response_mask.sum())

    return {"generate": generate, "module": lambda: ours("module"), "fast": lambda: ours("auto")}


def necessary(case: Case, model: Any, ids: Tensor, mask: Tensor) -> tuple[float, float]:
    """Operations and bytes of one rollout, each prompt read once, no finished row kept."""
    rollout = sample_responses(
        model,
        ids,
        mask,
        group_size=case.group,
        max_length=case.new,
        eos_token=tuple(range(3, 3 + case.ends)) or (10**6,),
        generator=torch.Generator().manual_seed(0),
    )
    return rollout_work(model, mask.sum(1), rollout.lengths)


def measure(case: Case) -> dict[str, Any]:
    """Median CPU microseconds per token of each side, run in turn."""
    model, ids, mask = build(case)
    runs = sides(case, model, ids, mask)
    for run in runs.values():
        run()
    micros: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(case.repeats):
        for name, run in runs.items():
            torch.manual_seed(repeat)
            began = time.process_time()
            tokens = run()
            spent = time.process_time() - began
            seconds[name].append(spent)
            micros[name].append(1e6 * spent / tokens)
    middle = {name: statistics.median(values) for name, values in micros.items()}
    work = necessary(case, model, ids, mask)
    return {
        "case": case.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": case.prompts,
        "group": case.group,
        "prompt_tokens": case.prompt,
        "new_tokens": case.new,
        "cpu_s": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
        "us_per_token": {name: round(value, 2) for name, value in middle.items()},
        "module_ratio": round(middle["module"] / middle["generate"], 3),
        "ratio": round(middle["fast"] / middle["generate"], 3),
        "target": case.target,
        **roofline(*work, statistics.median(seconds["fast"]), ceilings()),
    }


def main() -> None:
    """Measure every case, or the named one (nothing is written then)."""
    one_thread()
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    only = parser.parse_args().only
    rows = []
    for case in CASES:
        if only in (None, case.name):
            rows.append(measure(case))
            print(rows[-1], flush=True)
    if only is None:
        save("sampling", "python benchmarks/bench_sampling.py", rows)


if __name__ == "__main__":
    main()
