"""TRL's own GRPOTrainer on the runs of studies/trl.toml, and both side by side.

    hmpo experiment run studies/trl.toml
    python studies/trl_anchor.py                       all runs that have no outcome yet, then both
    python studies/trl_anchor.py --only grpo+spell+fresh --seeds 100
    python studies/trl_anchor.py --compare             what is there, and nothing is run

Of each cell of the suite TRL makes the run that the same settings describe, as cell `trl-CELL`:
`loss_type = "grpo"`, for GSPO with `importance_sampling_level = "sequence"`. Read from the suite's
own configuration, and so the same: base weights, training prompts and their order, group size,
prompts a rollout, updates, learning rate and its linear schedule, AdamW's settings, gradient clip,
clip widths, no KL term. Held-out prompts are measured by our Evaluator on TRL's weights at the same
updates with the same sampling noise, so that `before` is equal to the bit.

What differs, beside the code:
* Sampling. TRL draws responses from torch's global generator, we from one for each rollout: the
  runs of a seed share policy and prompts, but not a single response. Differences are paired by
  seed, which takes out less noise than between our own members.
* Minibatches. Both deal a rollout's responses out anew, in different orders.
* Advantages are divided by the group's standard deviation; TRL adds 1e-4 to it.
* A response ends at a newline in both; for us at the policy's own end token too, which the tiny
  policies never write where they were fitted.
* QK-clip is on in our runs, at 100; these policies' logits stay far below.

Outcomes go to studies/outcomes/trl.jsonl.gz after each run; one that is there is not made again.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL tells its hub of each trainer otherwise

import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hmpo.config import RunConfig
from hmpo.config.identity import config_hash
from hmpo.config.places import located
from hmpo.lab.statistics.verdicts import verdict
from hmpo.lab.study.outcomes import LATE, Outcome, collect, read_outcomes, save_outcomes
from hmpo.lab.suite.cells import Cell
from hmpo.lab.suite.reading import Suite, read_suite
from hmpo.models import load_policy, stop_token_ids
from hmpo.models.tokens import pad_token_id
from hmpo.randomness import seed_everything
from hmpo.run.build import make_rewards, trainer_config, use_machine
from hmpo.run.evaluation import Evaluation, Evaluator
from hmpo.tasks import make_task

HERE = Path(__file__).parent
SUITE = HERE / "trl.toml"
OUTCOMES = HERE / "outcomes" / "trl.jsonl.gz"
LEVELS = {"grpo": "token", "gspo": "sequence"}
"""TRL's importance_sampling_level by member."""
POINTS = 64


