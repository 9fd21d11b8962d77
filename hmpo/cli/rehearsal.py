"""`hmpo train --dry-run`: what a run would begin with, shown and not begun."""

from rich.table import Table
from rich.text import Text

from hmpo.cli.samples import printable
from hmpo.cli.screen import Screen
from hmpo.config import RunConfig
from hmpo.rewards.messages import as_text
from hmpo.run.rehearsal import Rehearsal, rehearse

SHOWN = 8
"""Responses shown, evenly over the rollout."""
WIDTH = 400
"""Characters of a prompt or a completion that are shown."""
TAIL = 150
"""Characters of them at the end of the prompt that the policy reads: how its turn is begun."""


def dry_run(config: RunConfig, screen: Screen, *, overwrite: bool) -> int:
    """Sample and score one rollout, show it, and leave nothing behind; returns the exit code.

    Args:
        config: the run.
        screen: where it is shown.
        overwrite: whether the run would be started where another one is.
    """
    found = rehearse(config, observer=screen, overwrite=overwrite)
    for table in sample_tables(found):
        screen.say(table)
    count = len(found.samples)
    for line in reading_lines(found, config.trainer.max_length):
        screen.say(line)
    screen.say(
        f"{count} responses with {sum(found.responses)} tokens in all to prompts of up to "
        f"{max(found.prompts)} tokens; {rewards_line(found)}; nothing was trained or written"
    )
    return 0


def reading_lines(found: Rehearsal, limit: int) -> list[Text]:
    """The first prompt as the policy reads it, and where a response ends."""
    text = found.read
    if len(text) > WIDTH:
        text = f"{text[: WIDTH - TAIL]} ... {text[-TAIL:]}"
    ends = ", ".join(printable(end, WIDTH) for end in found.ends)
    return [
        Text(f"the policy reads: {printable(text, 2 * WIDTH)}"),
        Text(f"a response ends at {ends}, or after {limit} tokens"),
    ]


def rewards_line(found: Rehearsal) -> str:
    """Mean and variety of the rewards; responses that got none are left out, which is told."""
    rewards = [sample["reward"] for sample in found.samples]
    scored = [reward for reward in rewards if reward == reward]
    if not scored:
        return "no response got a reward"
    dropped = len(rewards) - len(scored)
    rest = f", {dropped} responses without a reward left out" if dropped else ""
    mean, kinds = sum(scored) / len(scored), len(set(scored))
    variety = f"{kinds} different rewards" if kinds > 1 else "all equal, which teaches nothing"
    return f"mean reward {mean:.4g}, {variety}{rest}"


def sample_tables(found: Rehearsal) -> list[Table]:
    """Some of the responses: prompt, completion, reward of each function, token ids."""
    tables, count = [], len(found.samples)
    for k in range(min(SHOWN, count)):
        i = k * count // min(SHOWN, count)
        sample = found.samples[i]
        table = Table(title=f"response {i + 1} of {count}", title_justify="left", show_header=False)
        parts = "; ".join(f"{name} {value}" for name, value in sample["rewards"].items())
        ended = "" if sample["finished"] else ", cut at the limit"
        prompt, completion = (str(as_text(sample[name])) for name in ("prompt", "completion"))
        answer = sample.get("columns", {}).get("answer")
        reward = sample["reward"]
        total = f"{reward:.4g}" if reward == reward else "none"
        rows = {
            "prompt": f"{printable(prompt, WIDTH)} ({found.prompts[i]} ids)",
            "completion": f"{printable(completion, WIDTH)} ({found.responses[i]} ids{ended})",
            "expected": "" if answer is None else printable(str(answer), WIDTH),
            "reward": f"{total} ({printable(parts, WIDTH)})",
        }
        for name, text in rows.items():
            if text:
                table.add_row(name, Text(text))
        tables.append(table)
    return tables
