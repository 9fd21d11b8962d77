"""A run shows itself in a Jupyter kernel, as text, and nowhere else."""

import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from hmpo.config import RunConfig
from hmpo.run.evaluation import Evaluation, Rate
from hmpo.run.notebook import Notebook, default_observer
from hmpo.run.observer import Observer
from hmpo.types import Event

CELL = """
import hmpo
from hmpo.config import EvalConfig, RunConfig, TrainerConfig
result = hmpo.train(RunConfig(
    name="seen", updates=3, prompts_per_rollout=4,
    trainer=TrainerConfig(group_size=4, max_length=12, minibatches=3),
    eval=EvalConfig(final_prompts=8),
))
result.status
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> list:
    """What a real kernel shows of a run that nobody named an observer for."""
    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=300, resources=resources).execute()
    return book.cells[0].outputs


def test_a_kernel_shows_one_picture_that_ends_complete(outputs: list) -> None:
    pictures = [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert len(pictures) == 1
    assert '<progress value="3" max="3">' in pictures[0]
    assert "3 of 3 updates" in pictures[0]
    assert "held-out success, sampled" in pictures[0]


def test_a_kernel_prints_nothing_besides(outputs: list) -> None:
    printed = [o["text"] for o in outputs if o["output_type"] == "stream"]
    assert [text for text in printed if "tqdm" not in text] == []  # which misses ipywidgets
    assert outputs[-1]["data"]["text/plain"] == "'completed'"


def test_outside_of_a_kernel_nobody_watches(monkeypatch) -> None:
    assert type(default_observer()) is Observer
    terminal = SimpleNamespace(get_ipython=lambda: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert type(default_observer()) is Observer
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert type(default_observer()) is Notebook


def test_texts_are_shown_and_not_obeyed(monkeypatch, tmp_path) -> None:
    screen = Notebook()
    monkeypatch.setattr(Notebook, "_draw", lambda self, at_once=False: None)
    script = "<script>alert(1)</script>"
    screen.on_start(RunConfig(), tmp_path / script, 0)
    samples = [
        {"prompt": script, "completion": "\u202e" + script, "reward": 1.0},
        {"prompt": "p", "completion": "c", "reward": float("nan")},
        {"prompt": "p", "completion": "worst", "reward": 0.0},
    ]
    screen.on_rollout(0, samples)
    screen.on_event(Event(name="reward_error", step=1, data={"why": script}))
    rate = Rate(successes=1, trials=4)
    screen.on_evaluation(0, "before", Evaluation(sampled=rate))
    page = screen.page()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4  # folder, prompt, completion, event
    assert "&lt;U+202E&gt;" in page
    assert "worst" in page
    assert "0.250 [" in page


def test_a_long_text_is_cut(monkeypatch, tmp_path) -> None:
    screen = Notebook()
    screen.on_rollout(0, [{"prompt": "x" * 10_000, "completion": "", "reward": 0.0}])
    assert len(screen.page()) < 2_000
