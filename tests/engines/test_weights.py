"""What a server is given: every weight, under the names that files of the architecture have."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from hmpo.engines import weights
from hmpo.engines.check import MEAN, MEAN_16, MOST, MOST_16, refuse_other_weights
from hmpo.errors import EngineError, StorageError
from tests.support import tiny_llama


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def named(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file."""
    with safe_open(folder / weights.FILE, framework="pt") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@pytest.mark.parametrize("make", [tiny_llama, mixtral])
def test_names_and_shapes_are_those_of_a_saved_model(make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "saved")
    weights.write_weights(model, tmp_path / "sent")
    saved, sent = named(tmp_path / "saved"), named(tmp_path / "sent")
    assert saved.items() <= sent.items() and sent.keys() - saved.keys() <= {"lm_head.weight"}


def test_a_tied_head_is_sent_by_its_own_name(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    sent = load_file(weights.write_weights(model, tmp_path))
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    assert torch.equal(sent["lm_head.weight"], model.get_input_embeddings().weight)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_file(tmp_path, monkeypatch) -> None:
    model = tiny_llama()
    before = weights.write_weights(model, tmp_path).read_bytes()

    def full(*given, **named) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(
        StorageError, match=r"no room for .* of weights \(.*No space left"
    ) as caught:
        weights.write_weights(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [weights.FILE]
    assert (tmp_path / weights.FILE).read_bytes() == before


def test_weights_that_do_not_fit_the_memory_go_to_the_disk(tmp_path, monkeypatch) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr(weights, "SHARED", tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda place: Usage)
    folder = weights.make_folder(tiny_llama())
    assert folder.parent != tmp_path and folder.is_dir()
    weights.remove_folder(folder)
    monkeypatch.setattr(Usage, "free", 1 << 40)
    folder = weights.make_folder(tiny_llama())
    assert folder.parent == tmp_path


@pytest.mark.parametrize(
    ("rounded", "mean", "most"), [(False, MEAN, MOST), (True, MEAN_16, MOST_16)]
)
def test_the_check_bounds_the_mean_and_every_token(rounded: bool, mean: float, most: float) -> None:
    drawn = -torch.rand(4, 50, dtype=torch.float64) - 1
    mask = torch.ones_like(drawn, dtype=torch.bool)
    mask[:, 40:] = False
    sign = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0).double()

    def check(moved: torch.Tensor) -> None:
        refuse_other_weights(moved, drawn, mask, rounded=rounded)

    check(drawn + 0.9 * mean * sign)
    with pytest.raises(EngineError, match="nat from the policy's own on average"):
        check(drawn + 1.1 * mean * sign)  # the signs do not cancel
    one = torch.zeros_like(drawn)
    one[1, 3] = 0.9 * most
    check(drawn + one)
    with pytest.raises(EngineError):
        check(drawn + one * 1.2)
    with pytest.raises(EngineError):
        check(drawn + one * torch.nan)
    one = torch.zeros_like(drawn)
    one[1, 45] = 9.0
    check(drawn + one)  # padding
    refuse_other_weights(drawn[:, :0], drawn[:, :0], mask[:, :0], rounded=rounded)
