"""HMPO inside TRL's GRPOTrainer: sorting ten digits, on a CPU in a minute or two."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # TRL tells its hub of each trainer otherwise

import sys

from datasets import Dataset
from transformers import TrainerCallback

from hmpo.adapters.trl.trainer import PowerMeanGRPOConfig, PowerMeanGRPOTrainer
from hmpo.config import PolicyConfig, TaskConfig
from hmpo.models import load_policy
from hmpo.tasks import make_task

GENERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
PROMPTS, GROUP, MINIBATCHES, EPOCHS = 32, 8, 2, 2

loaded = load_policy(PolicyConfig(path="tiny-sort"))
loaded.tokenizer.eos_token = "\n"  # an answer ends with its line
task = make_task(TaskConfig(name="sort"))
examples = [task.train(index) for index in range(GENERATIONS * PROMPTS)]
dataset = Dataset.from_list([{"prompt": e.prompt, **e.columns} for e in examples])


def success(completions, answer, **columns):
    """1 for the digits in order, else 0."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]


class Progress(TrainerCallback):
    """One line for each generation, read from the record of its last update."""

    def __init__(self):
        self.trainer, self.rewards = None, []

    def on_step_end(self, args, state, control, **kwargs):
        """Called by TRL after each optimizer update."""
        record = self.trainer.last_record
        if state.global_step % (MINIBATCHES * EPOCHS):
            return
        self.rewards.append(record["reward/mean"])
        print(
            f"generation {len(self.rewards):3d}  success {record['reward/mean']:.3f}  "
            f"KL {record['kl/k3']:.5f}  clipped {record['clip/frac']:.4f}"
        )


args = PowerMeanGRPOConfig(
    output_dir="runs/trl_hmpo",
    objective="hmpo",  # p = -1, token clip 0.4 in log space; try "gspo", or exponent="learnable"
    num_generations=GROUP,
    per_device_train_batch_size=PROMPTS * GROUP // MINIBATCHES,
    steps_per_generation=MINIBATCHES,  # times num_iterations: the updates of a generation;
    num_iterations=EPOCHS,  # if that is 1, all ratios are 1 and p has no effect
    max_steps=GENERATIONS * MINIBATCHES * EPOCHS,
    max_completion_length=12,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    adam_beta2=0.95,
    max_grad_norm=0.5,
    activation_checkpointing=False,
    bf16=False,
    use_cpu=True,
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
    seed=0,
)
progress = Progress()
trainer = PowerMeanGRPOTrainer(
    loaded.model,
    success,
    args=args,
    train_dataset=dataset,
    processing_class=loaded.tokenizer,
    callbacks=[progress],
)
progress.trainer = trainer
trainer.train()
first, last = (sum(part) / len(part) for part in (progress.rewards[:3], progress.rewards[-3:]))
print(f"success of the first three generations {first:.3f}, of the last three {last:.3f}")
print(f"records: {args.output_dir}/telemetry.jsonl")
