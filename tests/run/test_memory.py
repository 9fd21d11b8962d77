"""What a run takes of the memory: the sum by hand, the machine's limit, and the remedy."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from hmpo.cli import main
from hmpo.config import DistributedConfig, PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy, save_policy
from hmpo.models.memory import (
    bytes_of,
    kept_by_forward,
    key_value_bytes,
    meta_policy,
    weight_bytes,
)
from hmpo.run import memory
from hmpo.run.machine import resident_bytes
from hmpo.run.memory import (
    estimate,
    estimate_run,
    logits_bytes,
    memory_line,
    optimizer_bytes,
    sampler_bytes,
)
from tests.faults.micro import micro_config

ROOT = Path(__file__).parents[2]


def made(policy, **changes):
    config = micro_config(policy, policy.parent, **changes)
    return config, meta_policy(config.policy)


def test_the_two_heights_are_the_sums_of_their_parts(policy) -> None:
    """One layer of 16, 17 words; 12 responses of 4 tokens, 6 an update, prompts of 5."""
    config, model = made(policy)
    weights = bytes_of([*model.parameters(), *model.buffers()])
    trained = bytes_of(model.parameters())
    found = estimate(model, config, 5, 1000)
    one_layer = kept_by_forward(model, 6, 9).bytes
    kept = 2 * one_layer + 2 * 6 * 4 * 16 * 4
    logits, head = 6 * 4 * 17 * 4, 17 * 16 * 4
    matrices = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 17 * 16)
    cached = key_value_bytes(model) * (3 * 5 + 12 * 4) + 12 * 17 * 4
    assert found.parts == {
        "process": 1000, "weights": weights, "reference": 0, "optimizer": 2 * trained,
        "gradients": trained, "activations": kept, "logits": logits, "sampler": matrices,
        "keys_values": cached,
    }  # fmt: skip
    always = 1000 + weights + 2 * trained
    assert found.update == always + max(trained, head + kept + logits)
    assert found.rollout == always + matrices + cached
    assert found.peak == max(found.update, found.rollout) and found.measured


def test_settings_take_what_they_say(policy) -> None:
    config, model = made(policy)
    plain = estimate(model, config, 5, 0)
    changes = {
        "reference": {"reference": "start"},
        "activations": {"trainer__micro_batch_size": 1},
        "optimizer": {"optimizer__name": "sgd"},
        "keys_values": {"trainer__group_size": 8},
        "sampler": {"trainer__decoder": "module"},
    }
    for part, change in changes.items():
        other = estimate(model, made(policy, **change)[0], 5, 0)
        grows = part in ("reference", "keys_values")
        assert (other.parts[part] > plain.parts[part]) == grows, part
        assert other.parts[part] != plain.parts[part], part
    lag, _ = made(policy, rollout__lag=3)
    assert estimate(model, lag, 5, 0).parts["reference"] == 3 * plain.parts["gradients"]
    momentum, _ = made(policy, optimizer__name="sgd", optimizer__momentum=0.5)
    assert optimizer_bytes(model, momentum) == plain.parts["gradients"]
    muon, _ = made(policy, optimizer__name="muon")
    hidden = 4 * (4 * 16 * 16 + 3 * 16 * 32)
    assert optimizer_bytes(model, muon) == hidden + 2 * (plain.parts["gradients"] - hidden)
    bfloat16, _ = made(policy, trainer__sampling_dtype="bfloat16")
    assert sampler_bytes(model, bfloat16) * 2 == sampler_bytes(model, config)


def test_half_precision_takes_half_the_weights_and_float32_copies(policy) -> None:
    """Sums by hand: with n weights 2 n, copies 4 n, two moments 8 n; gradients 2 n, and 4 n."""
    config, wide = made(policy)
    _, model = made(policy, policy__dtype="bfloat16")
    count = sum(p.numel() for p in wide.parameters())
    assert optimizer_bytes(wide, config) == 8 * count
    assert optimizer_bytes(model, config) == 12 * count
    eight, _ = made(policy, optimizer__name="adamw8bit")
    assert optimizer_bytes(wide, eight) == 2 * count
    plain, half = estimate(wide, config, 5, 0).parts, estimate(model, config, 5, 0).parts
    buffers = bytes_of(wide.buffers())
    assert plain["weights"] == 4 * count + buffers and half["weights"] == 2 * count + buffers
    assert plain["gradients"] == 4 * count and half["gradients"] == 6 * count
    assert half["activations"] < plain["activations"]
    assert key_value_bytes(model) * 2 == key_value_bytes(wide)


def test_checkpointing_holds_the_inputs_of_layers_and_one_layer(policy) -> None:
    config, model = made(policy)
    saving, _ = made(policy, policy__gradient_checkpointing=True)
    plain, less = (estimate(model, c, 400, 0).parts["activations"] for c in (config, saving))
    one = kept_by_forward(model, 6, 404).bytes  # of the one layer there is
    assert plain == 2 * one + 2 * 6 * 4 * 16 * 4
    assert less == min(plain, one + one + 6 * 404 * 16 * 4 + 2 * 6 * 4 * 16 * 4)


def test_adapters_copy_what_moves_and_four_bits_hold_what_does_not(policy) -> None:
    adapted = {"policy__lora_rank": 2, "reference": "start"}
    config, model = made(policy, **adapted)
    moving = bytes_of(p for p in model.parameters() if p.requires_grad)
    assert estimate(model, config, 5, 0).parts["reference"] == moving
    policy_config = dataclasses.replace(config.policy, quantize="4bit")
    whole = bytes_of([*model.parameters(), *model.buffers()])
    frozen = 4 * 16 * 16 + 3 * 16 * 32
    expected = whole - 4 * frozen + round((0.5 + 1 / 64 + 4 / 16384) * frozen)
    assert weight_bytes(model, policy_config) == expected
    assert weight_bytes(model, config.policy) == whole


def test_large_logits_are_held_in_blocks(policy) -> None:
    config, _ = made(policy, trainer__logprob_chunk=512)
    assert logits_bytes(100, 1000, config) == 100 * 1000 * 4
    assert logits_bytes(100_000, 1000, config) == 512 * 1000 * 4
    assert logits_bytes(100_000, 100_000, config) == (64 << 20) // 400_000 * 400_000
    small, _ = made(policy, trainer__logprob_chunk=64)
    assert logits_bytes(100_000, 1000, small) == 64 * 1000 * 4
    assert logits_bytes(0, 0, config) == 0


def test_ranks_on_a_processor_share_its_memory_and_the_prompts(policy, monkeypatch) -> None:
    config, _ = made(policy, task={"name": "sort"}, prompts_per_rollout=6)
    half, _ = made(policy, task={"name": "sort"}, prompts_per_rollout=3)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory, "prompt_tokens", lambda config: 12)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10**12)
    alone = memory_line(half)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "of 500.0 GB" in memory_line(config) and "of 1.0 TB" in alone
    assert memory_line(config).replace("500.0 GB", "1.0 TB") == alone


def test_ranks_that_share_a_policy_out_hold_a_part_each_and_all_of_it_to_sample(
    policy, monkeypatch
) -> None:
    config, model = made(policy)
    shared = dataclasses.replace(config, distributed=DistributedConfig(shard=True))
    whole = estimate(model, config, 5, 1000)
    assert estimate(model, shared, 5, 1000) == whole, "one process shares nothing"
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert estimate(model, config, 5, 1000) == whole
    found = estimate(model, shared, 5, 1000)
    for name in ("weights", "optimizer", "gradients"):
        assert found.parts[name] == whole.parts[name] // 4
    rest = found.parts["sampler"] + found.parts["keys_values"]
    held = 1000 + found.parts["weights"] + found.parts["optimizer"]
    assert found.rollout == held + whole.parts["weights"] + rest
    assert found.update < whole.update


def test_what_cannot_fit_is_refused_with_the_setting_that_helps_most(policy, monkeypatch) -> None:
    changes = {"trainer__max_length": 400, "task": {"name": "sort"}, "reference": "start"}
    config, model = made(policy, **changes, trainer__group_size=64)
    peak = estimate(model, config, 12, 0).peak
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory, "prompt_tokens", lambda config: 12)
    monkeypatch.setattr(memory, "machine_bytes", lambda: peak)
    assert memory_line(config).startswith("memory: about ")
    monkeypatch.setattr(memory, "machine_bytes", lambda: int(peak * memory.SURE) - 1000)
    with pytest.raises(
        ModelError, match=r"needs about .*, more than there is .* would take"
    ) as told:
        memory_line(config)
    named = str(told.value).rpartition("; ")[2].partition(" would")[0]
    others = {
        "trainer.micro_batch_size = 1": {"trainer__micro_batch_size": 1},
        "trainer.group_size = 2": {"trainer__group_size": 2},
        'reference = "none"': {"reference": "none"},
        "policy.lora_rank = 16": {"policy__lora_rank": 16},
    }
    peaks = {}
    for name, change in others.items():
        other = made(policy, **{"trainer__group_size": 64} | changes | change)
        peaks[name] = estimate(other[1], other[0], 12, 0).peak
    assert peaks[named] == min(peaks.values()) < peak


def test_a_policy_without_a_configuration_does_not_stop_a_run(policy, monkeypatch) -> None:
    config, _ = made(policy)
    gone = dataclasses.replace(config.policy, path=str(policy.parent / "no"))
    line = memory_line(dataclasses.replace(config, policy=gone))
    assert line.startswith("memory: cannot be told before the policy is loaded (")


DAMAGED = {
    "weights": ("model.safetensors", b"\xff" * 100),
    "a pointer in place of weights": ("model.safetensors", b"version https://git-lfs.github.com"),
    "an index that is no table": ("model.safetensors.index.json", b"[]"),
    "an index of numbers": ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}'),
    "a size that is a text": ("config.json", b'"hidden_size": "x"'),
    "no heads": ("config.json", b'"num_attention_heads": 0'),
    "a configuration nested too deep": ("config.json", b"[" * 100_000),
    "a kind that is a list": ("config.json", b'"model_type": []'),
    "tokens": ("tokenizer.json", b"[]"),
    "words": ("tokenizer.json", b'{"model": 3}'),
    "settings of tokens": ("tokenizer_config.json", b"[]"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_one_line_when_they_are_loaded_and_end_no_estimate(
    what, policy, tmp_path
) -> None:
    place = shutil.copytree(policy, tmp_path / "damaged")
    name, content = DAMAGED[what]
    if content.startswith(b'"'):
        key, value = json.loads(b"{%s}" % content).popitem()
        settings = json.loads((place / name).read_text()) | {key: value}
        content = json.dumps(settings).encode()
    if name.endswith("index.json"):
        (place / "model.safetensors").unlink()
    (place / name).write_bytes(content)
    config = micro_config(place, tmp_path)
    assert memory_line(config).startswith("memory: ") and "\n" not in memory_line(config)
    with pytest.raises(ModelError) as told:
        load_policy(config.policy)
    assert "\n" not in str(told.value)
    with contextlib.suppress(ModelError):
        estimate_run(config)


@pytest.mark.parametrize("text", ["[]", '{"base_model_name_or_path": 3}', "{}", "typeless", "["])
def test_damaged_adapters_are_one_line_and_end_no_estimate(text, policy, tmp_path) -> None:
    pytest.importorskip("peft")
    loaded = load_policy(PolicyConfig(path=str(policy), lora_rank=2))
    place = save_policy(loaded.model, loaded.tokenizer, tmp_path / "adapters")
    if text == "typeless":
        text = json.dumps({"base_model_name_or_path": str(policy)})
    (place / "adapter_config.json").write_text(text)
    config = micro_config(place, tmp_path)
    assert memory_line(config).startswith("memory: cannot be told before the policy is loaded (")
    with pytest.raises(ModelError) as told:
        load_policy(config.policy)
    assert "\n" not in str(told.value)


def test_a_policy_of_trained_adapters_takes_what_new_adapters_take(
    policy, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("peft")
    config = micro_config(policy, tmp_path, policy__lora_rank=2)
    loaded = load_policy(config.policy)
    place = save_policy(loaded.model, loaded.tokenizer, tmp_path / "adapters")
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    on_adapters = micro_config(place, tmp_path)
    assert estimate_run(on_adapters) == estimate_run(config)
    real = load_policy(on_adapters.policy).model
    trained = {n: p.shape for n, p in real.named_parameters() if p.requires_grad}
    model = meta_policy(on_adapters.policy)
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == trained
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    with pytest.raises(ModelError, match="needs about") as told:
        memory_line(on_adapters)
    assert "lora_rank" not in str(told.value)


def test_the_process_is_measured() -> None:
    before = resident_bytes()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert before > 10 << 20 and resident_bytes() > before + (48 << 20)


def test_estimates_were_within_15_percent_of_real_runs() -> None:
    result = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    assert {row["case"] for row in result["rows"]} >= {"5M", "30M", "135M"}
    for row in result["rows"]:
        assert row["estimate"] == max(row["update"], row["rollout"])
        assert abs(row["estimate"] / row["peak"] - 1) <= 0.15, row["case"]


def test_doctor_shows_the_parts_of_a_model_and_of_a_run(policy, tmp_path, capsys) -> None:
    assert main(["doctor", str(policy)]) == 0
    text = capsys.readouterr().out
    assert "memory of a run of" in text and "activations" in text and "updates take about" in text
    file = tmp_path / "run.toml"
    file.write_text(f'reference = "start"\n[policy]\npath = "{policy}"\n')
    assert main(["doctor", str(file)]) == 0
    assert "reference" in capsys.readouterr().out
