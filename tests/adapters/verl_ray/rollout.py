"""A rollout engine of verl that samples with transformers: `rollout.name=transformers`."""

import os
from pathlib import Path
from typing import Any

import ray
import torch
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from tests.adapters.verl_ray.record import RECORD, weights_file

NAME = "transformers"


class Server:
    """One copy of the policy, which answers one prompt at a time."""

    def __init__(self, path: str, ends: list[int], max_tokens: int, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.ends, self.max_tokens, self.steps = ends, max_tokens, None

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict, request_id: str, **_: Any
    ) -> TokenOutput:
        """Sample from the policy's own distribution until an end token."""
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
        assert all(sampling_params[name] == value for name, value in plain.items()), sampling_params
        ids, chosen, log_probs = torch.tensor([list(prompt_ids)]), [], []
        while len(chosen) < self.max_tokens and not (chosen and chosen[-1] in self.ends):
            with torch.no_grad():
                row = self.model(input_ids=ids).logits[0, -1].log_softmax(-1)
            token = torch.multinomial(row.exp(), 1)
            chosen.append(int(token))
            log_probs.append(float(row[token]))
            ids = torch.cat([ids, token[None]], 1)
        return TokenOutput(
            token_ids=chosen,
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )

    async def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Take the trained weights."""
        self.model.load_state_dict(weights)
        self.steps = steps

    async def nothing(self, *_: Any, **__: Any) -> None:
        """There is no cache and no memory to hand back."""

    sleep = wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = nothing


class ServerAdapter(base.BaseRollout):
    """Beside the trained policy: hands its weights to this rank's server."""

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self, weights: Any, wire_format: str = "named_tensors", global_steps: int = 0, **_: Any
    ) -> None:
        rank = torch.distributed.get_rank()
        whole = {name: tensor.detach().clone() for name, tensor in weights}  # every rank takes part
        if rank == 0:
            torch.save(whole, weights_file(Path(os.environ[RECORD]), global_steps))
        await ray.get_actor(_server(rank)).load.remote(whole, global_steps)


class Replica(RolloutReplica):
    """One server for each worker."""

    async def launch_servers(self) -> None:
        from transformers import AutoTokenizer

        path = self.model_config["path"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        ends = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids]
        server = (
            ray.remote(Server)
            .options(name=_server(self.replica_rank), num_cpus=1, max_concurrency=8)
            .remote(path, ends, self.config.response_length, self.replica_rank)
        )
        await server.nothing.remote()
        self.servers, self._server_handle = [server], server
        self._server_address = _server(self.replica_rank)


def _server(rank: int) -> str:
    return f"transformers_server_{rank}"


base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.ServerAdapter"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
