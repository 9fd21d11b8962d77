"""A whole update beside TRL's GRPOTrainer: rollout, rewards, log-probs, gradient, optimizer step.

python benchmarks/bench_trl.py [--only NAME]      every case, or one (nothing is written then)
python benchmarks/bench_trl.py --options          TRL's own options on the first case

Both sides have the same random weights, prompts, tokenizer, reward function, group size,
response lengths, AdamW and gradient clip, and take one optimizer step a rollout, with float32
and one thread. TRL trains as its users call it (`trainer.train()`); at the end of each of its
steps a callback runs ours, so both take turns within one run. Ours runs with
QK-clip, its default ("ours"), and in two cases also without ("ours, no clip"). One update a
rollout leaves every ratio at 1, so that all members of the family have the gradient of TRL's
sequence-level GRPO.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import ceilings, one_thread, peak_memory, roofline, save
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from work import rollout_work, update_work

from hmpo.config import PowerMeanConfig
from hmpo.stopwatch import Stopwatch
from hmpo.trainer.power_mean import PowerMeanTrainer

RATE, BETAS, NORM = 1e-6, (0.9, 0.999), 1.0
SIDES = ("trl", "ours", "ours, no clip")
BEST = {"optim": "adamw_torch_fused"}
"""TRL's fastest settings beyond those of `trl_trainer`, found by `--options`."""
OPTIONS: dict[str, dict[str, Any]] = {
    "fused AdamW": {"optim": "adamw_torch_fused"},
    "plain AdamW": {"optim": "adamw_torch"},
    "bf16 autocast": {"bf16": True},
    "micro-batches of 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    "static cache": {"cache_implementation": "static"},
}


@dataclass(frozen=True)
class Case:
    """One workload."""

    name: str
    target: float
    prompts: int = 4
    group: int = 8
    prompt: int = 32
    new: int = 64
    ends: int = 0
    """End tokens of the vocabulary; a random model ends with probability ends / vocabulary."""
    vocabulary: int = 4096
    hidden: int = 256
    inner: int = 896
    layers: int = 4
    repeats: int = 6
    bare: bool = False
    """Whether ours is also run without QK-clip."""
    memory_target: float | None = None
    device: str = "cpu"
    """Where both sides run; on cuda under bfloat16 autocast (`bench_gpu.py`)."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of what is measured."""
        return SIDES if self.bare else SIDES[:2]

    @property
    def rows(self) -> int:
        """Responses of one update."""
        return self.prompts * self.group


CASES = (
    Case("4.9M", 0.33, bare=True),
    Case("4.9M, long prompt", 0.20, prompt=512, repeats=3),
    Case("4.9M, spread lengths", 0.25, new=192, ends=85, repeats=6),
    Case("0.1M", 0.40, vocabulary=512, hidden=64, inner=128, layers=2, repeats=20, bare=True),
    Case("large vocabulary", 0.40, prompts=1, vocabulary=151_936, repeats=3, memory_target=0.20),
)


