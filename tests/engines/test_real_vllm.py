"""The same with a real vLLM server, in an environment of its own: `make test-vllm`."""

import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmpo.cli.demo import demo_config
from hmpo.config import PolicyConfig, RolloutConfig
from hmpo.engines.started import StartedServer
from hmpo.engines.vllm import VLLMEngine
from hmpo.engines.weights import FILE, make_folder, write_weights
from hmpo.errors import EngineError
from hmpo.models import load_policy
from hmpo.run import loop as run
from hmpo.sampling.options import SamplingOptions
from tests.engines.conftest import move
from tests.engines.test_started import gone
from tests.engines.test_vllm import compared, draw
from tests.faults.micro import records

PYTHON = os.environ.get("HMPO_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="needs a vLLM: make test-vllm"),
    pytest.mark.timeout(600),
]
OPTIONS = SamplingOptions(max_length=12, eos_tokens=(2,), pad_token=0, temperature=0.8)
ROUNDING = 2e-4
"""Nat; 1.4e-5 was seen."""


def serve(log: Path, *, tied: bool) -> VLLMEngine:
    loaded = load_policy(PolicyConfig())
    if not tied:
        loaded.model.config.tie_word_embeddings = False
        head = loaded.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.25)
    shared = make_folder(loaded.model)
    server = StartedServer(
        loaded, shared, python=PYTHON, arguments=(), timeout=300.0, dtype="float32",
        max_length=12, log=log,
    )  # fmt: skip
    return VLLMEngine(loaded.model, server, shared)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Iterator[VLLMEngine]:
    engine = serve(tmp_path_factory.mktemp("tied") / "engine.log", tied=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Iterator[VLLMEngine]:
    engine = serve(tmp_path_factory.mktemp("untied") / "engine.log", tied=False)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_every_update_arrives(name: str, request) -> None:
    engine = request.getfixturevalue(name)
    for version in range(3):
        engine.sync(engine.policy, version)
        drawn = draw(engine, OPTIONS)
        assert compared(engine, drawn) < ROUNDING
        assert bool((drawn.versions[drawn.rollout.response_mask] == version).all())
        assert torch.equal(drawn.rollout.response_ids, draw(engine, OPTIONS).rollout.response_ids)
        move(engine.policy, version)


def test_prefixes_of_older_weights_are_not_read(tied: VLLMEngine) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 96), generator=generator)  # three blocks of the cache
    given = (ids, torch.ones_like(ids, dtype=torch.bool), OPTIONS)
    for version in (10, 11):
        tied.sync(tied.policy, version)
        for _ in range(2):  # the second reads what the first left in the cache
            generator = torch.Generator().manual_seed(version)
            drawn = tied.sample(*given, group_size=2, generator=generator)
            assert compared(tied, drawn) < ROUNDING
        move(tied.policy, version)


def reload(engine: VLLMEngine, change: Callable[[dict], object], shared: Path) -> None:
    """A sync that sends a changed file."""
    folder = shared / "weights"
    write_weights(engine.policy, folder)
    tensors = load_file(folder / FILE)
    change(tensors)
    if (folder / FILE).exists():
        save_file(tensors, folder / FILE)
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    engine.client.post("/pause?mode=wait")
    try:
        engine.client.post("/collective_rpc", body)
    finally:
        shutil.rmtree(folder)
    engine.client.post("/update_weight_version", {"new_version": next(iter(engine.labels))})
    engine.client.post("/resume")


def test_a_tensor_that_is_left_out_is_found_by_the_check(tied: VLLMEngine) -> None:
    tied.sync(tied.policy, 20)
    move(tied.policy, 20)
    reload(tied, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"), tied.folder)
    with pytest.raises(EngineError, match="from the policy's own"):
        compared(tied, draw(tied, OPTIONS))
    tied.sync(tied.policy, 21)
    assert compared(tied, draw(tied, OPTIONS)) < ROUNDING


def test_a_file_that_is_not_there_is_refused_and_a_good_one_puts_it_right(
    tied: VLLMEngine,
) -> None:
    with pytest.raises(EngineError, match="answered 500 to /collective_rpc"):
        reload(tied, lambda tensors: (tied.folder / "weights" / FILE).unlink(), tied.folder)
    tied.sync(tied.policy, 30)
    assert compared(tied, draw(tied, OPTIONS)) < ROUNDING


def test_weights_of_another_shape_are_refused(tied: VLLMEngine) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(EngineError, match="answered 500 to /collective_rpc"):
        reload(tied, lambda tensors: tensors.update({name: tensors[name][:3].clone()}), tied.folder)


def spawned(parent: int) -> int:
    """The process that a process of the server has made for its work."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            above = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
            if above == parent and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    (only,) = found
    return only


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("depth", range(3), ids=["server", "engine", "worker"])
def test_a_process_that_is_killed_is_one_line_and_takes_the_rest_along(
    depth: int, tmp_path: Path
) -> None:
    engine = serve(tmp_path / "engine.log", tied=True)
    try:
        engine.sync(engine.policy, 0)
        server = engine.server
        assert isinstance(server, StartedServer)
        group = process = server.group
        for _ in range(depth):
            process = spawned(process)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(
            EngineError, match=r"^rollout\.engine: the server of this run "
        ) as caught:
            draw(engine, OPTIONS)
        assert "\n" not in str(caught.value)
    finally:
        engine.close()
    assert gone(group)


def test_ten_updates(tmp_path: Path) -> None:
    config = demo_config(seed=0, updates=10, out=tmp_path, name="run")
    config = dataclasses.replace(
        config,
        prompts_per_rollout=6,
        rollout=RolloutConfig(engine="vllm", python=PYTHON),
        eval=dataclasses.replace(config.eval, every=0, final_prompts=16),
    )
    result = run.train(config)
    assert (result.status, result.step) == ("completed", 10)
    steps = records(result.folder, "step")
    for step in steps:
        assert abs(step["mismatch/rho_min"] - 1) < 1e-3 > abs(step["mismatch/rho_max"] - 1)
    assert len({step["mismatch/rho_max"] for step in steps}) > 1, "each rollout is measured"
