"""What a policy talks with: environments that answer its turns, and tools that it calls."""

from hmpo.environments.pool import Environments, load_environment
from hmpo.environments.protocol import Environment

__all__ = ["Environment", "Environments", "load_environment"]
