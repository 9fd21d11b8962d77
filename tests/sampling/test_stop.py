import pytest
import torch

from hmpo.errors import ConfigError
from hmpo.models import character_tokenizer
from hmpo.sampling import responses as sampling
from hmpo.sampling.responses import sample_responses
from hmpo.sampling.stop import StopStrings
from tests.sampling.test_decoder import build
from tests.support import padded_prompts, tiny_llama

STOP = ("ab", "cde", "gh", "fa", "be")


class Bytes:
    """Tokens are the bytes of UTF-8, then a few longer pieces; 0 is special, a blank leads."""

    all_special_ids = (0,)
    pieces = (b" a", b"ab", b"END", b"")

    def decode(self, ids, skip_special_tokens=False) -> str:
        parts = [bytes([i]) if i < 256 else self.pieces[i - 256] for i in ids if i != 0]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")


def first_end(tokens: list[int], stop: tuple[str, ...]) -> int | None:
    """Index of the token after which the whole text holds a stop string."""
    for length in range(1, len(tokens) + 1):
        text = Bytes().decode(tokens[:length])
        if any(s in text for s in stop):
            return length - 1
    return None


@pytest.mark.parametrize(
    "stop", [("END",), ("\n\n", "ab"), ("é€",), ("a a",), ("b ", "zz"), ("bababababababab",)]
)
def test_the_token_that_completes_a_stop_string_is_found(stop: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    alphabet = [0, 256, 257, 258, 259, *b"END\nabz ", *"é€".encode()]
    ended = 0
    for _ in range(200):
        draws = torch.randint(0, len(alphabet), (60,), generator=generator)
        tokens = [alphabet[i] for i in draws.tolist()]
        if torch.rand((), generator=generator) < 0.5:
            tokens[40:40] = list(stop[0].encode())
        watch = StopStrings(Bytes(), stop, rows=2)
        expected = first_end(tokens, stop)
        found = next((i for i, t in enumerate(tokens) if watch.completes(1, t)), None)
        assert found == expected
        ended += expected is not None
    assert ended > 50


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer("abcdefgh")


def rollout(tokenizer, *, stop=STOP, **options):
    model = tiny_llama(len(tokenizer), spread=0.15).double()
    ids = torch.randint(4, len(tokenizer), (3, 4), generator=torch.Generator().manual_seed(0))
    settings = {"group_size": 5, "max_length": 40, "eos_token": 10_000} | options
    return sample_responses(
        model,
        ids,
        generator=torch.Generator().manual_seed(1),
        stop=stop,
        tokenizer=tokenizer if stop else None,
        **settings,
    )


def test_rows_end_with_the_token_that_completes_a_stop_string(tokenizer) -> None:
    free = rollout(tokenizer, stop=())
    cut = rollout(tokenizer)
    ended = 0
    for i, length in enumerate(cut.lengths.tolist()):
        tokens = free.response_ids[i, : int(free.lengths[i])].tolist()
        texts = [
            tokenizer.decode(tokens[: n + 1], skip_special_tokens=True) for n in range(len(tokens))
        ]
        hits = [n + 1 for n, text in enumerate(texts) if any(s in text for s in STOP)]
        assert length == min([*hits, len(tokens)])
        assert cut.response_ids[i, :length].tolist() == tokens[:length]
        assert (cut.response_ids[i, length:] == 0).all()
        assert (cut.old_logprobs[i, length:] == 0).all()
        assert bool(cut.finished[i]) == bool(hits)
        ended += bool(hits)
    assert 3 < ended < len(cut.finished), "some rows must end so, and leave the batch, some not"


def test_stop_strings_give_the_same_tokens_without_cache(tokenizer) -> None:
    one, two = rollout(tokenizer), rollout(tokenizer, use_cache=False)
    three = rollout(tokenizer, decoder="module")
    assert one.fast and not two.fast and not three.fast
    for other in (two, three):
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.finished, other.finished)
        assert float((one.old_logprobs - other.old_logprobs).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["llama, biases, tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("share", [0.0, 0.25, 2.0], ids=["at once", "as usual", "never"])
def test_every_family_draws_the_tokens_of_the_path_without_cache(
    kind: str, group: int, share: float, monkeypatch
) -> None:
    """Whenever finished rows leave, whether by end tokens or by stop strings; in float64, where no
    rounding turns a draw."""
    monkeypatch.setattr(sampling, "COMPACT_SHARE", share)
    model = build(kind, torch.float64)
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789")
    ids, mask = padded_prompts()
    fast, slow = (
        sample_responses(
            model,
            ids,
            mask,
            group_size=group,
            max_length=24,
            eos_token=(2, 3),
            stop=tuple("abcdefghij") if group == 1 else ("ab", "q", "zz", "k1"),
            tokenizer=tokenizer,
            use_cache=use_cache,
            generator=torch.Generator().manual_seed(5),
        )
        for use_cache in (True, False)
    )
    assert fast.fast and not slow.fast and fast.finished.any()
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert float((fast.old_logprobs - slow.old_logprobs).abs().max()) < 1e-12


@pytest.mark.parametrize("every", [3, 8, 64])
@pytest.mark.parametrize("stop", [(), STOP])
def test_looking_rarely_at_what_is_finished_changes_nothing(
    tokenizer, monkeypatch, every: int, stop
) -> None:
    often = rollout(tokenizer, stop=stop, eos_token=(2, 5))
    monkeypatch.setattr(sampling, "check_every", lambda device: every)
    rarely = rollout(tokenizer, stop=stop, eos_token=(2, 5))
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(often, name), getattr(rarely, name)), name
    for name in ("old_logprobs", "sampling_logprobs"):
        error = (getattr(often, name) - getattr(rarely, name)).abs().max()
        assert float(error) < 1e-12, name


def test_stop_strings_need_a_tokenizer_and_text() -> None:
    ids = torch.ones(1, 2, dtype=torch.long)
    for stop, tokenizer in ((("x",), None), (("",), Bytes())):
        with pytest.raises(ConfigError, match="stop: got"):
            sample_responses(tiny_llama(), ids, stop=stop, tokenizer=tokenizer)
