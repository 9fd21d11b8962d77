"""Members with a constant weight of their own, or a penalty: their loops, and what they are."""

import dataclasses
import math

import pytest
import torch

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.config.weight import WeightConfig, k3_bounds
from hmpo.errors import ConfigError
from hmpo.objective.calibration import scaled_bounds
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from hmpo.objective.terms import count_denominators
from tests.objective.cases import ADVANTAGES, BOTH, LENGTHS, loss_and_gradient, rows_of
from tests.oracles import weights as oracle

DUAL = 0.05
LOOPS = {
    "dppo_tv": lambda d, a, new: oracle.dppo(d, a, new, "tv", 0.2, 0.2, 20.0),
    "dppo_kl": lambda d, a, new: oracle.dppo(d, a, new, "kl", 0.05, 0.05, 20.0),
    "drpo": lambda d, a, new: oracle.drpo(d, a, new, 12.5),
    "dro": lambda d, a, new: oracle.dro(d, a, new, 0.1),
    "aspo": lambda d, a, new: oracle.aspo(d, a, new, 0.2, 0.2, 3.0),
    "vespo": lambda d, a, new: oracle.vespo(d, a, new, (2.0, 3.0), (3.0, 2.0)),
    "ctpo": lambda d, a, new: oracle.ctpo(d, a, new, 0.025, 0.05, DUAL),
    "atr_grpo": lambda d, a, new: oracle.atr(d, a, 0.02),
}
EVERY = pytest.mark.parametrize("name", LOOPS)


def batch(scale: float, dtype=torch.float64):
    """Log-probs under both policies (8, 10), ragged with a hole, ratios of +-`scale` nat."""
    generator = torch.Generator().manual_seed(3)
    d = scale * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    old = -3 * torch.rand(8, 10, generator=generator, dtype=torch.float64) - 0.05
    new = torch.minimum(old + d, torch.full_like(old, -0.01))
    mask = torch.arange(10) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[4, 3] = False
    return new.to(dtype), old.to(dtype), mask, torch.tensor(ADVANTAGES, dtype=dtype)


@EVERY
@BOTH
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0, 12.0])
def test_member_equals_its_loops(name, dtype, scale):
    """In small steps, across every bound, and far beyond them."""
    new, old, mask, advantages = batch(scale, dtype)
    x = new.clone().requires_grad_()
    loss = power_mean_loss(x, old, mask, advantages, members.BY_NAME[name]())
    loss.backward()
    d = rows_of((new - old).double(), mask)
    expected, slopes = LOOPS[name](d, advantages.double().tolist(), rows_of(new, mask))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    largest = max(abs(slope) for row in slopes for slope in row)
    for row, keep, slope in zip(x.grad, mask, slopes, strict=True):
        assert row[keep].tolist() == pytest.approx(slope, rel=tolerance, abs=tolerance * largest)
        assert not row[~keep].any()


