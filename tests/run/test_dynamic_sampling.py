"""Whole runs with dynamic sampling: exact, resumable between attempts, counted, off by default."""

import json
import os
import shutil
import signal

import pytest

from hmpo.errors import ConfigError
from hmpo.run import loop as run
from tests.engines.test_runs import OwnSampler
from tests.faults.micro import left_by, litter, micro_config, records
from tests.run.several import command, ended
from tests.run.several import records as logged

REWARDS = "tests.faults.rewards"
SPARSE = {"rewards__functions": [f"{REWARDS}:ends_low"]}
FILLED = {"batch__filter_groups": True, "trainer__group_size": 2, **SPARSE}


def steps(folder, *, without: str = "batch/") -> list[dict]:
    found = records(folder, "step")
    drop = ("run_id",)
    return [
        {k: v for k, v in record.items() if k not in drop and not k.startswith(without)}
        for record in found
    ]


def test_a_run_whose_groups_all_carry_a_signal_is_the_run_without(policy, out) -> None:
    plain = run.train(micro_config(policy, out)).folder
    filled = run.train(micro_config(policy, out, "other", batch__filter_groups=True)).folder
    assert steps(plain) == steps(filled)
    found = records(filled, "step")
    assert {record["batch/attempts"] for record in found} == {1}
    assert all(record["batch/full"] is True for record in found)
    assert not any(key.startswith("batch/") for key in records(plain, "step")[0])
    assert "batch" not in records(plain, "end")[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout__lag": 2},
        {"algorithm": "gspo", "objective__member": "gspo"},
        {"trainer__mask_truncated": True, "reference": "start"},
    ],
)
def test_every_group_that_is_trained_on_has_answers_that_differ(policy, out, changes) -> None:
    folder = run.train(micro_config(policy, out, samples=999, **FILLED, **changes)).folder
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    found = records(folder, "step")
    replaced = 0
    for rollout in range(4):
        record = next(r for r in found if r["rollout"] == rollout)
        rows = [line for line in lines if line["rollout"] == rollout]
        groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        kept = [group for group in groups if group[0]["kept"]]
        assert len(groups) == record["batch/drawn"] and record["success/n"] == len(rows)
        assert max(row["attempt"] for row in rows) + 1 == record["batch/attempts"]
        if record["batch/full"]:
            assert len(kept) == 3 and record["adv/zero_frac"] == 0
            if "trainer__mask_truncated" not in changes:
                assert all(len({row["reward"] for row in group}) == 2 for group in kept)
        replaced += len(groups) - 3
    assert replaced > 0
    assert records(folder, "end")[-1]["batch"].startswith("dynamic sampling: trained on ")


def test_what_was_drawn_is_counted_as_spent(policy, out) -> None:
    folder = run.train(micro_config(policy, out, **FILLED)).folder
    firsts = [record for record in records(folder, "step") if record["minibatch"] == 0]
    tokens = 0
    for record in firsts:
        tokens += record["batch/tokens"]
        assert record["num_tokens"] == tokens
    drawn = sum(record["batch/drawn"] for record in firsts)
    line = records(folder, "end")[-1]["batch"]
    assert f" of {drawn} prompts drawn" in line and f"with {tokens} tokens" in line


def test_the_shaped_sum_is_never_looked_at(policy, out) -> None:
    """Noise makes all sums differ; the named function decides, also at weight 0."""
    functions = [f"{REWARDS}:ends_low", f"{REWARDS}:draws"]
    shaped = FILLED | {"rewards__functions": functions}
    by_accuracy = micro_config(
        policy, out, "a", **shaped, batch__signal="ends_low", rewards__weights=[0.0, 1.0]
    )
    by_noise = micro_config(policy, out, "b", **shaped, batch__signal="draws")
    attempts = [
        [record["batch/attempts"] for record in records(run.train(config).folder, "step")]
        for config in (by_accuracy, by_noise)
    ]
    assert max(attempts[0]) > 1 and set(attempts[1]) == {1}


def test_a_cap_trains_on_what_there_is_and_no_signal_at_all_on_the_rollout_as_it_is(
    policy, out
) -> None:
    never = {"rewards__functions": [f"{REWARDS}:never"], "batch__max_num_gen_batches": 3}
    folder = run.train(micro_config(policy, out, **FILLED | never)).folder
    for record in records(folder, "step"):
        assert (record["batch/attempts"], record["batch/drawn"]) == (3, 9)
        assert (record["batch/full"], record["batch/kept_frac"]) == (False, 0)
        assert record["n_seq"] == 3 and record["success/n"] == 18
    end = records(folder, "end")[-1]
    assert "trained on 12 of 36 prompts" in end["batch"] and "4 of 4 rollouts" in end["batch"]
    assert end["warning"].startswith("no signal in 4 rollouts")