class Tally:
    """The reward function of both sides, and what it saw: how many tokens each response has."""

    __name__ = "even_share"

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The share of even token ids."""
        self.lengths = [len(ids) for ids in completion_ids]
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def model_of(case: Case) -> Qwen2ForCausalLM:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = list(end_tokens(case))
    return model.to(case.device)


def now(case: Case) -> float:
    """CPU seconds of this process; on a GPU wall seconds, once it has done what it was given."""
    if case.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def end_tokens(case: Case) -> tuple[int, ...]:
    """Ids that end a response; outside the model's vocabulary where lengths are fixed."""
    return tuple(range(3, 3 + case.ends)) or (case.vocabulary,)


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    """One word for each token id, and one more that ends texts where the model cannot."""
    words = {f"w{i}": i for i in range(case.vocabulary + 1)}
    backend = Tokenizer(WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "w0", "bos_token": "w1", "eos_token": f"w{end_tokens(case)[0]}"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


def prompts_of(case: Case, updates: int) -> list[str]:
    """Prompts of exactly `case.prompt` words, `case.prompts` for each update."""
    generator = torch.Generator().manual_seed(1)
    shape = (updates * case.prompts, case.prompt)
    ids = torch.randint(3 + case.ends, case.vocabulary, shape, generator=generator)
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def trl_trainer(case: Case, updates: int, folder: str, tally: Tally, **more: Any) -> GRPOTrainer:
    """TRL's trainer for so many updates."""
    settings = {
        "output_dir": folder,
        "max_steps": updates,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "num_generations": case.group,
        "max_completion_length": case.new,
        "num_iterations": 1,
        "steps_per_generation": more.get("gradient_accumulation_steps", 1),
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.0,
        "temperature": 1.0,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": NORM,
        "use_cpu": case.device == "cpu",
        "bf16": case.device != "cpu",
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=model_of(case),
        reward_funcs=tally,
        args=GRPOConfig(**(settings | BEST | more)),
        train_dataset=Dataset.from_dict({"prompt": prompts_of(case, updates)}),
        processing_class=tokenizer_of(case),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def our_update(case: Case, tally: Tally, *, clip: bool) -> Callable[[list[str]], Any]:
    """Our trainer's `update_step`."""
    model = model_of(case)
    config = PowerMeanConfig(
        group_size=case.group,
        max_length=case.new,
        eos_token=end_tokens(case),
        minibatches=1,
        max_grad_norm=NORM,
        qk_clip=clip,
        autocast="none" if case.device == "cpu" else "bfloat16",
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="one update per rollout")
        trainer = PowerMeanTrainer(
            model, None, optimizer, config, tally, tokenizer=tokenizer_of(case)
        )
    return trainer.update_step


class Turns(TrainerCallback):
    """Stamps each step of TRL, and runs ours after it; every side's work is checked."""

    def __init__(self, case: Case, updates: int) -> None:
        self.case = case
        self.tallies = {side: Tally() for side in case.sides}
        self.ours = {
            side: our_update(case, self.tallies[side], clip=side == "ours")
            for side in case.sides[1:]
        }
        self.prompts = prompts_of(case, updates)
        self.seconds: dict[str, list[float]] = {side: [] for side in case.sides}
        self.tokens: dict[str, list[int]] = {side: [] for side in case.sides}
        self.watch = Stopwatch()
        self.steps = self.began = 0

    def stepped(self, *_: Any) -> None:
        """Count an optimizer's step."""
        self.steps += 1

    def note(self, side: str, spent: float) -> None:
        """Keep one update, which must have been one step on the right number of responses."""
        lengths = self.tallies[side].lengths
        assert self.steps == 1, f"{side}: {self.steps} optimizer steps"
        assert len(lengths) == self.case.rows, f"{side}: {len(lengths)} responses"
        assert self.case.ends or set(lengths) == {self.case.new}, f"{side}: {lengths}"
        self.seconds[side].append(spent)
        self.tokens[side].append(sum(lengths))
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """TRL has made one update: now ours."""
        self.note("trl", now(self.case) - self.began)
        done = (state.global_step - 1) * self.case.prompts
        for side, update in self.ours.items():
            began = now(self.case)
            with self.watch if side == "ours" else nullcontext():
                metrics = update(self.prompts[done : done + self.case.prompts])
            self.note(side, now(self.case) - began)
            assert not metrics["update_skipped"] and metrics["rollout/fast"]
        if state.global_step == 1:
            self.watch.take()
        self.began = now(self.case)


def trained_tokens(trainer: GRPOTrainer, counts: list[int]) -> None:
    """Let the trainer append how many response tokens each of its losses was taken on."""
    loss = trainer._compute_loss

    def counted(model: Any, inputs: dict[str, Any]) -> Any:
        counts.append(int(inputs["completion_mask"].sum()))
        return loss(model, inputs)

    trainer._compute_loss = counted


def measure(case: Case) -> dict[str, Any]:
    """CPU seconds of an update of each side; the first of each is not counted."""
    updates = case.repeats + 1
    turns, trained = Turns(case, updates), []
    with TemporaryDirectory() as folder:
        trainer = trl_trainer(case, updates, folder, turns.tallies["trl"])
        trained_tokens(trainer, trained)
        trainer.add_callback(turns)
        hook = register_optimizer_step_post_hook(turns.stepped)
        turns.began = now(case)
        trainer.train()
        hook.remove()
    assert trained == turns.tokens["trl"], "TRL trains on other tokens than it sampled"
    micros = {
        side: statistics.median(
            1e6 * s / n for s, n in zip(turns.seconds[side][1:], turns.tokens[side][1:])
        )
        for side in case.sides
    }
    seconds = {side: statistics.median(values[1:]) for side, values in turns.seconds.items()}
    parts = turns.watch.take()
    model, lengths = trainer.model, torch.tensor(turns.tallies["ours"].lengths)
    prompts = torch.full((case.prompts,), case.prompt)
    work = [
        sum(parts)
        for parts in zip(*(f(model, prompts, lengths) for f in (rollout_work, update_work)))
    ]
    return {
        "case": case.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": case.prompts,
        "group": case.group,
        "prompt_tokens": case.prompt,
        "new_tokens": case.new,
        "tokens": {side: round(statistics.mean(turns.tokens[side][1:])) for side in case.sides},
        "cpu_s": {side: round(value, 4) for side, value in seconds.items()},
        "us_per_token": {side: round(value, 1) for side, value in micros.items()},
        "ratio": round(micros["ours"] / micros["trl"], 3),
        "ratios": {side: round(micros[side] / micros["trl"], 3) for side in case.sides[1:]},
        "target": case.target,
        "parts": {part: round(s / sum(parts.values()), 4) for part, s in parts.items()},
        **roofline(*work, micros["ours"] * 1e-6 * int(lengths.sum()), ceilings()),
    }


def one_update(case: Case, side: str, done: int) -> Callable[[], Any]:
    """One update of a side that has made `done` before, for `peak_memory`."""
    prompts = prompts_of(case, done + 1)
    if side != "trl":
        update = our_update(case, Tally(), clip=side == "ours")
        for k in range(done):
            update(prompts[k * case.prompts : (k + 1) * case.prompts])
        return partial(update, prompts[done * case.prompts :])
    folder = TemporaryDirectory()
    trainer = trl_trainer(case, 1, folder.name, Tally())
    for _ in range(done):
        trainer.train()
    trainer.folder = folder  # lives as long as the trainer
    return trainer.train


def memory(case: Case) -> dict[str, Any]:
    """Peak MiB of an update above what was there before it.

    "first" counts the optimizer's moments, which both sides make at their first step; "later"
    is any update after it.
    """
    peaks = {
        name: {side: peak_memory(one_update, case, side, done) for side in SIDES[:2]}
        for name, done in (("first", 0), ("later", 1))
    }
    ratios = {name: round(peak["ours"] / peak["trl"], 3) for name, peak in peaks.items()}
    return {"peak_mib": peaks, "peak_ratio": ratios, "peak_target": case.memory_target}


def options() -> list[dict[str, Any]]:
    """Median CPU seconds of TRL's update under each of its options, twice in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for _ in range(2):
        for name, more in OPTIONS.items():
            stamps: list[float] = []

            class Stamp(TrainerCallback):
                def on_step_end(self, *_: Any, stamps: list[float] = stamps, **__: Any) -> None:
                    stamps.append(time.process_time())

            with TemporaryDirectory() as folder:
                trainer = trl_trainer(CASES[0], 5, folder, Tally(), **more)
                trainer.add_callback(Stamp())
                trainer.train()
            seconds[name] += [b - a for a, b in pairwise(stamps)]
    return [
        {"option": name, "cpu_s": round(statistics.median(values), 3)}
        for name, values in seconds.items()
    ]


def main() -> None:
    """Measure every case, or the named one, or TRL's options."""
    one_thread()
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    parser.add_argument("--options", action="store_true")
    arguments = parser.parse_args()
    if arguments.options:
        save("trl_options", "python benchmarks/bench_trl.py --options", options())
        return
    rows = []
    for case in CASES:
        if arguments.only in (None, case.name):
            rows.append(measure(case) | (memory(case) if case.memory_target else {}))
            print(rows[-1], flush=True)
    if arguments.only is None:
        save("trl", "python benchmarks/bench_trl.py", rows)


if __name__ == "__main__":
    main()
