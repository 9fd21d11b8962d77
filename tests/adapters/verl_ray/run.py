"""One run of `python -m verl.trainer.main_ppo`: its files, its command line, its time limit."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hmpo.config import TaskConfig
from hmpo.models.paths import TINY_SORT
from hmpo.tasks import make_task
from tests.adapters.verl_ray.ended import all_ended
from tests.adapters.verl_ray.record import RECORD, STEPS, WORKERS, log_file

ROOT = Path(__file__).resolve().parents[3]
HERE = __package__
MAIN = ("-m", "verl.trainer.main_ppo")
PROMPTS, RESPONSES = 4, 4
"""Prompts in a step, and responses to each; half of them are in a minibatch."""
LR = 1e-4
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def prepare(folder: Path) -> None:
    """The bundled policy with a chat template, and prompts of its task, in `folder`."""
    import pyarrow
    import pyarrow.parquet

    shutil.copytree(TINY_SORT, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    task = make_task(TaskConfig(name="sort", level=10), seed=0)
    examples = [task.train(index) for index in range(PROMPTS * STEPS)]
    rows = [
        {
            "data_source": "sort",
            "prompt": [{"role": "user", "content": example.prompt}],
            "reward_model": {"style": "rule", "ground_truth": example.columns["answer"]},
            "extra_info": {"index": index},
        }
        for index, example in enumerate(examples)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")


def overrides(folder: Path) -> list[str]:
    """What is told to verl: the loss as docs/scaling.md has it, a small run, and the processor."""
    policy = "actor_rollout_ref."
    loss = [
        f"{policy}actor.loss_agg_mode=seq-mean-token-mean",
        f"{policy}actor.policy_loss._target_=hmpo.adapters.verl.PowerMeanLossConfig",
        f"{policy}actor.policy_loss.loss_mode=power_mean",
        f"+{policy}actor.policy_loss.member=hmpo",
        f"+{policy}actor.policy_loss.p=-1.0",
    ]
    run = [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "data.shuffle=False",
        "data.dataloader_num_workers=0",
        f"{policy}model.path={folder}/model",
        f"{policy}rollout.n={RESPONSES}",
        f"{policy}rollout.log_prob_micro_batch_size_per_gpu=2",
        f"{policy}actor.ppo_mini_batch_size={PROMPTS // 2}",
        f"{policy}actor.ppo_micro_batch_size_per_gpu=2",
        f"{policy}actor.optim.lr={LR}",
        f"reward.custom_reward_function.path={ROOT}/tests/adapters/verl_ray/reward.py",
        f"trainer.total_training_steps={STEPS}",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"{policy}rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={WORKERS}",
    ]
    processor = [
        "trainer.device=cpu",
        f"{policy}rollout.name=transformers",
        f"{policy}rollout.tensor_model_parallel_size=1",
        f"{policy}model.external_lib={HERE}.worker",
        f"{policy}model.use_remove_padding=False",
        f"{policy}model.enable_gradient_checkpointing=False",
        f"+{policy}model.override_config.attn_implementation=eager",
        f"{policy}actor.strategy=fsdp2",
        f"{policy}ref.strategy=fsdp2",
        f"{policy}actor.fsdp_config.use_torch_compile=False",
        f"+{policy}actor.fsdp_config.mixed_precision="
        "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        "ray_kwargs.ray_init.num_cpus=16",
        f"+ray_kwargs.ray_init.num_gpus={WORKERS}",
        f"+ray_kwargs.ray_init._temp_dir={folder}/ray",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        "+ray_kwargs.ray_init.include_dashboard=False",
    ]
    return [*loss, *run, *processor]


def environment(folder: Path) -> dict[str, str]:
    """Variables of the run; Ray's processes inherit them."""
    return os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": f"{HERE}.platform,{HERE}.rollout",
        "VERL_FILE_LOGGER_PATH": str(log_file(folder)),
        RECORD: str(folder),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_prestart_worker_first_driver": "0",  # no idle processes
        "RAY_enable_worker_prestart": "0",
        "RAY_worker_register_timeout_seconds": "600",  # other work may keep the processor busy
    }


def train(folder: Path, limit: float) -> float:
    """Run to its end, at most `limit` seconds; returns the seconds that it took.

    What it prints is in `folder/output.txt`. No process is left, however this ends.

    Raises:
        RuntimeError: it failed, or the time was over; with the end of its output.
    """
    command = [sys.executable, *MAIN, *overrides(folder)]
    path, began = folder / "output.txt", time.monotonic()
    with path.open("w") as output, all_ended():
        running = subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            failed = running.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s"
        finally:
            running.kill()
            running.wait()
        seconds = time.monotonic() - began
    if failed:
        raise RuntimeError(f"main_ppo: {failed}\n{path.read_text(errors='replace')[-6000:]}")
    return seconds


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What verl logged, one mapping for each step."""
    lines = log_file(folder).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["data"] | {"step": record["step"]} for record in records]
