"""Servers: one that runs already, and what is asked of any before it is used."""

import re
from typing import Protocol, runtime_checkable

from hmpo.engines.client import Client, Refused
from hmpo.errors import EngineError

OLDEST = (0, 32)
"""vLLM's first version that has been tried here."""
ROUTES = {
    "/inference/v1/generate": "--enable-scale-out",
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1 in its environment",
    "/pause": "VLLM_SERVER_DEV_MODE=1 in its environment",
}
"""What a rollout and its weights need, and what a server has them by."""
FIRST_ANSWER_S = 30.0


@runtime_checkable
class Server(Protocol):
    """Where requests go, and whose process it is."""

    client: Client
    longest: int | None
    """Most tokens of a prompt and its response, where that is known."""

    def start(self) -> None:
        """Begin to get ready, without waiting; further calls do nothing."""

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            EngineError: one line: it does not, or it is no vLLM that can be used.
        """

    def remedy(self) -> str:
        """What to do where it failed, and what is known of why."""
        ...

    def close(self) -> None:
        """End it, where it is ours; further calls do nothing."""


class RunningServer:
    """A server that somebody else has started and will end.

    Args:
        address: `http://HOST:PORT`.
        timeout: seconds until an answer.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self.client = Client(address.rstrip("/"), timeout)
        self.longest: int | None = None

    def start(self) -> None:
        """Nothing: it runs."""

    def wait(self) -> None:
        """Look whether it can be used.

        Raises:
            EngineError: one line.
        """
        self.longest = usable_length(self.client)

    def remedy(self) -> str:
        """What to do where it failed."""
        return "start it anew (docs/engines.md), then resume the run"

    def close(self) -> None:
        """Nothing: it is not ours."""


def usable_length(client: Client) -> int | None:
    """The most tokens that a server reads and writes; None where it does not say.

    Args:
        client: of the server.

    Raises:
        EngineError: one line: nobody answers, it is no vLLM, too old, or lacks what is needed.
    """
    got = f"rollout.engine: got {client.address!r}"
    quick = min(FIRST_ANSWER_S, client.timeout)
    try:
        answer = client.get("/version", timeout=quick)
        version = str(answer["version"])
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    except (KeyError, TypeError, Refused):
        raise EngineError(f"{got}, which is no vLLM server; expected one") from None
    except EngineError as error:
        why = str(error).removeprefix(f"{client.name}: ")
        raise EngineError(f"{got}, where no server is ready: {why}; start one first") from None
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"{got} with vLLM {version}, expected {oldest} or newer")
    for route, option in ROUTES.items():
        try:
            client.get(route, timeout=quick)
        except Refused as error:
            if error.status == 404:
                line = f"{got}, which has no {route}; start it with {option}"
                raise EngineError(line) from None
    return _longest(client)


def _longest(client: Client) -> int | None:
    """`max_model_len` as the server tells it."""
    try:
        (model,) = client.get("/v1/models", timeout=FIRST_ANSWER_S)["data"]
        return int(model["max_model_len"])
    except (EngineError, KeyError, TypeError, ValueError):
        return None
