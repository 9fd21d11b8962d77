"""model: the logits of transformers itself, whatever the padding; what cannot be used is told."""

import json
import pickle

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hmpo.errors import ConfigError, ModelError, RewardError
from hmpo.models.tiny import character_tokenizer
from hmpo.rewards import Rewards
from hmpo.rewards.library import model
from tests.rewards.library.cases import Told, as_trl, messages

ALPHABET = "0123456789abcdefghij <>|:"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}|{% endfor %}"
TEXTS = ["1", "12 34", "a b c 1 2 3 4 5 6", "9" * 40]


def made(kind: str, folder, labels: int = 1, pad: bool = True, template: str | None = None):
    """A folder with a model of this kind, and the model."""
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    count = len(tokenizer)
    extra = {"num_labels": labels, "vocab_size": count, "pad_token_id": 0 if pad else None}
    if kind == "llama":
        found = LlamaForSequenceClassification(LlamaConfig(**SMALL, **extra))
    elif kind == "bert":
        found = BertForSequenceClassification(BertConfig(**SMALL, **extra))
    elif kind == "roberta":
        extra["pad_token_id"] = 1
        found = RobertaForSequenceClassification(RobertaConfig(**SMALL, **extra))
    elif kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        found = GPT2ForSequenceClassification(GPT2Config(**sizes, **extra))
    else:
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
        found = BartForSequenceClassification(BartConfig(**sizes, **extra, eos_token_id=2))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3)
    found.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return found, tokenizer


def alone(found, ids: list[int]) -> list[float]:
    """The oracle: transformers itself, one text without padding."""
    with torch.inference_mode():
        return found(input_ids=torch.tensor([ids])).logits[0].tolist()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bert", "roberta", "gpt2"])
def test_rewards_are_the_logits_that_a_text_has_alone(kind, pad, tmp_path):
    found, tokenizer = made(kind, tmp_path, pad=pad)
    rewards = model(path=str(tmp_path), batch_size=3)(
        prompts=["p" * i for i in range(4)], completions=TEXTS
    )
    for i, (text, reward) in enumerate(zip(TEXTS, rewards)):
        (expected,) = alone(found, tokenizer("p" * i + text)["input_ids"])
        assert reward == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(reward, 6) for reward in rewards}) == 4


def test_messages_go_through_the_chat_template(tmp_path):
    found, tokenizer = made("llama", tmp_path, template=TEMPLATE)
    prompts = [[{"role": "user", "content": "1"}], [{"role": "user", "content": "22"}]]
    function = model(path=str(tmp_path))
    rewards = function(prompts=prompts, completions=[messages("3"), messages("4 4")])
    for text, reward in zip(("<u>1|<a>3|", "<u>22|<a>4 4|"), rewards):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reward == pytest.approx(alone(found, ids)[0], rel=1e-4, abs=1e-5)
    assert function(prompts=prompts, completions=["3", "4 4"]) == rewards


def test_messages_without_a_template_are_one_line(tmp_path):
    made("llama", tmp_path)
    with pytest.raises(ModelError, match="no chat template"):
        model(path=str(tmp_path))(**as_trl(["1"]))