def trl_settings(config: RunConfig, seed: int) -> dict[str, Any]:
    """The arguments of TRL's trainer that say what a run's configuration says."""
    trainer, optimizer, objective = config.trainer, config.optimizer, config.objective
    rows = config.prompts_per_rollout * trainer.group_size
    return {
        "max_steps": config.updates,
        "per_device_train_batch_size": rows // trainer.minibatches,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": trainer.minibatches,
        "num_iterations": trainer.epochs,
        "num_generations": trainer.group_size,
        "max_completion_length": trainer.max_length,
        "temperature": trainer.temperature,
        "loss_type": "grpo",
        "importance_sampling_level": LEVELS[objective.name],
        "epsilon": objective.clip_low,
        "epsilon_high": objective.clip_high,
        "beta": 0.0,
        "scale_rewards": "group",
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": trainer.lr_schedule,
        "warmup_steps": trainer.warmup_updates,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": 1e-8,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": trainer.max_grad_norm,
        "shuffle_dataset": False,
        "seed": seed,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


class Measuring(TrainerCallback):
    """Evaluates TRL's policy when a run of ours would."""

    def __init__(self, evaluator: Evaluator, config: RunConfig) -> None:
        self.evaluator, self.config = evaluator, config
        self.found: list[tuple[int, Evaluation]] = []

    def measure(self, step: int) -> None:
        """All held-out prompts of the run, after so many updates."""
        ends = step in (0, self.config.updates)
        prompts = self.config.eval.final_prompts if ends else self.config.eval.prompts
        self.found.append((step, self.evaluator.evaluate(prompts, step=step)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first update."""
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an update."""
        if state.global_step % self.config.eval.every == 0 or state.global_step == args.max_steps:
            self.measure(state.global_step)


def trl_hash(config: RunConfig, seed: int) -> str:
    """Of all that decides TRL's run: our settings, TRL's, and its version."""
    told = [config_hash(config), trl_settings(config, seed), trl.__version__]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def run(cell: Cell, seed: int) -> Outcome:
    """TRL's run of a cell of ours, and what it came to."""
    own = cell.run_config(seed, ".")
    config = located(own)
    use_machine(config)
    seed_everything(seed)
    task = make_task(config.task, seed)
    rewards = make_rewards(config, task)
    loaded = load_policy(config.policy)
    ends = stop_token_ids(loaded.tokenizer, task.stop, loaded.model)
    pad = pad_token_id(loaded.tokenizer, loaded.model)
    measuring = Measuring(
        Evaluator(
            policy=loaded.model,
            tokenizer=loaded.tokenizer,
            task=task,
            rewards=rewards,
            config=trainer_config(config, eos_token=ends, pad_token=pad, seed=seed),
            batch_size=config.eval.batch_size,
            seed=seed,
            success=config.eval.success,
        ),
        config,
    )
    rollouts = config.updates // (config.trainer.minibatches * config.trainer.epochs)
    examples = [task.train(i) for i in range(rollouts * config.prompts_per_rollout)]
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.eos_token = task.stop[0]
    names = examples[0].columns

    def right(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list:
        """The task's own check, without what TRL adds to the columns."""
        kept = {name: columns[name] for name in names}
        return task.reward(prompts, completions, completion_ids, **kept)

    failure, began = "", time.process_time()
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=loaded.model,
            reward_funcs=right,
            args=GRPOConfig(output_dir=folder, **trl_settings(config, seed)),
            train_dataset=Dataset.from_list([{"prompt": e.prompt, **e.columns} for e in examples]),
            processing_class=tokenizer,
            callbacks=[measuring],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except (RuntimeError, ValueError, FloatingPointError) as error:  # it failed: an outcome
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    rewards.close()
    spent = time.process_time() - began
    return outcome(cell, own, seed, trainer.state, measuring.found, failure, spent)


def outcome(
    cell: Cell,
    config: RunConfig,
    seed: int,
    state: Any,
    found: Sequence[tuple[int, Evaluation]],
    failure: str,
    spent: float,
) -> Outcome:
    """The record of a run, from TRL's own log and our evaluations."""
    logs = [entry for entry in state.log_history if "loss" in entry]
    used = {entry["step"]: int(entry.get("num_tokens", 0)) for entry in logs}
    sampled = [e.sampled for _, e in found]
    greedy = [e.greedy.value if e.greedy else None for _, e in found]
    told = dict(found)
    end = max(1, len(logs) // 10)
    return Outcome(
        suite="trl",
        cell=f"trl-{cell.name}",
        levels=dict(cell.levels) | {"member": f"trl-{cell.levels['member']}"},
        seed=seed,
        status="failed" if failure else "finished",
        reason=failure,
        config_hash=trl_hash(config, seed),
        updates=state.global_step,
        tokens=max(used.values(), default=0),
        evals={
            "step": [step for step, _ in found],
            "tokens": [used.get(step, 0) for step, _ in found],
            "sampled": [rate.value for rate in sampled],
            "greedy": greedy,
            "reward": [e.mean_reward for _, e in found],
        },
        before=counts(told.get(0)),
        after=counts(told.get(config.updates)),
        passed=[e.passed for _, e in found],
        heldout=found[-1][1].heldout if found else None,
        metrics={
            "entropy_end": mean(logs[-end:], "entropy"),
            "reward_mean_end": mean(logs[-end:], "reward"),
            "length_mean": mean(logs, "completions/mean_length"),
            "clip_frac": mean(logs, "clip_ratio/region_mean"),
        },
        reward=thinned(logs, "reward"),
        cost={"cpu_s": round(spent, 2)},
        environment={
            "torch": torch.__version__,
            "trl": trl.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
    )


def counts(evaluation: Evaluation | None) -> dict[str, Any]:
    """Successes, as an outcome of ours has them."""
    if evaluation is None or evaluation.greedy is None:
        return {}
    found = evaluation.sampled
    return {"sampled": found.successes, "n": found.trials, "greedy": evaluation.greedy.successes}


def mean(logs: Sequence[dict[str, Any]], name: str) -> float | None:
    """Over the entries that have it."""
    values = [entry[name] for entry in logs if name in entry]
    return float(f"{sum(values) / len(values):.7g}") if values else None


def thinned(logs: Sequence[dict[str, Any]], name: str) -> dict[str, list[Any]]:
    """Means of at most `POINTS` stretches of updates."""
    parts = min(POINTS, len(logs))
    cuts = [(i * len(logs) // parts, (i + 1) * len(logs) // parts) for i in range(parts)]
    means = [mean(logs[first:last], name) for first, last in cuts]
    return {"step": [logs[last - 1]["step"] for _, last in cuts], "mean": means}


def ours(suite: Suite, out: Path) -> list[Outcome]:
    """What our own runs of the suite came to: in its folder, or as committed."""
    committed = suite.outcomes if suite.outcomes and suite.outcomes.exists() else None
    if (out / suite.name / "suite.json").is_file():
        return collect(out / suite.name, committed)
    return read_outcomes(committed) if committed else []


def endpoint(found: Outcome, last: int) -> float:
    """The protocol's: mean success of the last evaluations; a run that failed has 0."""
    values = found.evals["sampled"][-last:] if found.status != "failed" else []
    return sum(values) / len(values) if values else 0.0


def side_by_side(suite: Suite, theirs: Sequence[Outcome], own: Sequence[Outcome]) -> list[str]:
    """A line for each cell that both have run: the difference over the seeds that they share."""
    assert suite.protocol is not None, "studies/trl.toml names a protocol"
    last, smallest = suite.protocol.data["endpoint"]["last"], suite.protocol.data["smallest"]
    lines = []
    for cell in suite.cells:
        mine = {o.seed: o for o in own if o.cell == cell.name}
        trls = {o.seed: o for o in theirs if o.cell == f"trl-{cell.name}"}
        seeds = sorted(mine.keys() & trls.keys())
        if not seeds:
            lines.append(f"{cell.name}: no seed that both have run")
            continue
        same = sum(mine[s].passed[:1] == trls[s].passed[:1] for s in seeds)
        gaps = [endpoint(mine[s], last) - endpoint(trls[s], last) for s in seeds]
        means = [sum(endpoint(x[s], last) for s in seeds) / len(seeds) for x in (mine, trls)]
        told = verdict(gaps, smallest, method="hmpo", baseline="TRL").sentence
        cpu = [sum(x[s].cost.get("cpu_s") or 0 for s in seeds) / len(seeds) for x in (mine, trls)]
        lines.append(
            f"{cell.name}: hmpo {means[0]:.3f}, TRL {means[1]:.3f}, {len(seeds)} seeds, equal "
            f"before training in {same}; {told} CPU seconds a run: {cpu[0]:.1f} and {cpu[1]:.1f}."
        )
    return lines


def registered(suite: Suite, cell: Cell, seed: int, known: Iterable[Outcome]) -> str:
    """The protocol that a run which begins now was decided by, as a suite's folder has it.

    `LATE` where the protocol has changed since the first run of the file, or the suite has no such
    seed; "" without a protocol.
    """
    if suite.protocol is None:
        return ""
    present = suite.protocol.sha256
    first = {outcome.registered for outcome in known} - {"", LATE}
    return present if first <= {present} and seed in cell.seeds else LATE


def make(suite: Suite, cells: Sequence[Cell], seeds: Sequence[int], path: Path) -> list[Outcome]:
    """Make the runs that are not there, saving after each; all outcomes of the file."""
    found = {o.key(): o for o in read_outcomes(path)} if path.exists() else {}
    todo = [(cell, seed) for seed in seeds for cell in cells]
    for cell, seed in todo:
        key = (f"trl-{cell.name}", seed)
        known = found.get(key)
        if known is not None and known.config_hash == trl_hash(cell.run_config(seed, "."), seed):
            continue
        decided = registered(suite, cell, seed, found.values())
        found[key] = dataclasses.replace(run(cell, seed), registered=decided)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_outcomes(path, found.values())
        told = found[key].evals["sampled"]
        shown = " ".join(f"{value:.3f}" for value in told)
        print(f"{key[0]}, seed {seed}: {shown} ({found[key].cost['cpu_s']} s)", flush=True)
    return [found[key] for key in sorted(found)]


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, then say how both sides compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", help="cells of studies/trl.toml")
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the suite by default")
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES)
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="of our own runs")
    parser.add_argument("--compare", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    suite = read_suite(str(SUITE))
    unknown = set(args.only or ()) - {cell.name for cell in suite.cells}
    if unknown:
        parser.error(f"no cell {min(unknown)}; the suite has {[c.name for c in suite.cells]}")
    cells = [cell for cell in suite.cells if not args.only or cell.name in args.only]
    seeds = [] if args.compare else args.seeds or suite.cells[0].seeds
    theirs = make(suite, cells, seeds, args.outcomes)
    chosen = dataclasses.replace(suite, cells=tuple(cells))
    print("\n".join(side_by_side(chosen, theirs, ours(suite, args.out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
