"""Whole runs with a lag: resumed from every update, measured by the present weights, recorded."""

import dataclasses
import json
import shutil

import pytest

from hmpo.config import PolicyConfig
from hmpo.errors import HmpoError
from hmpo.lab.folder import load_run
from hmpo.lab.summary import summarize
from hmpo.models import load_policy
from hmpo.models.policy import load_trained_state
from hmpo.run import loop as run
from hmpo.run.build import make_rewards, make_trainer
from hmpo.run.evaluation import Evaluator, hash_prompts
from hmpo.run.files import RunFiles
from hmpo.run.folder import Place
from hmpo.tasks import make_task
from hmpo.telemetry.csvlog import read_csv, to_csv
from tests.faults.micro import left_by, micro_config, records, saved_state


@pytest.mark.parametrize("algorithm", ["power_mean", "gspo"])
def test_a_stale_run_resumes_from_every_update_to_the_same_bytes(policy, out, algorithm):
    changes = {"rollout__lag": 2, "eval__every": 3, "checkpoint__keep": 20}
    config = micro_config(policy, out, algorithm=algorithm, objective__member="gspo", **changes)
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    for step in (5, 2):
        for path in (folder / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        run.train(config, resume=True)
        found = left_by(folder)
        assert {name for name in expected if found[name] != expected[name]} == set(), step
    steps = records(folder, "step")
    assert [record["staleness/rollouts"] for record in steps] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [record["staleness"] for record in steps] == [0, 1, 2, 3, 4, 5, 4, 5]
    kept = saved_state(folder)["trainer"]["lag"]["kept"]
    assert [(one["rollout"], one["step"]) for one in kept] == [(2, 4), (3, 6)]


def test_an_evaluation_is_of_the_present_weights(policy, out):
    changes = {"rollout__lag": 3, "eval__every": 4, "checkpoint__keep": 20, "optimizer__lr": 0.05}
    config = micro_config(policy, out, **changes)
    folder = run.train(config).folder
    middle = next(r for r in records(folder, "eval") if r["eval/name"] == "during")
    loaded = load_policy(PolicyConfig(path=str(policy)))
    task = make_task(config.task, config.seed)
    rewards = make_rewards(config, task)
    trainer = make_trainer(config, loaded, task, rewards)
    means = []
    for weights in (saved_state(folder, 4)["model"], None):
        if weights is not None:
            load_trained_state(loaded.model, weights)
        else:
            load_trained_state(loaded.model, load_policy(config.policy).model.state_dict())
        evaluator = Evaluator(
            policy=loaded.model, tokenizer=loaded.tokenizer, task=task, rewards=rewards,
            config=trainer.config, seed=config.seed, batch_size=config.eval.batch_size,
        )  # fmt: skip
        means.append(evaluator.evaluate(config.eval.prompts).mean_reward)
    assert middle["eval/mean"] == means[0] != means[1]


def test_a_fresh_run_is_what_it_was_and_another_lag_is_refused(policy, out):
    config = micro_config(policy, out, updates=4)
    folder = run.train(config).folder
    assert "lag" not in saved_state(folder)["trainer"]
    assert not any("staleness/rollouts" in record for record in records(folder, "step"))
    plain = json.loads((folder / "config.json").read_text())
    assert plain.pop("rollout")["lag"] == 0
    (folder / "config.json").write_text(json.dumps(plain))  # as runs wrote it before
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert run.train(config, resume=True).status == "completed"
    stale = micro_config(policy, out, updates=4, rollout__lag=1)
    with pytest.raises(HmpoError, match=r"rollout\.lag was 0, got 1") as refused:
        run.train(stale, resume=True)
    assert "\n" not in str(refused.value)


def test_room_is_asked_for_old_weights_too(policy, out, monkeypatch):
    needed = []
    monkeypatch.setattr("hmpo.run.files.check_free_space", lambda _, size: needed.append(size))
    state = {"model": dict(load_policy(PolicyConfig(path=str(policy))).model.state_dict())}
    for lag in (0, 1, 3, 200):
        config = micro_config(policy, out, rollout__lag=lag)
        RunFiles(config, Place(out / "x")).check_room(state)
    once = needed[0]
    assert needed == [once, 2 * once, 4 * once, 5 * once], "a run of four rollouts keeps four"


def test_bits_of_an_evaluation_and_the_age_of_a_policy_reach_csv_and_report(policy, out):
    config = micro_config(policy, out, rollout__lag=1, eval__success=0.3, eval__final_prompts=6)
    folder = run.train(config).folder
    task = make_task(config.task, config.seed)
    prompts = [task.heldout(i).prompt for i in range(6)]
    for record in records(folder, "eval"):
        bits = f"{int(record['eval/passed'], 16):08b}"
        assert len(record["eval/passed"]) == 2 and bits[6:] == "00"
        assert bits.count("1") == record["eval/sampled_k"]
        assert record["eval/heldout"] == hash_prompts(prompts)
    (out / "log.csv").write_text(to_csv(records(folder)))
    back = [record for _, record in read_csv(out / "log.csv")]
    assert [r.get("eval/passed") for r in back] == [r.get("eval/passed") for r in records(folder)]
    view = summarize(load_run(folder), "run")
    names = [name for name, _ in view["progress"]]
    assert {"staleness (updates)", "sigma of log ratios (nat)", "sigma sqrt(length) (nat)"} <= {
        *names
    }
    assert "by the policy of 1 before" in dict(view["facts"])["rollout"]
    digests = {record["eval/heldout"] for record in records(folder, "eval")}
    shown = json.dumps(dataclasses.asdict(load_run(folder)) and view, default=str)
    assert not any(digest in shown for digest in digests), "no line of hex among the numbers"
