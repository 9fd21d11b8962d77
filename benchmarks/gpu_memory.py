"""[GPU] Memory of runs against its estimate, and 4-bit weights below adapters (QLoRA).

python benchmarks/gpu_memory.py --part memory    peak of real runs over what was told before them
python benchmarks/gpu_memory.py --part qlora     gradients, frozen weights, saving, a whole run
python benchmarks/gpu_memory.py --device cpu --tiny    the same lines on a CPU, in a minute

memory: each case is a process of its own, which estimates as `hmpo train` does and then trains
random weights of that shape for two updates; the peak is the allocator's, without the CUDA context
(on a CPU the resident size, whose larger part is the process). `within` says whether the estimate
lies within 15 % of it.
qlora: wants bitsandbytes and peft. hmpo refuses 4-bit weights on a CPU (there bitsandbytes packs
them anew in evaluation mode, without a gradient); the check of the code goes around both.
Writes results/gpu_PART_DEVICE.json after every row (gpu_PART_cpu_path.json with --tiny).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import save
from memory import SHAPES, high_water, make
from torch import Tensor, nn

from hmpo import train
from hmpo.config import PolicyConfig, RunConfig
from hmpo.config.reading import run_config
from hmpo.models import load_policy, loading, save_policy
from hmpo.run.memory import estimate_run

ROOT = Path(__file__).parents[1]
SHAPES |= {
    "0.5B": {
        "hidden": 896,
        "layers": 24,
        "heads": 14,
        "keys": 2,
        "inner": 4864,
        "words": 151_936,
    },
    "tiny": {"hidden": 64, "layers": 2, "heads": 2, "keys": 2, "inner": 128, "words": 500},
}
LORA = {"lora_rank": 16, "lora_targets": "all-linear", "dtype": "bfloat16"}
FOUR = {"lora_rank": 16, "lora_targets": "all-linear", "quantize": "4bit"}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "135M, float32": ("135M", {}, 256),
    "135M, bfloat16, float32 masters": ("135M", {"dtype": "bfloat16"}, 256),
    "135M, recomputed layers": ("135M", {"gradient_checkpointing": True}, 256),
    "0.5B, LoRA on bfloat16": ("0.5B", LORA, 128),
    "0.5B, LoRA on 4 bits": ("0.5B", FOUR | {"dtype": "bfloat16"}, 128),
}
"""Name: shape, settings of the policy, tokens of a response."""
TINY = {
    "tiny, float32": ("tiny", {}, 16),
    "tiny, LoRA on bfloat16": ("tiny", LORA | {"lora_rank": 2}, 16),
    "tiny, LoRA on 4 bits": ("tiny", FOUR | {"lora_rank": 2}, 16),
}
NEAR = 0.15
"""How far from the peak an estimate may be."""


# -------------------------------------------------------------------------------------- memory


def settings(folder: str, device: str, policy: dict[str, Any], length: int) -> RunConfig:
    """Two updates on a policy in a folder."""
    return run_config(
        {
            "name": "memory",
            "out": folder,
            "updates": 2,
            "threads": 1,
            "device": device,
            "prompts_per_rollout": 4,
            "policy": {"path": f"{folder}/policy", **policy},
            "rewards": {"functions": [f"{ROOT}/benchmarks/memory.py:spread"]},
            "trainer": {"group_size": 8, "max_length": length, "minibatches": 2},
            "eval": {"final_prompts": 8},
            "checkpoint": {"every": 0},
        }
    )


def measured(case: str, device: str, tiny: bool) -> dict[str, Any]:
    """One case, in this process."""
    shape, policy, length = (TINY if tiny else CASES)[case]
    with tempfile.TemporaryDirectory() as folder, going_around(device):
        command = [sys.executable, __file__, "--make", shape, folder]
        subprocess.run(command, check=True)
        config = settings(folder, device, policy, length)
        found = estimate_run(config)
        result = train(config)
    cuda = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else high_water()
    return {
        "case": case,
        "estimate": found.peak,
        "peak": peak,
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "ratio": round(found.peak / peak, 3),
        "within": abs(found.peak / peak - 1) <= NEAR,
        "update": found.update,
        "rollout": found.rollout,
        "parts": found.parts,
        "status": result.status,
    }


def memory(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every case, in a process of its own."""
    for case, (_, policy, _) in (TINY if tiny else CASES).items():
        if reason := lacking(policy):
            yield {"case": case, "skipped": reason}
            continue
        command = [sys.executable, __file__, "--one", case, "--device", device]
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            yield {"case": case, "failed": f"exit code {done.returncode}", "within": False}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def lacking(policy: dict[str, Any]) -> str:
    """Which package that a policy wants cannot be imported."""
    wanted = ["peft"] * bool(policy.get("lora_rank"))
    wanted += ["bitsandbytes"] * ("quantize" in policy)
    for name in wanted:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package's own import may raise anything
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


# --------------------------------------------------------------------------------------- qlora


@contextlib.contextmanager
def going_around(device: str) -> Iterator[None]:
    """On a CPU alone: 4-bit weights are not refused, and never packed anew."""
    with contextlib.ExitStack() as stack:
        if device == "cpu" and not lacking(FOUR):
            modules = importlib.import_module("bitsandbytes").nn.modules
            stack.enter_context(mock.patch.object(modules, "has_avx512bf16", lambda: False))
            stack.enter_context(mock.patch.object(loading, "refuse_quantized", lambda *_: None))
        yield


