"""What is seen of a policy without its weights is what it is."""

import pytest
import torch

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy
from hmpo.proposal.policy import count_of, look_at_policy
from tests.proposal.kinds import CONTEXT, MODELS


@pytest.mark.parametrize("name", MODELS)
def test_facts_are_those_of_the_model_once_it_is_loaded(here, name):
    facts = look_at_policy(PolicyConfig(path=name))
    loaded = load_policy(PolicyConfig(path=name))
    assert facts.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert facts.kind == loaded.model.config.model_type and facts.stored == "float32"
    assert facts.context == CONTEXT[name] and not facts.adapter
    assert facts.template == (loaded.tokenizer.chat_template is not None)
    assert facts.projections == (name != "plain")


def test_a_switch_of_thinking_is_one_that_changes_what_is_asked(here):
    assert look_at_policy(PolicyConfig(path="qwen")).switch == "enable_thinking"
    assert {look_at_policy(PolicyConfig(path=n)).switch for n in ("llama", "gemma", "plain")} == {
        ""
    }


def test_a_template_that_opens_the_thinking_itself_is_seen(here, tmp_path):
    template = (here / "qwen" / "chat_template.jinja").read_text()
    folder = tmp_path / "thinker"
    folder.mkdir()
    for path in (here / "qwen").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = template.partition("{%- if enable_thinking")[0] + "{{ '<think>\\n' }}{%- endif -%}"
    (folder / "chat_template.jinja").write_text(text)
    facts = look_at_policy(PolicyConfig(path=str(folder)))
    assert facts.thinks and not facts.switch
    assert not look_at_policy(PolicyConfig(path="qwen")).thinks


def test_a_template_is_asked_whether_it_takes_a_system_turn(here):
    turns = [{"role": "system", "content": "0"}, {"role": "user", "content": "0"}]
    takes = {n: look_at_policy(PolicyConfig(path=n)).renders(turns) for n in MODELS}
    assert takes == {"llama": True, "qwen": True, "gemma": False, "plain": False}


def test_no_weight_is_read(here, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("transformers.modeling_utils.load_state_dict", refuse)
    before = torch.get_rng_state()
    look_at_policy(PolicyConfig(path="llama"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_file_of_weights_is_one_line(here, tmp_path):
    for path in (here / "llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:1000])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((here / "llama" / name).read_bytes())
    with pytest.raises(ModelError, match="no model can be made of it") as caught:
        look_at_policy(PolicyConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_counts_are_read_as_people_say_them():
    counts = [count_of(n) for n in (812, 22_100, 494_000_000, 7_600_000_000)]
    assert counts == ["812", "22.1k", "494.0M", "7.6B"]
