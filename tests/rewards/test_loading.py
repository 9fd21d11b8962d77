"""What is seen of a user's file without running it: which names it has, what a function takes."""

import inspect
from pathlib import Path

import pytest

from hmpo.errors import RewardError
from hmpo.rewards.loading import check_defined, check_spec

SIGNATURES = {
    "plain": "def f(prompts, completions, answer=None, **rest): return 1 / 0",
    "keywords": "async def f(*, completions, gold, hint=(lambda: 3)()): ...",
    "annotated": "def f(completions: Nowhere, answer: list[str] = missing()) -> Never: ...",
    "positional": "def f(a, b=1, /, c=2, **k): ...",
}
UNTOLD = {
    "decorated": "import functools\n@functools.cache\ndef f(gold): ...",
    "twice": "try:\n    import x\nexcept ImportError:\n    pass\ndef f(gold): ...\ndef f(a): ...",
    "assigned": "f = make(gold)",
    "imported": "from somewhere import g as f",
    "below a condition": "if True:\n    def f(gold): ...",
    "star": "from somewhere import *",
    "by its dictionary": "globals()['f'] = 3",
    "no Python": "def f(:",
    "a class": "class f:\n    def __call__(self, gold): ...",
}


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "own.py"


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_parameters_of_the_text_are_those_that_python_finds(name: str, file: Path) -> None:
    text = SIGNATURES[name]
    file.write_text(f"raise SystemExit('was run')\n{text}\n")
    stand = check_defined(f"{file}:f", "reward function", RewardError)
    assert stand is not None
    space: dict = {"Nowhere": int, "missing": list, "Never": int}
    exec(text, space)
    found, real = inspect.signature(stand).parameters, inspect.signature(space["f"]).parameters
    assert [(p.name, p.kind, p.default is p.empty) for p in found.values()] == [
        (p.name, p.kind, p.default is p.empty) for p in real.values()
    ]


@pytest.mark.parametrize("name", UNTOLD)
def test_what_the_text_does_not_tell_is_left_to_the_run(name: str, file: Path) -> None:
    file.write_text(f"{UNTOLD[name]}\n")
    assert check_defined(f"{file}:f", "reward function", RewardError) is None
    check_spec(f"{file}:f", columns=["answer"])


def test_a_name_that_the_file_does_not_have_and_a_column_that_is_not_there(file: Path) -> None:
    file.write_text("raise SystemExit('was run')\ndef score(completions, gold): ...\n")
    with pytest.raises(RewardError, match=r"no scor in .*own.py; did you mean score"):
        check_spec(f"{file}:scor")
    with pytest.raises(RewardError, match=r"reward 'score': its parameter 'gold' is none of"):
        check_spec(f"{file}:score", columns=["answer"])
    check_spec(f"{file}:score", columns=["gold"])
    check_spec(f"{file}:score")
