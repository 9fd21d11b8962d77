import json
import time

import pytest

from hmpo.config import RunConfig, to_dict
from hmpo.telemetry.records import config_hash, encode, event_record
from hmpo.telemetry.secrets import mask_secrets, mask_text

HEX40 = "0123456789abcdef" * 2 + "01234567"
CANARIES = {
    "hf": "hf_" + "AbCdEfGh" * 4,
    "openai": "sk-proj-" + "a1B2" * 6,
    "github": "ghp_" + "Zz9" * 12,
    "aws": "AKIA" + "ABCDEFGH12345678",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "wandb": HEX40,
    "password": "correct-horse",
    "cookie": "session-4711",
}
PLANTED = {
    "task": {"options": {"hub": CANARIES["hf"], "note": f"use {CANARIES['openai']} here"}},
    "command": ["hmpo", f"--id=wandb:{CANARIES['wandb']}", "--password", "correct-horse"],
    "Set-Cookie": CANARIES["cookie"],
    "lines": (f"clone https://x:{CANARIES['github']}@host/r", f"aws {CANARIES['aws']}"),
    "db_password": [CANARIES["password"]],
    "header": f"Authorization: Bearer {CANARIES['jwt']}",
}


def test_none_of_eight_planted_secrets_reaches_an_event():
    text = encode(event_record("r", 1, "note", PLANTED))
    assert json.loads(text)["data"]["task"]["options"]["hub"] == "***"
    for name, secret in CANARIES.items():
        assert secret not in text, name


def test_the_whole_default_config_is_left_alone():
    config = to_dict(RunConfig())
    assert mask_secrets(config) == config


@pytest.mark.parametrize(
    "key",
    [
        "eos_token",
        "pad_token",
        "max_new_tokens",
        "num_tokens",
        "n_tokens",
        "tokenizer",
        "tokenizers",
        "bos_token_id",
        "tokens_per_s",
        "trainer.eos_token",
        "author",
        "keywords",
        "tokens",
    ],
)
def test_own_names_that_look_like_secrets_are_kept(key):
    assert mask_secrets({key: "value"}) == {key: "value"}


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "HF_TOKEN",
        "token",
        "access_token",
        "client_secret",
        "password",
        "passwd",
        "auth",
        "Authorization",
        "cookie",
        "hub_token",
        "WANDB_API_KEY",
        "access_tokens",
        "keyfile",
    ],
)
def test_values_under_secret_keys_are_masked_and_numbers_never(key):
    assert mask_secrets({key: "abc"}) == {key: "***"}
    assert mask_secrets({key: {"a": ["abc", 7]}}) == {key: {"a": ["***", 7]}}
    assert mask_secrets({key: 12}) == {key: 12}


def test_commands_lose_the_secret_and_keep_the_rest():
    masked = mask_text("HF_TOKEN=abc hmpo train c.toml --eos-token=2 --api-key='x y' --lr 1e-4")
    assert masked == "HF_TOKEN=*** hmpo train c.toml --eos-token=2 --api-key=*** --lr 1e-4"
    assert mask_secrets(["--api-key", "abc", "--lr", "1"]) == ["--api-key", "***", "--lr", "1"]


def test_a_commit_hash_is_no_secret():
    assert mask_text(f"commit {HEX40}") == f"commit {HEX40}"


def test_config_hash_does_not_depend_on_a_secret():
    assert config_hash({"a": 1, "api_key": "x"}) == config_hash({"a": 1, "api_key": "y"})


@pytest.mark.parametrize(
    "text",
    [
        "/data/sk-learn-experiments-2024/run",
        "/data/sk-learn-experiments2024abcdefgh/x",
        "models/hf_checkpoints/step",
        "/data/key=3/prompts.jsonl",
        "runs/a/token=b/x",
        "C:\\data\\auth=9x\\p.jsonl",
        "sk-image-segmentation-benchmarks",
        "a.b.c eyJust.some.words",
    ],
)
def test_folders_that_look_like_a_secret_are_left_alone(text):
    assert mask_text(text) == text


@pytest.mark.parametrize(
    "key", ["key_path", "token_file", "auth_dir", "key_field", "secret_folder"]
)
def test_names_of_paths_and_fields_are_no_secrets(key):
    assert mask_secrets({key: "a/b"}) == {key: "a/b"}


KEYS = [
    "sk-" + "aB3dE6gH9jK2mN5pQ8rS1tU4",
    "sk-" + "0123456789abcdef" * 2,
    "sk-ant-api03-" + "Ab1_" * 3 + "CdEfGh12IjKlMn34",
    "hf_" + "abcdefghijklmnopqrstuvwxyz",
    "hf_" + "AbCdEfGhIjKl",
    CANARIES["jwt"],
    "www.a.eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
]


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_masked_wherever_they_stand(key):
    secret = key.rpartition("www.a.")[2]
    for text in (key, f"use {key}, please", f"x={key}", f"https://a/{key}"):
        assert secret not in mask_text(text) and "***" in mask_text(text)


SHAPES = {
    "word": "a" * 400_000,
    "dots": "a." * 200_000,
    "dashes": "-a" * 200_000,
    "headers": "-eyJaaaaa" * 40_000,
    "dotted headers": "eyJaaaaaa." * 40_000,
    "spaces": "key" + " " * 400_000,
    "equals": "key= " * 80_000,
    "quotes": "key='" * 80_000,
    "schemes": "a://" * 100_000,
    "users": "a://b:" * 60_000,
    "bearers": "bearer " * 60_000,
    "bearer": "bearer" + " " * 400_000,
    "keys": "sk-" * 130_000,
    "hashes": "0123456789abcdef" * 25_000,
    "wandb": "wandb " * 60_000,
    "base64": "AbC9/+xyz" * 40_000,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_masking_costs_time_in_proportion_to_the_text(shape):
    """Quadratic time, as most of these shapes once took, would be hours."""
    began = time.process_time()
    mask_text(SHAPES[shape])
    assert time.process_time() - began < 10
