"""Whole runs whose rollouts a server draws."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hmpo.config.reading import run_config
from hmpo.engines.protocol import VersionedRollout
from hmpo.errors import ConfigError, EngineError, HmpoError
from hmpo.run import loop as run
from hmpo.run.rehearsal import rehearse
from hmpo.sampling.responses import sample_rollout
from tests.engines.stand_in import StandIn, serving
from tests.faults.micro import left_by, litter, micro_config, records


class OwnSampler:
    """An engine that draws by the sampler of this package, from a copy of the weights."""

    def __init__(self) -> None:
        self.versions: list[int] = []
        self.closed = False

    def start(self) -> None:
        """It is ready."""

    def sync(self, policy, version) -> None:
        self.policy = policy
        self.versions.append(version)

    def sample(self, ids, mask, options, *, group_size, generator, tokenizer=None):
        given = {"group_size": group_size, "generator": generator, "tokenizer": tokenizer}
        rollout = sample_rollout(self.policy, ids, mask, options, **given)
        versions = torch.where(rollout.response_mask, self.versions[-1], -1)
        return VersionedRollout(rollout=rollout, versions=versions)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@contextlib.contextmanager
def served(folder: Path, *faults: str) -> Iterator[tuple[StandIn, dict[str, str]]]:
    """A stand-in, and the setting that names it."""
    stand_in = StandIn(folder, *faults)
    with serving(stand_in) as address:
        yield stand_in, {"rollout__engine": address}


def test_a_run_by_another_engine_is_our_own_to_the_bit_where_it_draws_alike(
    folder, out, monkeypatch
) -> None:
    """Old log-probs are the policy's own, so nothing else can differ."""
    plain = run.train(micro_config(folder, out, mismatch__recompute=True)).folder
    engine = OwnSampler()
    monkeypatch.setattr(run, "make_engine", lambda *given: engine)
    other = run.train(micro_config(folder, out, "other", mismatch__recompute=True)).folder
    steps = [records(place, "step") for place in (plain, other)]
    for record in (record for found in steps for record in found):
        record.pop("run_id")
    assert steps[0] == steps[1]
    assert engine.versions == [0, 1, 2, 3] and engine.closed


@pytest.mark.parametrize("changes", [{}, {"rollout__lag": 2}, {"algorithm": "gspo"}])
def test_a_run_trains_on_rollouts_of_a_server(folder, out, changes) -> None:
    if "algorithm" in changes:
        changes = changes | {"objective__member": "gspo"}
    with served(folder) as (stand_in, engine):
        result = run.train(micro_config(folder, out, **changes, **engine))
    assert (result.status, result.step) == ("completed", 8)
    pushed = [body["new_version"] for path, body in stand_in.asked if path[:14] == "/update_weight"]
    assert [label.partition(".")[2] for label in pushed] == ["0", "1", "2", "3"]
    steps = records(result.folder, "step")
    if not changes:
        apart = [abs(r[f"mismatch/rho_{end}"] - 1) for r in steps for end in ("min", "max")]
        assert max(apart) < 1e-4
    assert all(record["rollout/fast"] == 0 for record in steps)
    assert litter(result.folder) == []


def test_a_run_that_is_resumed_gives_the_server_its_weights_again(folder, out) -> None:
    """The stand-in draws equal tokens from equal seeds, so the run is the same to the bit."""
    with served(folder) as (_, engine):
        whole = run.train(micro_config(folder, out, **engine)).folder
    with served(folder) as (stand_in, engine):
        config = micro_config(folder, out, "cut", **engine)
        config = dataclasses.replace(config, updates=4)
        run.train(config)
    with served(folder) as (stand_in, engine):  # another port
        part = run.train(micro_config(folder, out, "cut", **engine), resume=True).folder
        assert stand_in.asked[0][0] == "/pause"
    checkpoint = "step-00000008/model.safetensors"
    found = [left_by(place) for place in (whole, part)]
    names = [name for name in found[0] if name.endswith(".safetensors")]
    assert names and all(found[0][name] == found[1][name] for name in names), checkpoint


def test_a_run_whose_engine_serves_other_weights_stops_and_is_resumed(folder, out) -> None:
    with served(folder, "head") as (stand_in, engine):
        config = micro_config(folder, out, **engine)
        with pytest.raises(EngineError, match="from the policy's own") as caught:
            run.train(config)
        assert any("go on with: hmpo train --resume" in note for note in caught.value.__notes__)
        end = records(out / "run", "end")[-1]
        assert end["status"] == "failed" and "got log-probs" in end["reason"]
        stand_in.faults.clear()
        assert run.train(config, resume=True).status == "completed"


