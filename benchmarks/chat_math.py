"""examples/chat_math.toml as a user goes through it: train, export, merge, load with transformers.

python benchmarks/chat_math.py [--seed 0]       needs `hmpo fetch-model smollm2` once
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
import whole_runs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hmpo.config.places import located
from hmpo.config.reading import load_run_config
from hmpo.models.chat import render
from hmpo.tasks import make_task

NAME = "chat_math"
EXAMPLE = Path("examples") / f"{NAME}.toml"
PROMPTS = 64


def questions() -> list[list[dict[str, str]]]:
    """Conversations that were held out, as the policy is asked them."""
    task = make_task(located(load_run_config(EXAMPLE)).task)
    return [task.heldout(index).prompt for index in range(PROMPTS)]


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, asked: list[list[dict[str, str]]]) -> list[str]:
    """What plain transformers answers, one conversation at a time."""
    answers = []
    for messages in asked:
        ids = torch.tensor([render(tokenizer, messages)])
        plain = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert torch.equal(ids, plain["input_ids"]), "prompt ids are not the template's own"
        made = model.generate(**plain, do_sample=False, max_new_tokens=20)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def exported(run: Path, out: Path, asked: list[list[dict[str, str]]]) -> dict[str, Any]:
    """Export a run both ways; answers of the adapters over their base and of the whole model."""
    whole_runs.run(["export", str(run), "--out", str(out / "adapters")])
    whole_runs.run(["export", str(run), "--merge", "--out", str(out / "merged")])
    base = json.loads((out / "adapters" / "adapter_config.json").read_text())
    start = AutoModelForCausalLM.from_pretrained(
        base["base_model_name_or_path"], dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(start, str(out / "adapters"))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    answers = {
        name: greedy(model.eval(), AutoTokenizer.from_pretrained(out / name), asked)
        for name, model in (("adapters", adapted), ("merged", merged))
    }
    equal = sum(a == b for a, b in zip(answers["adapters"], answers["merged"], strict=True))
    told = [
        {"asked": messages[-1]["content"], "answer": answer}
        for messages, answer in zip(asked[:8], answers["merged"])
    ]
    return {"prompts": PROMPTS, "equal_greedy_answers": equal, "answers": told}


def main() -> None:
    """Train, export both ways, and write benchmarks/results/chat_math.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed, asked = parser.parse_args().seed, questions()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        arguments = ["train", str(EXAMPLE), "--no-report"]
        arguments += ["--set", f"out={out / 'runs'}", f"name={NAME}", f"seed={seed}"]
        run = out / "runs" / NAME
        row = {"seed": seed} | whole_runs.measure(NAME, arguments, run, NAME)
        row["exported"] = exported(run, out, asked)
    common.save(NAME, f"python benchmarks/chat_math.py --seed {seed}", [row])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
