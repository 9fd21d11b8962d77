"""Where the time of a run's steps goes, as timing.jsonl tells it."""

import pytest

from hmpo.run import loop as run
from hmpo.stopwatch import PARTS
from hmpo.telemetry.ingest import read_timing
from tests.faults.micro import micro_config, micro_policy
from tests.faults.storage import fast_folder


@pytest.fixture(scope="module", params=["power_mean", "gspo"])
def times(request):
    with fast_folder() as folder:
        policy = micro_policy(folder / "policy")
        changes = {"objective__member": "gspo"} if request.param == "gspo" else {}
        changes |= {"algorithm": request.param, "reference": "start"}
        result = run.train(micro_config(policy, folder, **changes))
        yield [r for r in read_timing(result.folder / "timing.jsonl")[1] if "time/step_s" in r]


def parts(record) -> float:
    return sum(record.get(f"time/{name}_s", 0.0) for name in PARTS)


def test_every_update_has_its_parts_and_a_rollout_those_of_its_own(times) -> None:
    assert [r["step"] for r in times] == list(range(8))
    for record in times:
        found = {name for name in PARTS if f"time/{name}_s" in record}
        of_rollout = {"sampling", "rewards"} if "time/rollout_s" in record else set()
        assert found == set(PARTS) - {"sampling", "rewards"} | of_rollout
    assert ["time/rollout_s" in record for record in times] == [True, False] * 4


def test_parts_sum_to_the_step_but_for_a_tenth(times) -> None:
    for record in times:
        assert parts(record) <= record["time/step_s"]
    whole = sum(record["time/step_s"] for record in times)
    assert sum(map(parts, times)) >= 0.9 * whole


def test_a_rollout_and_its_training_are_within_the_step(times) -> None:
    for record in times:
        inside = record.get("time/rollout_s", 0.0) + record["time/train_s"]
        assert record.get("time/sampling_s", 0.0) <= record.get("time/rollout_s", 0.0)
        assert inside <= record["time/step_s"]
