"""Population-based training over the exponent and the learning rate.

After each generation members are ranked by a lower bound of their evaluation; the worst share
takes weights and settings of a random one of the best share, then the learning rate times or
over `perturb`, and p plus a normal draw. (Jaderberg et al. 2017, arXiv 1711.09846.)

Every draw comes from a generator seeded by (seed, generation, member), so that no result depends
on the order in which members were run.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist, pstdev
from typing import Any

from hmpo.config.population import PopulationConfig
from hmpo.errors import CheckpointError, ConfigError

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AgentPreference:
    """What a member trains with, and where it comes from.

    Example: `AgentPreference(member=2, p=-0.4, lr=2e-5, lineage=2, age=3)`.
    """

    member: int
    p: float
    lr: float
    lineage: int
    """The member of the first generation that its weights descend from."""
    age: int = 0
    """Generations trained since it was last replaced."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One member's work for one generation; picklable.

    Train from the weights (and optimizer) that `parent` had after `generation - 1`, and keep the
    result as those of `member` after `generation`. In generation 0 all start alike.

    Example: `Assignment(member=5, generation=3, parent=1, p=0.2, lr=1e-5, updates=50, seed=77)`.
    """

    member: int
    generation: int
    parent: int
    """Whose weights to start from; the member itself unless it was replaced."""
    p: float
    lr: float
    updates: int
    seed: int
    """For whatever the member draws in this generation."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A member's evaluation.

    Example: `Score(mean=0.62, n=128, sd=0.486)`.
    """

    mean: float
    n: int
    """Evaluations behind the mean."""
    sd: float
    """Standard deviation of one evaluation."""

    def lower(self, confidence: float) -> float:
        """One-sided lower bound of the mean; minus infinity if nothing usable was measured."""
        if self.n < 1 or not (math.isfinite(self.mean) and math.isfinite(self.sd)):
            return -math.inf
        return self.mean - NormalDist().inv_cdf(confidence) * self.sd / math.sqrt(self.n)


Run = Callable[[Assignment], Score]
"""Trains a member as assigned and evaluates it."""
Mapper = Callable[[Run, list[Assignment]], Iterable[Score]]
"""`map`, or that of an executor; scores come in the order of the assignments."""


class AGMPopulationCoordinator:
    """Ranks a generation and decides who is replaced by whom.

    Args:
        config: settings.
    """

    def __init__(self, config: PopulationConfig) -> None:
        self.config = config

    def first(self) -> list[AgentPreference]:
        """Spaces p evenly over its bounds (the middle for one) and draws learning rates."""
        config, n = self.config, self.config.members
        low, high = math.log(config.lr_low), math.log(config.lr_high)
        members = []
        for i in range(n):
            share = i / (n - 1) if n > 1 else 0.5
            lr = math.exp(low + (high - low) * self._random("first", 0, i).random())
            members.append(
                AgentPreference(
                    member=i,
                    p=config.p_low + share * (config.p_high - config.p_low),
                    lr=min(config.lr_high, max(config.lr_low, lr)),
                    lineage=i,
                )
            )
        return members

    def ranking(self, scores: Mapping[int, Score]) -> list[int]:
        """Members from the best to the worst; ties by number."""
        bounds = {member: score.lower(self.config.confidence) for member, score in scores.items()}
        return sorted(scores, key=lambda member: (-bounds[member], member))

    def evolve(
        self, members: list[AgentPreference], scores: Mapping[int, Score], generation: int
    ) -> tuple[list[AgentPreference], list[int]]:
        """The next generation, and each member's parent."""
        config, order = self.config, self.ranking(scores)
        share = int(config.fraction * len(members))
        top, bottom = order[:share], order[len(order) - share :]
        after = [replace(member, age=member.age + 1) for member in members]
        parents = list(range(len(members)))
        for loser in bottom:
            if after[loser].age < config.min_age:
                continue
            rng = self._random("evolve", generation, loser)
            winner = rng.choice(top)
            lr = members[winner].lr * config.perturb ** rng.choice((-1, 1))
            p = members[winner].p + rng.gauss(0.0, config.p_sigma)
            parents[loser] = winner
            after[loser] = AgentPreference(
                member=loser,
                p=min(config.p_high, max(config.p_low, p)),
                lr=min(config.lr_high, max(config.lr_low, lr)),
                lineage=members[winner].lineage,
            )
        return after, parents

    def diversity(self, members: list[AgentPreference], bins: int = 8) -> dict[str, float]:
        """Entropy of p over bins (1 for even use), its deviation, and lineages alive."""
        config = self.config
        counts = [0] * bins
        for member in members:
            share = (member.p - config.p_low) / (config.p_high - config.p_low)
            counts[min(bins - 1, int(share * bins))] += 1
        shares = [count / len(members) for count in counts if count]
        most = math.log(min(bins, len(members)))
        return {
            "p_entropy": -math.fsum(s * math.log(s) for s in shares) / most if most else 0.0,
            "p_sd": pstdev(member.p for member in members),
            "lineages": float(len({member.lineage for member in members})),
        }

    def _random(self, purpose: str, generation: int, member: int) -> random.Random:
        return random.Random(f"{self.config.seed}/{purpose}/{generation}/{member}")


