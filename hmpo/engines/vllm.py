"""Rollouts from a vLLM server: weights by a file in shared memory, prompts and tokens as ids.

A sync pauses the server, which also forgets the prefixes that it kept, names the file to
`reload_weights`, tells the new weights' label and resumes. All of it is repeated for each rollout,
so a server that was left paused, or was restarted, is put right by the next one. Labels hold a
random part, so that another trainer on the same server is noticed.
"""

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.engines.client import Refused, TimedOut, Unreachable
from hmpo.engines.protocol import VersionedRollout
from hmpo.engines.replies import Response, as_rollout, responses_of
from hmpo.engines.server import Server
from hmpo.engines.weights import refuse_unservable, remove_folder, write_weights
from hmpo.errors import EngineError
from hmpo.sampling.options import SamplingOptions

AT_ONCE = 64
"""Prompts that are asked at once; the server batches them."""
UNNAMED = "default"
"""Label of weights that a server read when it started."""
SEEDS = 2**40


class VLLMEngine:
    """A `RolloutEngine` of one vLLM server.

    Args:
        policy: a transformers model, whose weights it will be given.
        server: that serves the same architecture.
        folder: that both see, for the weights; deleted at last.

    Raises:
        ModelError: a policy that cannot be served.
    """

    def __init__(self, policy: nn.Module, server: Server, folder: Path) -> None:
        refuse_unservable(policy)
        self.policy, self.server, self.client = policy, server, server.client
        self.folder = folder
        self.run = secrets.token_hex(4)
        self.labels: dict[str, int] = {}
        """Numbers of the weights that were sent, the present ones last."""
        self.ready = False

    def start(self) -> None:
        """Begin to get ready, without waiting."""
        self.server.start()

    def close(self) -> None:
        """Let go of the server and of the weights that were shared with it."""
        self.server.close()
        remove_folder(self.folder)

    def sync(self, policy: nn.Module, version: int) -> None:
        """Take the policy's present weights, and call them `version`.

        Raises:
            EngineError: one line; the server is left paused, so that nothing wrong is drawn.
        """
        if not self.ready:
            self.server.start()
            self.server.wait()
            self.ready = True
        self.policy = policy  # which is sent again where the server was restarted
        label = f"{self.run}.{version}"
        write_weights(policy, self.folder / "weights")
        reload = {"weights_path": str(self.folder / "weights")}
        try:
            self.client.post("/pause?mode=wait&clear_cache=true")
            self.client.post("/collective_rpc", {"method": "reload_weights", "kwargs": reload})
            self.client.post("/update_weight_version", {"new_version": label})
            self.client.post("/resume")
        except EngineError as error:
            raise self._told(error, "could not take the weights") from None
        finally:
            remove_folder(self.folder / "weights")
        self.labels = {label: version}

    def sample(
        self,
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        options: SamplingOptions,
        *,
        group_size: int,
        generator: torch.Generator,
        tokenizer: Any = None,
    ) -> VersionedRollout:
        """Draw `group_size` responses to each prompt; see `RolloutEngine`."""
        assert self.labels, "sync comes first"
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu())]
        self._refuse_long(max(map(len, prompts)), options)
        first = int(torch.randint(SEEDS, (), generator=generator))
        seeds = [first + index * group_size for index in range(len(prompts))]
        groups = self._drawn(prompts, seeds, options, group_size)
        if any(label == UNNAMED for one in groups for row in one for label in row.labels):
            self.sync(self.policy, next(iter(self.labels.values())))  # it was restarted meanwhile
            groups = self._drawn(prompts, seeds, options, group_size)
        responses = [response for group in groups for response in group]
        self._refuse_other_labels(responses)
        wide = next(self.policy.parameters()).dtype == torch.float64
        return as_rollout(
            responses,
            prompt_ids,
            prompt_mask,
            options,
            group_size=group_size,
            tokenizer=tokenizer,
            versions=self.labels,
            dtype=torch.float64 if wide else torch.float32,
        )

    def _drawn(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        options: SamplingOptions,
        group_size: int,
    ) -> list[list[Response]]:
        """The responses to each prompt; sample j of a prompt takes its seed + j."""
        label = next(iter(self.labels))
        settings: dict[str, Any] = {
            "n": group_size,
            "max_tokens": options.max_length,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "logprobs": 0,
            "stop_token_ids": list(options.eos_tokens),
            "ignore_eos": True,
            "detokenize": False,
        }

        def ask(prompt: list[int], seed: int) -> list[Response]:
            body = {
                "token_ids": prompt,
                "sampling_params": settings | {"seed": seed},
                "cache_salt": label,
            }
            answer = self.client.post("/inference/v1/generate", body)
            return responses_of(answer, group_size, options, server=self.client.name)

        pool = ThreadPoolExecutor(min(AT_ONCE, len(prompts)))
        try:
            return list(pool.map(ask, prompts, seeds))
        except (Unreachable, TimedOut, Refused) as error:
            raise self._told(error, "drew no responses") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _refuse_long(self, prompt: int, options: SamplingOptions) -> None:
        """Stop before the server shortens what it draws without a word."""
        limit, most = self.server.longest, options.max_length
        if limit is not None and prompt + most > limit:
            raise EngineError(
                f"rollout.engine: got a prompt of {prompt} tokens and trainer.max_length = {most}, "
                f"expected at most {limit} together, where {self.client.name} ends; start it with "
                f"--max-model-len {prompt + most} or more (rollout.arguments)"
            )

    def _refuse_other_labels(self, responses: Sequence[Response]) -> None:
        """Stop where any token was drawn by weights that were not ours."""
        for label in (label for response in responses for label in response.labels):
            if label not in self.labels:
                raise EngineError(
                    f"rollout.engine: got tokens drawn by weights {label!r} from "
                    f"{self.client.name}, expected {next(iter(self.labels))!r}; a server serves "
                    "one trainer at a time: give each run its own, then resume the run"
                )

    def _told(self, error: EngineError, what: str) -> EngineError:
        """The fault with what is known of the server, and what to do."""
        why = str(error).removeprefix(f"{self.client.name}: ")
        if isinstance(error, TimedOut) and self._paused():
            why += ", as somebody has paused it"
        elif isinstance(error, TimedOut):
            why += ", the limit of rollout.timeout"
        remedy = self.server.remedy()
        return EngineError(f"rollout.engine: {self.client.name} {what}: {why}; {remedy}")

    def _paused(self) -> bool:
        """Whether the server says that it waits to be resumed."""
        try:
            return bool(self.client.get("/is_paused", timeout=5.0)["is_paused"])
        except (EngineError, KeyError, TypeError):
            return False
