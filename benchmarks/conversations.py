"""How an example of several turns learns: success on held-out prompts along each seed's run.

python benchmarks/conversations.py guess [--seeds 0 1 2]
python benchmarks/conversations.py calculator
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from common import one_thread, save

from hmpo.config.reading import load_run_config
from hmpo.run.loop import train

EXAMPLES = Path(__file__).parents[1] / "examples"


def curve(name: str, seed: int) -> dict:
    """Evaluations of one run, and what its updates logged of turns."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        settings = [f"seed={seed}", f"out={json.dumps(out)}"]
        result = train(load_run_config(EXAMPLES / f"{name}.toml", settings))
        log = (result.folder / "telemetry.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in log.splitlines()]
    evals = [record for record in records if record["type"] == "eval"]
    steps = [record for record in records if record["type"] == "step"]
    return {
        "seed": seed,
        "cpu_seconds": round(time.process_time() - began, 1),
        "evaluations": [
            {name: record.get(name) for name in ("step", "eval/sampled", "eval/greedy", "eval/n")}
            for record in evals
        ],
        "turns_mean": [round(steps[0]["turns/mean"], 3), round(steps[-1]["turns/mean"], 3)],
        "turns_limit_frac": [steps[0]["turns/limit_frac"], steps[-1]["turns/limit_frac"]],
        **{
            name: [round(steps[at][name], 3) for at in (0, -1)]
            for name in ("tools/mean", "tools/failed_frac")
            if name in steps[0]
        },
    }


def main() -> None:
    """Train each seed and write benchmarks/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=("guess", "calculator"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    one_thread()
    curves = [curve(args.example, seed) for seed in args.seeds]
    seeds = " ".join(map(str, args.seeds))
    save(args.example, f"python benchmarks/conversations.py {args.example} --seeds {seeds}", curves)


if __name__ == "__main__":
    main()