def test_evaluations_do_not_ask_the_server(folder, out) -> None:
    with served(folder) as (stand_in, engine):
        run.train(micro_config(folder, out, updates=2, eval__final_prompts=50, **engine))
        prompts = [body["token_ids"] for path, body in stand_in.asked if "generate" in path]
    assert len(prompts) == 3, "of one rollout"


def test_a_rehearsal_draws_by_the_server_and_leaves_nothing(folder, out) -> None:
    with served(folder) as (stand_in, engine):
        found = rehearse(micro_config(folder, out, **engine))
    assert len(found.samples) == 12 and not out.exists()
    assert any("generate" in path for path, _ in stand_in.asked)


def test_another_port_is_the_same_run_and_our_own_sampler_another() -> None:
    from hmpo.config.identity import config_hash

    engines = ("http://127.0.0.1:8000", "http://localhost:9", "vllm", "hmpo")
    hashes = [config_hash(run_config({"rollout": {"engine": engine}})) for engine in engines]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3] == config_hash(run_config({}))


REFUSED = {
    "rollout.engine: got 'trl'": {"rollout": {"engine": "trl"}},
    "rollout.engine: got 'http://10.0.0.1:80', expected .* a server of this machine": {
        "rollout": {"engine": "http://10.0.0.1:80"}
    },
    "rollout.engine: got 'http://127.0.0.1:77777'": {
        "rollout": {"engine": "http://127.0.0.1:77777"}
    },
    "rollout.arguments: got '--port=1', expected others than": {
        "rollout": {"engine": "vllm", "arguments": ["--port=1"]}
    },
    "policy.lora_rank: got 2, expected 0": {"policy": {"lora_rank": 2}},
    "task.environment: got 'a.py:A', expected nothing": {"task": {"environment": "a.py:A"}},
    "trainer.top_k: got 5, expected 0": {"trainer": {"top_k": 5}},
    "trainer.top_p: got 0.9, expected 1": {"trainer": {"top_p": 0.9}},
    "trainer.temperature: got 0.001, expected at least 0.01": {"trainer": {"temperature": 0.001}},
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_a_foreign_engine_cannot_do_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"^{pattern}") as caught:
        run_config({"rollout": {"engine": "vllm"}} | REFUSED[pattern])
    assert "\n" not in str(caught.value)


def test_trainers_refuse_the_same(loaded) -> None:
    from hmpo.config import HMPOConfig
    from hmpo.trainer.power_mean import HMPOTrainer
    from tests.environments.games import OneTurn

    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    for changes, keywords, fault in (
        ({"top_k": 3}, {}, "top_k = 3"),
        ({"temperature": 1e-3}, {}, "temperature = 0.001"),
        ({}, {"environment": OneTurn}, "an environment"),
    ):
        with pytest.raises(ConfigError, match=f"^engine: got one with {fault}, expected"):
            HMPOTrainer(
                loaded.model, None, optimizer, HMPOConfig(**changes), lambda **given: [],
                tokenizer=loaded.tokenizer, engine=OwnSampler(), **keywords,
            )  # fmt: skip


def test_several_ranks_are_refused(folder, out, loaded) -> None:
    from hmpo.ranks.world import Ranks
    from hmpo.run.engine import make_engine

    config = micro_config(folder, out, rollout__engine="http://127.0.0.1:1")
    several = dataclasses.replace(Ranks(), size=2)
    with pytest.raises(
        ConfigError, match=r'^rollout\.engine: got "http.* with 2 ranks, expected "hm'
    ):
        make_engine(config, loaded, None, several)


def test_a_policy_with_adapters_is_refused(folder, out, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    from hmpo.engines.weights import refuse_unservable
    from tests.support import TinyCausal, tiny_llama

    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(HmpoError, match=r"got adapters .* hmpo export RUN --merge"):
        refuse_unservable(adapted)
    with pytest.raises(HmpoError, match="got TinyCausal, expected a transformers model"):
        refuse_unservable(TinyCausal())


def test_a_default_run_says_nothing_of_engines(folder, out) -> None:
    result = run.train(micro_config(folder, out, updates=2))
    assert not any("mismatch" in name for r in records(result.folder, "step") for name in r)
    stored = json.loads((result.folder / "config.json").read_text())["rollout"]
    assert stored["engine"] == "hmpo" and litter(result.folder) == []


def test_a_probe_of_such_a_run_says_that_it_draws_by_itself(folder, out) -> None:
    from hmpo.lab.probe import probe_run

    with served(folder) as (_, engine):
        run.train(micro_config(folder, out, updates=2, **engine))
    probe = probe_run(out / "run", allow_code=True)
    assert any("is drawn by the sampler of hmpo instead" in note for note in probe.notes)
