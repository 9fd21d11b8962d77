"""Requests to a server of this machine, over HTTP or a socket file; every fault is one line.

Plain `http.client`: no proxy of the environment is asked, and nothing has to be installed.
"""

import http.client
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from hmpo.errors import EngineError

SHOWN = 200
"""Characters of a server's answer in a message."""


class _FileConnection(http.client.HTTPConnection):
    """HTTP over a socket file, which no other user of the machine can reach."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Unreachable(EngineError):
    """Nobody listens, or the connection broke: whoever was there has gone."""


class TimedOut(EngineError):
    """No answer within the time."""


class Refused(EngineError):
    """An answer with a status that is no success."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Client:
    """Speaks to one server.

    Example: `Client("http://127.0.0.1:8000", timeout=60.0).post("/pause")`.
    """

    address: str
    """`http://HOST:PORT`, or the path of a socket file."""
    timeout: float
    """Seconds until the next bytes of an answer."""

    @property
    def name(self) -> str:
        """The server, in messages."""
        own = not self.address.startswith("http://")
        return "the server of this run" if own else self.address

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """The JSON at `path`.

        Raises:
            EngineError: one line.
        """
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: object = None) -> Any:
        """What the server answers to a JSON body; None where that is nothing.

        Raises:
            EngineError: one line.
        """
        return self._ask("POST", path, {} if body is None else body, None)

    def _ask(self, method: str, path: str, body: object, timeout: float | None) -> Any:
        timeout = self.timeout if timeout is None else timeout
        content = None if body is None else json.dumps(body).encode()
        connection = self._connection(timeout)
        what = path.partition("?")[0]
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            status, text = reply.status, reply.read()
        except TimeoutError:
            line = f"{self.name}: no answer to {what} within {timeout:g} s"
            raise TimedOut(line) from None
        except (OSError, http.client.HTTPException) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise Unreachable(f"{self.name}: no answer to {what} ({why[:SHOWN]})") from None
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise Refused(f"{self.name}: answered {status} to {what} ({_said(text)})", status)
        try:
            return json.loads(text) if text else None
        except ValueError:
            line = f"{self.name}: answered {what} with no JSON, expected a vLLM server there"
            raise EngineError(line) from None

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if not self.address.startswith("http://"):
            return _FileConnection(self.address, timeout)
        place = urlsplit(self.address)
        return http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout)


def _said(text: bytes) -> str:
    """The message of an answer that is a failure, as one line."""
    try:
        found = json.loads(text)
        found = found.get("error", found.get("detail", found))
        said = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        said = text.decode("utf-8", "replace")
    return " ".join(said.split())[:SHOWN] or "it said nothing"
