"""Rollouts from a server: the policy's own log-probs, and each trap that one was seen to set."""

import pytest
import torch

from hmpo.engines.check import refuse_other_weights
from hmpo.engines.protocol import VersionedRollout
from hmpo.engines.vllm import VLLMEngine
from hmpo.errors import EngineError
from hmpo.logprobs import token_logprobs
from hmpo.sampling.options import SamplingOptions
from tests.engines.conftest import move

OPTIONS = SamplingOptions(max_length=6, eos_tokens=(2,), pad_token=0, temperature=0.8)
PROMPTS = [[5, 6, 7, 13], [8, 9], [5, 6, 7, 13]]


def draw(
    engine: VLLMEngine, options: SamplingOptions = OPTIONS, *, group_size: int = 4, tokenizer=None
) -> VersionedRollout:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in PROMPTS])
    generator = torch.Generator().manual_seed(3)
    given = {"group_size": group_size, "generator": generator, "tokenizer": tokenizer}
    return engine.sample(ids, mask, options, **given)


@torch.no_grad()
def compared(engine: VLLMEngine, drawn: VersionedRollout, temperature: float = 0.8) -> float:
    """Largest distance (nat) of the engine's log-probs from the policy's own; stops as a run."""
    rollout = drawn.rollout
    own = token_logprobs(
        engine.policy, rollout.input_ids, rollout.attention_mask,
        rollout.response_ids.shape[1], temperature=temperature,
    )  # fmt: skip
    mask = rollout.response_mask
    refuse_other_weights(own, rollout.sampling_logprobs, mask, rounded=False)
    return float((own - rollout.sampling_logprobs)[mask].abs().max())


def refusal(engine: VLLMEngine, pattern: str, options: SamplingOptions = OPTIONS) -> str:
    """The one line that a rollout ends with."""
    with pytest.raises(EngineError, match=pattern) as caught:
        engine.sync(engine.policy, 0)
        compared(engine, draw(engine, options), options.temperature)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what works ------------------------------------------------------------------------------


def test_every_token_is_of_the_present_weights_and_has_their_logprob(engine) -> None:
    made, _ = engine()
    for version in range(3):
        made.sync(made.policy, version)
        drawn = draw(made)
        assert compared(made, drawn) < 1e-5
        mask = drawn.rollout.response_mask
        assert bool((drawn.versions[mask] == version).all())
        assert bool((drawn.versions[~mask] == -1).all())
        move(made.policy, version)


def test_a_rollout_has_the_form_of_our_own(engine) -> None:
    made, _ = engine()
    made.sync(made.policy, 0)
    rollout = draw(made).rollout
    assert rollout.prompt_ids.shape == (12, 4) and rollout.group_size == 4
    lengths = rollout.lengths
    assert bool((rollout.response_mask.long().diff(dim=1) <= 0).all()), "in one piece"
    last = rollout.response_ids.gather(1, lengths[:, None] - 1)[:, 0]
    assert torch.equal(rollout.finished, last == 2)
    assert bool((lengths[~rollout.finished] == 6).all())
    assert bool((rollout.response_ids[~rollout.response_mask] == 0).all())
    assert bool((rollout.sampling_logprobs[~rollout.response_mask] == 0).all())


def test_equal_prompts_and_samples_of_one_have_noise_of_their_own(engine) -> None:
    made, stand_in = engine()
    made.sync(made.policy, 0)
    rows = draw(made).rollout.response_ids.tolist()
    assert rows[:4] != rows[8:], "the third prompt is the first once more"
    seeds = sorted(b["sampling_params"]["seed"] for p, b in stand_in.asked if "generate" in p)
    assert [seed - seeds[0] for seed in seeds] == [0, 4, 8], "sample j of a prompt takes seed + j"
    assert draw(made).rollout.response_ids.tolist() == rows, "of one generator one rollout"


def test_a_response_is_cut_after_its_first_stop_string(engine, loaded) -> None:
    made, _ = engine()
    made.sync(made.policy, 0)
    options = SamplingOptions(max_length=6, eos_tokens=(2,), temperature=0.8)
    plain = draw(made, options).rollout
    texts = loaded.tokenizer.batch_decode([row[:2] for row in plain.response_ids.tolist()])
    stop = texts[0]
    cut = draw(
        made, SamplingOptions(**{**vars(options), "stop": (stop,)}), tokenizer=loaded.tokenizer
    )
    rollout, found = cut.rollout, 0
    for row in range(12):
        text = loaded.tokenizer.decode(rollout.response_ids[row][rollout.response_mask[row]])
        if stop in text:
            found += 1
            assert text.endswith(stop) and bool(rollout.finished[row])
        else:
            assert torch.equal(rollout.response_mask[row].sum(), plain.lengths[row])
    assert found and compared(made, cut) < 1e-5


def test_an_untied_policy_is_served_too(engine) -> None:
    made, _ = engine()
    made.policy.config.tie_word_embeddings = False
    head = made.policy.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)
    made.sync(made.policy, 0)
    assert compared(made, draw(made)) < 1e-5


def test_nothing_is_left_behind(engine) -> None:
    made, _ = engine()
    made.sync(made.policy, 0)
    assert list(made.folder.iterdir()) == []
    made.close()
    assert not made.folder.exists()