class PopulationAGMTrainer:
    """Trains a population; the work itself is done by a callable, here or in processes.

    Args:
        config: settings.

    Example:
        population = PopulationAGMTrainer(PopulationConfig(members=4))
        population.train(run_member, generations=10)
        population.best
    """

    def __init__(self, config: PopulationConfig | None = None) -> None:
        self.config = config or PopulationConfig()
        self.coordinator = AGMPopulationCoordinator(self.config)
        self.generation = 0
        self.members = self.coordinator.first()
        self.parents = list(range(len(self.members)))
        self.scores: dict[int, Score] = {}
        """Of the present generation, as far as they are in."""
        self.ranked: list[int] = []
        """The last full generation from the best to the worst."""

    def pending(self) -> list[Assignment]:
        """Work of the present generation that is not done yet."""
        assignments = []
        for member in self.members:
            if member.member in self.scores:
                continue
            seed = random.Random(f"{self.config.seed}/{self.generation}/{member.member}")
            assignments.append(
                Assignment(
                    member=member.member,
                    generation=self.generation,
                    parent=self.parents[member.member],
                    p=member.p,
                    lr=member.lr,
                    updates=self.config.updates,
                    seed=seed.getrandbits(32),
                )
            )
        return assignments

    def report(self, assignment: Assignment, score: Score) -> bool:
        """Take in a score; the last one of a generation starts the next. Whether it did.

        Raises:
            ConfigError: the assignment is not pending.
        """
        known = 0 <= assignment.member < len(self.members)
        late = assignment.generation != self.generation or assignment.member in self.scores
        if late or not known:
            raise ConfigError(
                f"report: got member {assignment.member} of generation {assignment.generation}, "
                f"expected pending work of generation {self.generation}"
            )
        self.scores[assignment.member] = score
        if len(self.scores) < len(self.members):
            return False
        self.ranked = self.coordinator.ranking(self.scores)
        self.members, self.parents = self.coordinator.evolve(
            self.members, self.scores, self.generation
        )
        self.scores = {}
        self.generation += 1
        return True

    def train(
        self,
        run: Run,
        generations: int,
        mapper: Mapper = map,
        save: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Go on until so many generations are done.

        Args:
            run: trains and evaluates one member; must be picklable for processes.
            generations: in all, those already done included.
            mapper: `map` runs here, `concurrent.futures.Executor.map` in processes.
            save: called with `state_dict()` after every score, so that no finished work is lost.
        """
        while self.generation < generations:
            pending = self.pending()
            for assignment, score in zip(pending, mapper(run, pending), strict=True):
                self.report(assignment, score)
                if save is not None:
                    save(self.state_dict())

    @property
    def best(self) -> AgentPreference:
        """The member that ranked first in the last full generation; its settings of now.

        The best share is never replaced, so these are the settings it was ranked with.
        """
        return self.members[self.ranked[0] if self.ranked else 0]

    def state_dict(self) -> dict[str, Any]:
        """All that the next draw depends on, as JSON values."""
        return {
            "class": type(self).__name__,
            "version": VERSION,
            "config": asdict(self.config),
            "generation": self.generation,
            "members": [asdict(member) for member in self.members],
            "parents": list(self.parents),
            "scores": {str(member): asdict(score) for member, score in self.scores.items()},
            "ranked": list(self.ranked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, also within a generation.

        Raises:
            CheckpointError: another class or version, or other settings.
        """
        own = (type(self).__name__, VERSION, asdict(self.config))
        saved = (state.get("class"), state.get("version"), state.get("config"))
        if own != saved:
            raise CheckpointError(
                f"population state: got {saved[0]} version {saved[1]} with {saved[2]}, "
                f"expected {own[0]} version {own[1]} with {own[2]}"
            )
        self.generation = state["generation"]
        self.members = [AgentPreference(**member) for member in state["members"]]
        self.parents = list(state["parents"])
        self.scores = {int(m): Score(**score) for m, score in state["scores"].items()}
        self.ranked = list(state["ranked"])
