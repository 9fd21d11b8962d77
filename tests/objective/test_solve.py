import math

import pytest
import torch

from hmpo.errors import ConfigError
from hmpo.objective.means import (
    effective_sample_size,
    log_power_mean,
)
from hmpo.objective.solve import solve_exponent
from tests.objective.cases import ragged
from tests.oracles import means as oracle


def test_effective_sample_size_and_its_inverse():
    rows = [[0.3, -0.2, 0.5, 0.1], [-1.0, 2.0, 0.0], [0.1, 0.2, 0.4, -0.4, 0.0]]
    d, mask = ragged(rows)
    for p in (-2.0, -0.3, 0.0, 1.0):
        expected = [oracle.ess(r, p) for r in rows]
        assert effective_sample_size(d, mask, p).tolist() == pytest.approx(expected, rel=1e-13)
        k1, k2 = p * log_power_mean(d, mask, p), 2 * p * log_power_mean(d, mask, 2 * p)
        torch.testing.assert_close(
            effective_sample_size(d, mask, p), torch.exp(2 * k1 - k2), rtol=1e-13, atol=0
        )
    for target in (0.999999, 0.99, 0.9, 0.7):
        for sign in (1, -1):
            p = solve_exponent(d, mask, target, p_max=20.0, sign=sign)
            expected = [oracle.solve_exponent(r, target, 20.0, sign) for r in rows]
            assert p.tolist() == pytest.approx(expected, rel=1e-8)
            assert not p.requires_grad


def test_a_relative_target_lies_between_the_size_at_the_largest_exponent_and_one():
    generator = torch.Generator().manual_seed(8)
    rows = [
        (s * torch.randn(n, generator=generator)).double().tolist()
        for s, n in ((0.02, 64), (0.3, 7), (2.0, 300), (0.5, 2))
    ]
    d, mask = ragged(rows)
    for sign in (1, -1):
        for share in (0.0, 0.01, 0.4, 0.99, 1.0):
            p = solve_exponent(d, mask, share, p_max=2.0, sign=sign, relative=True)
            if share in (0.0, 1.0):
                assert p.tolist() == [sign * 2.0 * (1 - share)] * 4
            for row, found in zip(rows, p.tolist(), strict=True):
                least = oracle.ess(row, sign * 2.0)
                reached = oracle.ess(row, found)
                assert reached == pytest.approx(least + share * (1 - least), rel=1e-11)
    assert solve_exponent(d, mask, 0.4, p_max=2.0, relative=True).tolist() == pytest.approx(
        solve_exponent(d.float(), mask, 0.4, p_max=2.0, relative=True).tolist(), rel=2e-6
    )


def test_solve_exponent_corner_cases():
    d, mask = ragged([[0.3, -0.2, 0.5], [0.2, 0.2], [0.7], []])
    assert solve_exponent(d, mask, 1.0, p_max=3.0).tolist() == [0.0, 3.0, 3.0, 3.0]
    thirds = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert solve_exponent(thirds, thirds > 0, 1.0, p_max=3.0).tolist() == [3.0]
    unreachable = solve_exponent(d, mask, 0.01, p_max=3.0, sign=-1)
    assert unreachable.tolist() == [-3.0, -3.0, -3.0, -3.0]
    shifted = solve_exponent(d + 5.0, mask, 0.95, p_max=30.0)
    torch.testing.assert_close(shifted, solve_exponent(d, mask, 0.95, p_max=30.0))
    per_row = torch.tensor([0.9, 0.5, 0.5, 0.5], dtype=torch.float64)
    assert (
        solve_exponent(d, mask, per_row, p_max=9.0)[0] == solve_exponent(d, mask, 0.9, p_max=9.0)[0]
    )
    for bad in ({"target": 0.0}, {"target": 1.5}, {"p_max": 0.0}, {"p_max": math.inf}, {"sign": 0}):
        with pytest.raises(ConfigError):
            solve_exponent(d, mask, **({"target": 0.5, "p_max": 1.0} | bad))
