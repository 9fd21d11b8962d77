"""What is refused beside `distributed.shard`: what is not exact on parts of weights."""

import pytest

from hmpo.config.identity import config_hash
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError

SHARD = {"shard": True}
REFUSED = {
    "offload without shard": ({"distributed": {"offload": True}}, "distributed.offload: got True"),
    "bfloat16 weights": ({"policy": {"dtype": "bfloat16"}}, "policy.dtype: got 'bfloat16'"),
    "weights as they are stored": ({"policy": {"dtype": "auto"}}, "policy.dtype: got 'auto'"),
    "8-bit moments": ({"optimizer": {"name": "adamw8bit"}}, "optimizer.name: got 'adamw8bit'"),
    "Muon away from its GPU": (
        {"distributed": {"shard": True, "offload": True}, "optimizer": {"name": "muon"}},
        "optimizer.name: got 'muon'",
    ),
    "QK-clip of LoRA": ({"policy": {"lora_rank": 2}}, "trainer.qk_clip: got True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_names_the_setting(name: str) -> None:
    settings, text = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        run_config({"distributed": SHARD} | settings)
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)


def test_sharing_out_decides_no_number() -> None:
    plain, shared = run_config({}), run_config({"distributed": SHARD})
    lora = {"policy": {"lora_rank": 2}, "trainer": {"qk_clip": False}}
    assert run_config({"distributed": SHARD} | lora).distributed.shard
    assert config_hash(plain) == config_hash(shared)