def test_a_class_is_chosen_by_name_or_index(tmp_path):
    found, tokenizer = made("bert", tmp_path, labels=3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": "bad", "1": "fair", "2": "good"}
    path.write_text(json.dumps(config))
    logits = alone(found, tokenizer("12")["input_ids"])
    for label, index in (("good", 2), ("bad", 0), (1, 1)):
        (reward,) = model(path=str(tmp_path), label=label)(prompts=["1"], completions=["2"])
        assert reward == pytest.approx(logits[index], rel=1e-4, abs=1e-5)
    for label, words in (
        ("", "one of the 3 labels bad, fair, good"),
        ("best", "one of bad"),
        (3, "below 3"),
    ):
        with pytest.raises(ConfigError, match=words):
            model(path=str(tmp_path), label=label)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_that_is_too_long_is_none_and_counted(kind, tmp_path):
    _, tokenizer = made(kind, tmp_path)
    told = Told()
    function = model(path=str(tmp_path))
    fits = function.loaded.longest
    assert fits == {"bert": 64, "roberta": 62}[kind]
    fits -= len(tokenizer("")["input_ids"])
    texts = ["1" * fits, "1" * (fits + 1), "1" * 100_000]
    rewards = function(prompts=[""] * 3, completions=texts, log_metric=told.log_metric)
    assert rewards[0] is not None and rewards[1:] == [None, None]
    assert told.metrics == {"model/too_long": [2]}
    assert model(path=str(tmp_path), max_length=3)(prompts=["12"], completions=["34"]) == [None]


@pytest.mark.parametrize(("kind", "context"), [("bert", 64), ("roberta", 62), ("llama", 64)])
def test_a_max_length_above_the_context_is_refused_and_one_above_the_tokenizers_is_not(
    kind, context, tmp_path
):
    _, tokenizer = made(kind, tmp_path)
    tokenizer.model_max_length = 10
    tokenizer.save_pretrained(tmp_path)
    given = {"prompts": [""], "completions": ["1" * 20]}
    assert model(path=str(tmp_path))(**given) == [None]
    assert model(path=str(tmp_path), max_length=context)(**given) != [None]
    function = model(path=str(tmp_path), max_length=context + 1)
    with pytest.raises(RewardError, match=f"got {context + 1}, expected at most {context}"):
        function.prepare()
    with (
        Rewards(function, on_error="skip") as rewards,
        pytest.raises(RewardError, match=f"max_length: got {context + 1}"),
    ):
        rewards([""], ["1"], [[1]], {})


def test_a_model_that_minds_padding_reads_one_by_one(tmp_path, monkeypatch, caplog):
    found, tokenizer = made("llama", tmp_path)
    whole = LlamaForSequenceClassification.forward

    def minds(self, input_ids, attention_mask=None, **rest):
        out = whole(self, input_ids=input_ids, attention_mask=attention_mask, **rest)
        out.logits = out.logits + input_ids.shape[1]
        return out

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", minds)
    rewards = model(path=str(tmp_path))(prompts=[""] * 4, completions=TEXTS)
    assert "padding changes its logits" in caplog.text
    for text, reward in zip(TEXTS, rewards):
        expected = alone(found, tokenizer(text)["input_ids"])[0]
        assert reward == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_dropout_is_off_and_no_gradient_is_kept(tmp_path):
    made("bert", tmp_path)
    function = model(path=str(tmp_path))
    given = {"prompts": ["1"] * 3, "completions": ["2"] * 3}
    assert function(**given) == function(**given)
    assert not any(p.requires_grad for p in function.loaded.model.parameters())


def test_a_head_that_is_not_there_is_refused_and_not_drawn_at_random(tmp_path):
    made("llama", tmp_path)
    torch.manual_seed(0)
    base_size = len(character_tokenizer(ALPHABET))
    base = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=base_size))
    config = json.loads((tmp_path / "config.json").read_text())
    base.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="would be drawn at random"):
        model(path=str(tmp_path)).prepare()


def test_what_is_no_such_model_is_one_line_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*config.json \(No such file"):
        model(path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match=r"got 'LlamaForCausalLM', expected an architecture"):
        model(path=str(tmp_path))


KIND = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([1], "got 'nothing', expected an architecture"),
        ({"architectures": [None]}, "expected an architecture"),
        ({"architectures": 3}, "got '3', expected an architecture"),
        ({"architectures": {"a": 1}}, "expected an architecture"),
        (KIND | {"id2label": ["a"]}, "id2label of config.json: got"),
        (KIND | {"id2label": {"x": "a"}}, "id2label of config.json: got"),
        (KIND | {"id2label": {"0": "a", "2": "b"}}, "id2label of config.json: got"),
        (KIND | {"num_labels": "two"}, "num_labels of config.json: got 'two'"),
        (KIND | {"num_labels": 0}, "num_labels of config.json: got '0'"),
        (KIND | {"num_labels": 1e400}, "num_labels of config.json: got 'inf'"),
        (KIND | {"num_labels": 10**12}, "num_labels of config.json: got"),
        (KIND | {"num_labels": None}, "num_labels of config.json: got 'None'"),
    ],
)
def test_an_odd_config_is_one_line_before_anything_is_loaded(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words) as caught:
        model(path=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["bert"]},
        {"model_type": None},
        {"hidden_size": "big"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 1e400},
    ],
)
def test_an_odd_config_is_one_line_when_it_is_loaded(change, tmp_path):
    made("bert", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    function = model(path=str(tmp_path))
    with pytest.raises(ModelError, match="reward model: ") as caught:
        function.prepare()
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    made("llama", tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}}
    path.write_text(json.dumps(config))
    model(path=str(tmp_path)).prepare()
    config |= {"model_type": "theirs"}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code that comes with a model is never run"):
        model(path=str(tmp_path)).prepare()
    assert not mark.exists()


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_scores_here_and_in_the_reward_process_and_after_a_pickle(timeout, tmp_path):
    made("llama", tmp_path)
    function = pickle.loads(pickle.dumps(model(path=str(tmp_path))))
    function.prepare()
    expected = function(prompts=["1", "2"], completions=["3", "4"])
    with Rewards(function, timeout=timeout) as rewards:
        result = rewards(["1", "2"], ["3", "4"], [[1], [1]], {})
    assert result.total == pytest.approx(expected, rel=1e-4)
