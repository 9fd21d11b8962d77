"""Several processes that train one policy: the whole batch on each, its work dealt out."""

from hmpo.ranks.share import dealt
from hmpo.ranks.world import Ranks

__all__ = ["Ranks", "dealt"]