# --- the traps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["head", "missing"])
def test_weights_that_did_not_arrive_stop_the_run(engine, fault: str) -> None:
    made, _ = engine(fault)
    made.sync(made.policy, 0)
    assert compared(made, draw(made)) < 1e-5, "as long as they are what they were"
    move(made.policy)
    refusal(made, r"^rollout\.engine: got log-probs that are .* nat from the policy's own")


def test_prefixes_of_older_weights_are_not_read(engine) -> None:
    made, stand_in = engine("keeps")  # its cache survives a pause
    made.sync(made.policy, 0)
    draw(made)
    move(made.policy)
    made.sync(made.policy, 1)
    assert compared(made, draw(made)) < 1e-5, "each version has prefixes of its own"
    for version in (2, 3):  # without that, the cache gives the older weights' numbers
        made.sync(made.policy, version)
        made.labels = {stand_in.label: version}
        body = [b for p, b in stand_in.asked if "generate" in p][-1]
        body["cache_salt"] = "one"
        _, answer = stand_in.generate(body)
        tokens = answer["choices"][0]["logprobs"]["content"]
        if version == 2:
            first = tokens
            move(made.policy, 7)
    assert tokens == first


def test_logprobs_without_the_temperature_stop_the_run(engine) -> None:
    made, _ = engine("raw")
    assert "--logprobs-mode processed_logprobs" in refusal(made, "got log-probs")


def test_a_server_that_was_restarted_gets_the_weights_again(engine) -> None:
    made, stand_in = engine()
    move(made.policy)
    made.sync(made.policy, 4)
    stand_in.faults.add("restarts")
    drawn = draw(made)
    assert compared(made, drawn) < 1e-5
    assert bool((drawn.versions[drawn.rollout.response_mask] == 4).all())


def test_a_server_that_was_left_paused_goes_on(engine) -> None:
    made, stand_in = engine()
    stand_in.post("/pause", {}, {})
    made.sync(made.policy, 0)
    assert compared(made, draw(made)) < 1e-5


def test_a_server_that_stays_paused_is_not_waited_for_without_end(engine) -> None:
    made, _ = engine("stays paused", timeout=0.5)
    line = refusal(made, r"no answer to /inference/v1/generate within 0\.5 s")
    assert "as somebody has paused it" in line and "then resume the run" in line


def test_another_trainer_on_the_server_is_noticed(engine) -> None:
    made, _ = engine("another")
    line = refusal(made, r"got tokens drawn by weights 'another\.0'")
    assert "one trainer at a time" in line


def test_a_reload_that_fails_leaves_the_server_paused(engine) -> None:
    made, stand_in = engine("reload")
    line = refusal(made, "could not take the weights: answered 500 to /collective_rpc")
    assert stand_in.paused and "EngineCore encountered an issue." in line
    stand_in.faults.clear()
    made.sync(made.policy, 1)
    assert compared(made, draw(made)) < 1e-5, "a good file puts it right"


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("dies", "drew no responses: answered 500 to /inference/v1/generate"),
        ("hangs up", r"could not take the weights: no answer to /pause \("),
        ("drops", "gave 3 responses, expected 4"),
        ("loses", r"answered otherwise than vLLM 0\.32 does \(ValueError: log-probs of "),
        ("aborts", 'a response ended by "abort", expected an end token or max_length'),
    ],
)
def test_what_was_not_asked_for_is_one_line(engine, fault: str, pattern: str) -> None:
    made, _ = engine(fault)
    refusal(made, pattern)


def test_a_server_that_would_shorten_responses_is_refused_before(engine) -> None:
    made, stand_in = engine()
    stand_in.length = 9
    line = refusal(
        made, r"got a prompt of 4 tokens and trainer\.max_length = 6, expected at most 9"
    )
    assert "--max-model-len 10" in line
    assert not any("generate" in path for path, _ in stand_in.asked)


def test_a_server_that_shortens_without_a_word_is_found_out(engine) -> None:
    made, stand_in = engine()
    made.sync(made.policy, 0)
    stand_in.length = 6
    with pytest.raises(
        EngineError, match=r"shortened a response to 2 tokens of trainer\.max_length"
    ):
        draw(made)


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("no /inference/v1/generate", "which has no /inference/v1/generate; start it with --enab"),
        (
            "no /collective_rpc",
            "which has no /collective_rpc; start it with VLLM_SERVER_DEV_MODE=1",
        ),
        ("no json", "where no server is ready: answered /version with no JSON"),
    ],
)
def test_a_server_that_is_not_what_it_should_be(engine, fault: str, pattern: str) -> None:
    made, _ = engine(fault)
    refusal(made, pattern)


def test_an_older_vllm_is_refused(engine) -> None:
    made, stand_in = engine()
    stand_in.version = "0.19.2rc1.dev3"
    refusal(made, r"with vLLM 0\.19\.2rc1\.dev3, expected 0\.32 or newer")
    stand_in.version = "1.0"
    made.sync(made.policy, 0)


def test_nobody_there_is_one_line(engine) -> None:
    made, _ = engine()
    made.server.client = type(made.client)("http://127.0.0.1:1", 5.0)
    refusal(
        made, r"^rollout\.engine: got 'http://127\.0\.0\.1:1', where no server is ready: no ans"
    )