def trained(model: nn.Module) -> list[Tensor]:
    """What has gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def digest(model: nn.Module) -> str:
    """Of the packed weights."""
    four = importlib.import_module("bitsandbytes").nn.Linear4bit
    found = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, four):
            found.update(module.weight.data.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def gradients(folder: str, device: str, policy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Adapters' gradients over 4 bits against those over the same weights in float32."""
    package = importlib.import_module("bitsandbytes")
    for dtype, limit in (("float32", 1e-3), ("bfloat16", 5e-2)):
        names = policy | {"path": f"{folder}/policy", "dtype": dtype}
        narrow = load_policy(PolicyConfig(**names), device=device).model
        whole = {k: v for k, v in names.items() if k != "quantize"} | {"dtype": "float32"}
        wide = load_policy(PolicyConfig(**whole), device=device).model
        modules, counted = dict(wide.named_modules()), 0
        with torch.no_grad():
            for name, module in narrow.named_modules():
                if isinstance(module, package.nn.Linear4bit):
                    weight = module.weight
                    values = package.functional.dequantize_4bit(weight.data, weight.quant_state)
                    modules[name].weight.copy_(values)
                    counted += 1
            for p, q in zip(trained(narrow), trained(wide), strict=True):
                q.copy_(p.normal_(0, 0.05))
        found = []
        ids = torch.arange(3, 35, device=device).view(2, 16)
        for model in (narrow.eval(), wide.eval()):
            logits = model(ids).logits.float()
            logits.log_softmax(-1)[..., 3:200].mean().backward()
            found.append(torch.cat([p.grad.flatten().float() for p in trained(model)]))
        yield {
            "case": f"gradient over 4 bits, {dtype}",
            "matrices": counted,
            "error": float((found[0] - found[1]).norm() / found[1].norm()),
            "limits": {"error": limit},
            "no_matrix": counted == 0,
        }


def kept(folder: str, device: str, policy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Adapters that are saved and loaded over the same 4 bits answer alike."""
    config = PolicyConfig(path=f"{folder}/policy", **policy)
    loaded = load_policy(config, device=device)
    with torch.no_grad():
        for p in trained(loaded.model):
            p.normal_(0, 0.05)
    place = save_policy(loaded.model, loaded.tokenizer, Path(folder) / "adapters")
    again = load_policy(
        dataclasses.replace(config, path=str(place), lora_rank=0, lora_targets=()), device=device
    )
    ids = torch.arange(3, 35, device=device).view(2, 16)
    with torch.no_grad():
        one, other = (m.eval()(ids).logits.float() for m in (loaded.model, again.model))
    yield {
        "case": "saved adapters over 4 bits",
        "apart": float((one - other).abs().max()),
        "same_bits": digest(loaded.model) == digest(again.model),
        "limits": {"apart": 1e-4},
    }


def whole_run(folder: str, device: str, policy: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run of two updates, its policy loaded again: the 4 bits as they were."""
    before = digest(
        load_policy(PolicyConfig(path=f"{folder}/policy", **policy), device=device).model
    )
    config = settings(folder, device, policy, 16)
    result = train(config)
    records = [
        json.loads(line) for line in (result.folder / "telemetry.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if record["type"] == "step"]
    after = load_policy(
        PolicyConfig(path=str(result.folder / "policy"), quantize="4bit"), device=device
    ).model
    yield {
        "case": "a run on 4 bits",
        "status": result.status,
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "skipped": sum(step["update_skipped"] for step in steps),
        "same_bits": digest(after) == before,
        "adapters_moved": any(
            bool(p.any()) for name, p in after.named_parameters() if "lora_B" in name
        ),
        "limits": {"skipped": 0},
    }  # fmt: skip


def qlora(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every check; one that raises leaves its message."""
    if reason := lacking(FOUR):
        yield {"case": "4 bits", "skipped": reason}
        return
    policy = FOUR | ({"lora_rank": 2} if tiny else {"dtype": "bfloat16"})
    with tempfile.TemporaryDirectory() as folder, going_around(device):
        make("tiny" if tiny else "135M", folder)
        for check in (gradients, kept, whole_run):
            try:
                yield from check(folder, device, policy)
            except Exception as error:
                traceback.print_exc()
                yield {"case": check.__name__, "failed": f"{type(error).__name__}: {error}"[:400]}


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row is not as it should be."""
    over = any(row[name] > limit for name, limit in row.get("limits", {}).items())
    flags = ("within", "same_bits", "adapters_moved")
    return (
        over
        or "failed" in row
        or any(row.get(f) is False for f in flags)
        or bool(row.get("no_matrix"))
    )


PARTS = {"qlora": qlora, "memory": memory}


def main() -> int:
    """Measure the parts; 1 where a row is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make:
        make(*chosen.make)
        return 0
    if chosen.one:
        print(json.dumps(measured(chosen.one, chosen.device, chosen.tiny)))
        return 0
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --tiny checks the code without one")
        return 0
    bad = 0
    for part in (chosen.part,) if chosen.part else PARTS:
        rows: list[dict[str, Any]] = []
        name = f"gpu_{part}_{chosen.device}" + ("_path" if chosen.tiny else "")
        command = f"python benchmarks/gpu_memory.py --device {chosen.device} --part {part}"
        for row in PARTS[part](chosen.device, chosen.tiny):
            print(row, flush=True)
            bad |= wrong(row)
            mark = {"check": "of the code only: tiny sizes"} if chosen.tiny else {}
            rows.append({"part": part, **mark, **row})
            save(name, command + " --tiny" * chosen.tiny, rows, show=False)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
