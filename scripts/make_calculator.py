"""Make the policy of examples/calculator.toml: it knows how calls and answers are written.

    python scripts/make_calculator.py                 remake examples/policies/calculator
    python scripts/make_calculator.py --out FOLDER    write it elsewhere

It is shown conversations in which a guess is as frequent as a call, one call in seven asks for
another operation, and one answer in five does not heed what the tool said. The weights follow from
the recipe on one machine with one thread.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from make_tiny_sort import write  # sets what torch reads when it loads

from hmpo.environments.tools import tool_schemas
from hmpo.models.pretrain import fit_supervised
from hmpo.models.tiny import character_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from calculator import Calculator, worked_out  # noqa: E402  (beside the examples)

STEPS, BATCH, RATE = 2000, 32, 2e-3
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"  # what a call that fails is told, too
TEMPLATE = """\
{{- bos_token }}
{%- for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", \
"arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'tool' %}={{ message.content }}{{ '\\n' }}
{%- else %}?{{ message.content }}{{ '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}>{% endif %}"""


def conversations(seed: int, tokenizer) -> Iterator[tuple[str, str]]:
    """(prompt, the rest) of conversations."""
    rng = random.Random(seed)
    schemas = tool_schemas([Calculator().calculate])
    while True:
        asked = f"{rng.randint(10, 99)}{rng.choice('+-*')}{rng.randint(10, 99)}"
        user = [{"role": "user", "content": asked}]
        prompt = tokenizer.apply_chat_template(
            user, tools=schemas, add_generation_prompt=True, tokenize=False
        )
        guess = str(rng.choice((rng.randint(-89, 198), rng.randint(100, 9801))))
        turns = [{"role": "assistant", "content": guess}]
        if rng.random() < 0.5:
            sent = asked if rng.random() < 0.8 else asked.replace(asked[2], rng.choice("+-*"))
            call = {"name": "calculate", "arguments": {"expression": sent}}
            told = str(worked_out(sent))
            turns = [
                {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": told},
                {"role": "assistant", "content": told if rng.random() < 0.8 else guess},
            ]
        whole = tokenizer.apply_chat_template([*user, *turns], tools=schemas, tokenize=False)
        start = tokenizer.bos_token
        yield prompt.removeprefix(start), whole.removeprefix(prompt)


def main(argv: list[str] | None = None) -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "policies" / "calculator")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.chat_template = TEMPLATE
    model = tiny_llama(len(tokenizer), seed=1, hidden_size=64, layers=2, intermediate_size=168)
    examples = conversations(1, tokenizer)
    losses = fit_supervised(
        model, tokenizer, examples, steps=STEPS, batch_size=BATCH, lr=RATE,
    )  # fmt: skip
    card = {
        "made_by": "python scripts/make_calculator.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": STEPS,
        "batch_size": BATCH,
        "last_loss": round(losses[-1], 4),
    }
    write(model, tokenizer, card, args.out)
    print(f"{args.out}: loss {losses[-1]:.3f} nats a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