def test_resume_from_every_boundary_gives_the_same_bytes(policy, out) -> None:
    config = micro_config(policy, out, checkpoint__keep=20, **FILLED)
    folder = run.train(config).folder
    expected = left_by(folder)
    for step in range(7, 0, -1):
        for newer in range(step + 1, 9):
            shutil.rmtree(folder / f"checkpoints/step-{newer:08d}")
        run.train(config, resume=True)
        assert left_by(folder) == expected


@pytest.mark.parametrize("how", ["signal", "failure"])
def test_an_end_between_two_attempts_leaves_the_rollout_to_the_resume(
    policy, out, monkeypatch, how
) -> None:
    config = micro_config(policy, out, checkpoint__every=0, **FILLED)
    folder = run.train(config).folder
    expected = left_by(folder)
    shutil.rmtree(folder)
    steering, draws = run.Steering, 0

    class Ends(steering):
        def _next(self, count, own):
            nonlocal draws
            draws += 1
            if draws == 4 and how == "failure":
                raise RuntimeError("between attempts")
            if draws == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._next(count, own)

    monkeypatch.setattr(run, "Steering", Ends)
    if how == "failure":
        with pytest.raises(RuntimeError):
            run.train(config)
    else:
        assert run.train(config).status == "interrupted"
    monkeypatch.setattr(run, "Steering", steering)
    assert run.train(config, resume=True).status == "completed"
    assert left_by(folder) == expected
    assert litter(folder) == []


def test_an_engine_gets_the_weights_once_a_rollout(policy, out, monkeypatch) -> None:
    plain = run.train(micro_config(policy, out, mismatch__recompute=True, **FILLED)).folder
    engine = OwnSampler()
    monkeypatch.setattr(run, "make_engine", lambda *given: engine)
    config = micro_config(policy, out, "other", mismatch__recompute=True, **FILLED)
    other = run.train(config).folder
    assert steps(plain, without=" ") == steps(other, without=" ")
    assert engine.versions == [0, 1, 2, 3]


def test_a_curriculum_counts_all_prompts_of_its_level(policy, out) -> None:
    agm = {"mode": "apply", "controls": ["level"], "first_level": 2}
    config = micro_config(
        policy, out, task__level=3, agm=agm, samples=999, prompts_per_rollout=4, **FILLED
    )
    folder = run.train(config).folder
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for record in records(folder, "step"):
        rows = [line for line in lines if line["rollout"] == record["rollout"]]
        own = [
            row
            for row in rows
            if len(row["columns"]["answer"]) == len(rows[0]["columns"]["answer"])
        ]
        assert record["success/n"] == len(own)
        assert record["success/k"] == sum(row["reward"] >= 1 for row in own)


def test_two_ranks_draw_and_keep_what_one_process_does(tmp_path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        filled = ("--set", "batch.filter_groups=true")
        ended(command(tmp_path, name, ranks, *filled, updates=4))
    one, two = [(tmp_path / name / "completions.jsonl").read_bytes() for name in ("one", "two")]
    assert one == two
    keys = [f"batch/{name}" for name in ("attempts", "drawn", "kept_frac", "tokens", "full")]
    found = [
        [[r[key] for key in keys] for r in logged(tmp_path / name) if r["type"] == "step"]
        for name in ("one", "two")
    ]
    assert found[0] == found[1] and max(row[0] for row in found[0]) > 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"rewards__functions": [f"{REWARDS}:ends_low", f"{REWARDS}:draws"]},
            "batch.signal: got ''",
        ),
        ({"batch__signal": "other"}, "batch.signal: got 'other', expected one of ends_low"),
        (
            {"batch__max_responses": 5},
            "batch.max_responses: got 5, expected 0, or at least the 6",
        ),
        (
            {
                "batch__max_responses": 6,
                "agm__mode": "apply",
                "agm__controls": ("batch",),
            },
            "batch.max_responses: got 6, expected 0, or at least the 24 responses of a rollout, "
            "which a controller may make 4 times as many",
        ),
        ({"batch__max_num_gen_batches": 0}, "batch.max_num_gen_batches: got 0"),
        ({"task__environment": "tests.faults.rewards:Wishes"}, "batch.filter_groups: got True"),
    ],
)
def test_what_cannot_be_done_is_one_line(policy, out, changes, line) -> None:
    with pytest.raises(ConfigError) as caught:
        run.train(micro_config(policy, out, **FILLED | changes))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not (out / "run").exists()


def test_conversations_are_replaced_like_texts(policy, out) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = out / "chat"
    shutil.copytree(policy, chat)
    (chat / "chat_template.jinja").write_text(template)
    folder = run.train(micro_config(chat, out, task__chat=True, samples=99, **FILLED)).folder
    assert max(record["batch/attempts"] for record in records(folder, "step")) > 1
    line = json.loads((folder / "completions.jsonl").read_text().splitlines()[0])
    assert line["prompt"][0]["role"] == "user"