@EVERY
def test_gradient_is_that_of_finite_differences_with_the_weights_held(name):
    """A shift of both policies leaves the ratios, and so the weights, where they are."""
    new, old, mask, advantages = batch(0.3)
    config = members.BY_NAME[name]()
    held = config.gate in ("detached", "unweighted")

    def loss(x):
        before = x.detach() - (new - old) if held else old
        free = dataclasses.replace(config, proximal_coef=0.0) if held else config
        return power_mean_loss(x, before, mask, advantages, free)

    assert torch.autograd.gradcheck(loss, new.clone().requires_grad_(), eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("penalty", ["k2", "pearson"])
def test_gradient_of_a_penalty_is_that_of_finite_differences(penalty):
    new, old, mask, advantages = batch(0.3)
    config = ObjectiveConfig(p=1.0, clip_level="none", proximal=penalty, proximal_coef=0.7)

    def loss(x):
        return power_mean_loss(x, old, mask, advantages, config)

    # of both, the old probability is a constant: it is that of the sampler
    assert torch.autograd.gradcheck(loss, new.clone().requires_grad_())


def test_dro_pulls_where_the_advantage_is_zero():
    new, old, mask, _ = batch(0.3)
    none = torch.zeros(8, dtype=torch.float64)
    config = dataclasses.replace(members.dro(0.5), name="pull")
    x = new.clone().requires_grad_()
    power_mean_loss(x, old, mask, none, config).backward()
    torch.testing.assert_close(x.grad, 0.5 * (new - old) * mask / mask.sum())


@EVERY
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_micro_batches_with_padding_add_up_to_the_whole(name, parts):
    new, old, mask, advantages = batch(0.3)
    config, whole = members.BY_NAME[name](), new.clone().requires_grad_()
    loss = power_mean_loss(whole, old, mask, advantages, config)
    loss.backward()
    counts, total, grads = count_denominators(mask), 0.0, []
    for rows in torch.randperm(8, generator=torch.Generator().manual_seed(1)).tensor_split(parts):
        wide = [torch.cat([x[rows], torch.full((len(rows), 3), math.nan)], 1) for x in (new, old)]
        wider = torch.cat([mask[rows], torch.zeros(len(rows), 3, dtype=torch.bool)], 1)
        x = wide[0].requires_grad_()
        part = power_mean_loss(x, wide[1], wider, advantages[rows], config, denominators=counts)
        part.backward()
        total += part.item()
        grads.append((rows, x.grad))
    assert total == pytest.approx(loss.item(), rel=1e-12, abs=1e-14)
    for rows, grad in grads:
        torch.testing.assert_close(grad[:, :10], whole.grad[rows], rtol=1e-12, atol=1e-14)
        assert not grad[:, 10:].any()


def test_a_plain_weight_is_what_a_detached_gate_always_was():
    """CISPO from the generic function, to the bit."""
    from hmpo.objective import weights

    new, old, mask, advantages = batch(2.0)
    d = (new - old) * mask
    for config in (members.cispo(), members.tis()):
        given = (d, new, mask, advantages, config)
        assert torch.equal(weights.limit_or_weigh(*given)[mask], weights.log_weights(*given)[mask])


def test_aspo_is_the_token_form_of_the_sign_aware_mean():
    """Inside the clip: the same gradient for A < 0, and for A > 0 but for a factor M^2 a response,
    which is 1 to first order where the log ratios of a response have mean 0."""
    generator = torch.Generator().manual_seed(2)
    mask, signs = torch.ones(2, 64, dtype=torch.bool), torch.tensor([1.0, -1.0]).double()
    shape = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    shape -= shape.mean(1, keepdim=True)
    aspo = dataclasses.replace(members.aspo(), reduction="sequence_mean")
    for size, shift in ((0.05, 0.02), (0.01, 0.0)):
        d = size * shape + shift
        _, mean = loss_and_gradient(members.sign_aware(), d, mask, signs)
        _, token = loss_and_gradient(aspo, d, mask, signs)
        square = d[0].neg().exp().mean() ** -2
        torch.testing.assert_close(mean[0], square * token[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(mean[1], token[1], rtol=1e-12, atol=0)
    assert abs(square.item() - 1) < size**2


@pytest.mark.parametrize("delta", [1e-8, 1e-3, 0.02, 1.0, 50.0, 1e6])
def test_k3_bounds_are_the_roots(delta):
    low, high = k3_bounds(delta, 2 * delta)
    assert low < 0 < high
    assert math.expm1(low) - low == pytest.approx(delta, rel=1e-7)
    assert math.expm1(high) - high == pytest.approx(2 * delta, rel=1e-7)


@pytest.mark.parametrize("name", ["atr_grpo", "dppo_tv", "ctpo"])
def test_a_controller_scales_every_kind_of_bound(name):
    config = members.BY_NAME[name]()
    same, wide = scaled_bounds(config, 1.0), scaled_bounds(config, 2.0)
    for found, factor in ((same, 1.0), (wide, 2.0)):
        if name == "dppo_tv":
            assert (found.clip_low, found.clip_high) == (factor * 0.2, factor * 0.2)
        else:
            expected = tuple(factor * bound for bound in config.log_bounds)
            assert found.log_bounds == pytest.approx(expected, rel=1e-9)


def test_clip_metrics_count_what_drops_out():
    """Of five tokens with A > 0 two gained more than 0.2; with A < 0 one lost more than 0.2."""
    pi = torch.tensor([[0.9, 0.8, 0.5, 0.2, 0.1], [0.9, 0.8, 0.5, 0.2, 0.1]], dtype=torch.float64)
    mu = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.1], [0.5, 0.5, 0.5, 0.5, 0.1]], dtype=torch.float64)
    mask, signs = torch.ones(2, 5, dtype=torch.bool), torch.tensor([1.0, -1.0]).double()
    found = objective_metrics(pi.log(), mu.log(), mask, signs, members.dppo_tv())
    shares = {k: v.item() for k, v in found.items() if k.startswith("clip/frac")}
    expected = dict(zip(("", "_pos", "_neg", "_band"), (0.3, 0.4, 0.2, 0.6), strict=True))
    assert shares == pytest.approx({f"clip/frac{k}": v for k, v in expected.items()})
    assert found["pg_loss"].item() == pytest.approx(
        power_mean_loss(pi.log(), mu.log(), mask, signs, members.dppo_tv()).item()
    )


@EVERY
def test_pg_loss_is_the_loss(name):
    new, old, mask, advantages = batch(0.3)
    config = members.BY_NAME[name]()
    found = objective_metrics(new, old, mask, advantages, config)["pg_loss"].item()
    loss = power_mean_loss(new, old, mask, advantages, config).item()
    assert found == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_space": "tv"}, "clip_space: got 'tv', expected another unit"),
        ({"gate": "detached", "clip_space": "kl"}, "clip_space: got 'kl'"),
        ({"clip_width": "sqrt"}, "clip_width: got 'sqrt', expected another width"),
        (
            {"gate": "detached", "weight": WeightConfig(level="prefix"), "clip_width": "sqrt",
             "clip_space": "ratio"},
            "clip_width: got 'sqrt'",
        ),
        (
            {"gate": "detached", "clip_level": "none", "weight": WeightConfig(bound="mask")},
            "weight.bound: got 'mask', expected \"cap\" without a clip",
        ),
        (
            {"gate": "detached", "weight": WeightConfig(kind="gamma")},
            "clip_level: got 'token', expected \"none\" with weight.kind",
        ),
        (
            {"gate": "detached", "weight": WeightConfig(kind="inverse")},
            "weight.bound: got 'cap', expected \"mask\"",
        ),
        (
            {"gate": "detached", "weight": WeightConfig(cap=3.0), "clip_share": 0.1},
            "clip_share: got 0.1, expected None with a weight",
        ),
        (
            {"gate": "detached", "weight": WeightConfig(bound="mask"), "dual_clip": 0.9},
            "dual_clip: got 0.9, expected a ratio above 1",
        ),
        ({"proximal_coef": -1.0}, "proximal_coef: got -1.0, expected >= 0"),
    ],
)  # fmt: skip
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"cap": 0.0}, "cap: got 0.0"), ({"decay_negative": -1.0}, "decay_negative: got -1.0")],
)
def test_settings_of_a_weight_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        WeightConfig(**options)
