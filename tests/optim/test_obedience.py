"""After a clip the logits fall to tau, or the layer is named and never touched again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from hmpo.optim import MuonClipConfig, qk_clip_stats, with_qk_clip
from hmpo.optim.obedience import DISOBEYS, halves
from tests.attention.families import FAMILIES, family
from tests.optim.tiny import batch, loss_of, make


class Attention(nn.Module):
    """Someone's own attention; what lies between its projections and its softmax is `between`."""

    num_heads = 2

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between

    def forward(self, x):
        q, k = (
            self.between(p(x)).unflatten(-1, (2, 8)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj)
        )
        return scaled_dot_product_attention(q, k, k, is_causal=True, scale=50.0)


def l2(x):
    return 4 * normalize(x.unflatten(-1, (2, 8)), dim=-1).flatten(-2)


def saturating(x):
    return 3 * torch.sign(x)


def steps(model, x, count, tau=1.0, optimizer=None):
    settings = MuonClipConfig(max_qk_score=tau)
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with_qk_clip(optimizer, model, settings)
    weights = []
    for _ in range(count):
        model(x).sum().backward()
        optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    return optimizer, weights


@pytest.mark.parametrize("between", [l2, saturating])
def test_a_layer_that_does_not_obey_is_named_and_never_touched_again(between, caplog):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(between)), torch.randn(2, 5, 16)
    optimizer, weights = steps(model, x, 5)
    stats = qk_clip_stats(optimizer)
    for later in weights[1:]:
        assert all(map(torch.equal, later, weights[0])), "scaled once, before anybody could know"
    assert stats.unclippable == (f"0: {DISOBEYS}",)
    assert stats.clipped_heads == 0 and stats.missed_heads == 2
    assert sum(
        DISOBEYS in r.getMessage() and "cannot act" in r.getMessage() for r in caplog.records
    )
    assert caplog.text.count("QK-clip cannot act:") == 1


def test_a_layer_near_the_threshold_is_asked_before_it_has_to_obey():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(l2)), torch.randn(2, 5, 16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, _ = steps(model, x, 1, tau=1e9)
    largest = qk_clip_stats(optimizer).max_logit
    optimizer, _ = steps(model, x, 2, tau=largest * 1.5)
    with torch.no_grad():
        model[0].between = lambda x: 2 * l2(x)
    _, weights = steps(model, x, 2, optimizer=optimizer)
    assert qk_clip_stats(optimizer).max_logit > largest * 1.5
    assert all(map(torch.equal, weights[-1], before))


def test_a_linear_layer_is_clipped_as_long_as_it_has_to_be():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()), torch.randn(2, 5, 16)
    optimizer, _ = steps(model, x, 2)
    assert qk_clip_stats(optimizer).max_logit == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad():
        model[0].q_proj.weight.mul_(4)
        model[0].q_proj.bias.mul_(4)
    steps(model, x, 1, optimizer=optimizer)
    assert qk_clip_stats(optimizer).clipped_heads == 2
    steps(model, x, 1, optimizer=optimizer)
    assert qk_clip_stats(optimizer).max_logit == pytest.approx(1.0, rel=1e-5)
    assert not qk_clip_stats(optimizer).unclippable


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_known_family_obeys(kind):
    model = family(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=0.05))
    ids, mask = batch()
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()
        optimizer.step()
    stats = qk_clip_stats(optimizer)
    assert stats.heads and not stats.unclippable
    obedient = optimizer.state_dict()["qk_clip"]["obedient"]
    assert obedient and all(obedient.values())


def test_the_answers_and_the_questions_are_in_the_checkpoint():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    model = nn.Sequential(Attention(l2))
    optimizer, _ = steps(model, x, 1)
    asked = copy.deepcopy(optimizer.state_dict())
    assert asked["qk_clip"]["asked"] == ["0"]
    weights = copy.deepcopy(model.state_dict())
    _, rest = steps(model, x, 2, optimizer=optimizer)
    resumed = nn.Sequential(Attention(l2))
    resumed.load_state_dict(weights)
    second = with_qk_clip(
        torch.optim.SGD(resumed.parameters(), lr=0.0), resumed, MuonClipConfig(max_qk_score=1.0)
    )
    second.load_state_dict(asked)
    _, again = steps(resumed, x, 2, optimizer=second)
    assert all(map(torch.equal, again[-1], rest[-1]))
    assert second.state_dict()["qk_clip"]["obedient"] == {"0": False}
    without = {k: v for k, v in asked["qk_clip"].items() if k not in ("asked", "obedient")}
    second.load_state_dict(asked | {"qk_clip": without})
    assert "obedient" not in second.state_dict()["qk_clip"], "older states have none"


def test_asking_changes_neither_gradient_nor_random_numbers():
    grads = []
    for tau in (1e9, 1e-3):
        torch.manual_seed(0)
        model = make(attention_dropout=0.5)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=tau))
        clip = optimizer.state_dict()["qk_clip"]
        if tau < 1:
            names = [n for n, m in model.named_modules() if n.endswith("self_attn")]
            optimizer.load_state_dict(optimizer.state_dict() | {"qk_clip": clip | {"asked": names}})
        ids, mask = batch()
        loss_of(model, ids, mask).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        grads[-1].append(torch.get_rng_state())
    assert all(map(torch.equal, *grads))


def test_heads_that_tell_nothing_decide_nothing():
    nothing = torch.tensor([-1.0, torch.inf, torch.nan])
    assert halves(nothing, nothing) is None
    assert halves(torch.tensor([2.0, -1.0]), torch.tensor([1.0, -1.0])) is True
    assert halves(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 4.0])) is False


def test_a_layer_that_stops_obeying_is_found_at_its_next_clip():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()), torch.randn(2, 5, 16)
    optimizer, _ = steps(model, x, 3)
    assert optimizer.state_dict()["qk_clip"]["obedient"] == {"0": True}
    model[0].between = l2
    _, weights = steps(model, x, 4, optimizer=optimizer)
    assert optimizer.state_dict()["qk_clip"]["obedient"] == {"0": False}
    assert all(map(torch.equal, weights[-1], weights[0]))
