"""Bad input to services and samplers: told by field, value and way out, with nothing changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.bad_input import (
    CONTEXT,
    INF,
    NAN,
    PROMPT,
    TEN_MB,
    VOCAB,
    World,
    bad_input_world,
    check,
    fit,
    refused,
)
from support.stubs import TOY

from firetitan_client import FiretitanServiceClient
from firetitan_client.errors import FiretitanError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    with bad_input_world(tmp_path_factory.mktemp("bad-input") / "home", tiny_llama) as world:
        yield world


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    with world.unharmed():
        yield


async def test_what_the_native_sampler_can_see(world: World) -> None:
    native = world.service.create_deployment_sampler()
    await native
    for text, options in (
        ("prompt_token_ids: holds text", {"prompt_token_ids": "abc"}),
        ("http_timeout: is -1", {"http_timeout": -1}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("temperature: is 'hot'", {"temperature": "hot"}),
        ("stop[0]", {"stop": [1.5]}),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            await native.sample_with_prompt_tokens(**{"prompt_token_ids": [1, 2], **options})


@pytest.mark.parametrize(
    ("reference", "reason", "text"),
    [
        ("nothing", "SNAPSHOT_NOT_FOUND", "'nothing' was not found"),
        ("{policy}/checkpoints/kept", "NAME_INVALID", "snapshots/{snapshot}"),
        ("{foreign}", "INVALID_ARGUMENT", "'firetitan/toy'"),
        ("../../etc/passwd", "NAME_INVALID", "../../etc/passwd"),
        ("gs://bucket/x", "NAME_INVALID", "tinker://"),
        ("", "INVALID_ARGUMENT", "model_path"),
        (TEN_MB, "NAME_INVALID", "1 to 128 characters"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_snapshots_that_cannot_be_served(
    world: World, reference: str, reason: str, text: str
) -> None:
    path = reference.replace("{policy}", world.policy.session_name)
    path = path.replace("{foreign}", world.foreign)
    for call in (
        world.service.hotload_sampler_snapshot,
        world.service.create_sampling_client,
        world.service.create_deployment_sampler,
    ):
        with pytest.raises(FiretitanError) as caught:
            call(path)
        error = caught.value
        assert error.reason == reason and text in str(error) and len(str(error)) < 4000
        assert isinstance(error, RuntimeError if path else ValueError)


@pytest.mark.parametrize(
    ("arguments", "params", "field", "texts"),
    [
        ({"num_samples": 0}, {}, "num_samples", ["0"]),
        ({"num_samples": -1}, {}, "num_samples", ["-1"]),
        ({"num_samples": True}, {}, "num_samples", ["True"]),
        ({"num_samples": 1_000_000}, {}, "num_samples", ["1000000", "at most"]),
        ({"num_samples": 2**31}, {}, "num_samples", ["2147483648", "at most"]),
        ({}, {"temperature": -1.0}, "temperature", ["-1.0"]),
        ({}, {"temperature": NAN}, "temperature", ["nan"]),
        ({}, {"temperature": INF}, "temperature", ["inf"]),
        ({}, {"temperature": "hot"}, "temperature", ["'hot'", "number"]),
        ({}, {"top_p": 0.0}, "top_p", ["0.0", "at most 1"]),
        ({}, {"top_p": 1.1}, "top_p", ["1.1", "at most 1"]),
        ({}, {"top_p": NAN}, "top_p", ["nan"]),
        ({}, {"top_k": 2**31}, "top_k", ["2147483648"]),
        ({}, {"top_k": 1.5}, "top_k", ["1.5"]),
        ({}, {"max_tokens": 0}, "max_tokens", ["0"]),
        ({}, {"max_tokens": -3}, "max_tokens", ["-3"]),
        ({}, {"max_tokens": 2**31}, "max_tokens", ["2147483648"]),
        ({}, {"max_tokens": CONTEXT}, "max_tokens", ["3 tokens", "64", "shorten"]),
        ({}, {"seed": 2**63}, "seed", ["9223372036854775808"]),
        ({}, {"seed": "s"}, "seed", ["'s'"]),
        ({}, {"stop": [""]}, "stop[0]", ["''"]),
        ({}, {"stop": [2.5]}, "stop[0]", ["2.5"]),
        ({}, {"stop": [2**31]}, "stop[0]", ["2147483648"]),
        ({"prompt": []}, {}, "prompt", ["at least one"]),
        ({"prompt": [1] * CONTEXT}, {}, "max_tokens", ["64 tokens", "shorten"]),
        ({"prompt": [1, VOCAB]}, {}, "prompt[1]", ["272", "0 to 271"]),
        ({"prompt": [1, -1]}, {}, "prompt[1]", ["-1"]),
        ({"prompt": [1, 2**40]}, {}, "prompt", ["1099511627776"]),
        ({"prompt": ["a"]}, {}, "prompt", ["numbers"]),
        ({"prompt": [[1], [1, 2]]}, {}, "prompt", ["ragged"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sampling(
    world: World, arguments: dict[str, Any], params: dict[str, Any], field: str, texts: list[str]
) -> None:
    settings = SimpleNamespace(
        **{"max_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, **params}
    )
    call = {"prompt": PROMPT, "num_samples": 1, "sampling_params": settings, **arguments}
    error = refused(lambda: world.sampler.sample(**call))
    assert error.field is not None and error.field.endswith(field), f"{error.field}: {error}"
    check(error, "INVALID_ARGUMENT", error.field, field.partition("[")[0], *texts)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        ({"base_model": TOY}, ValueError, "firetitan/toy"),
        ({"lora_rank": 8}, ValueError, "8"),
        ({"lora_rank": -1}, ValueError, "lora_rank: is -1"),
        ({"lora_rank": 2.5}, ValueError, "lora_rank: is 2.5"),
        ({"lora_rank": 2**40}, ValueError, "lora_rank"),
        ({"max_context_length": -1}, ValueError, "max_context_length: is -1"),
        ({"max_context_length": 2**40}, ValueError, "max_context_length"),
        ({"seed": 6}, ValueError, "seed: 6"),
        ({"seed": 2**63}, ValueError, "seed: is 9223372036854775808"),
        ({"lora_alpha": INF}, ValueError, "alpha"),
        ({"trainer_job_id": "../x"}, ValueError, "trainer_job_id: '../x' is not a valid name"),
        ({"trainer_job_id": TEN_MB}, ValueError, "is not a valid name"),
        ({"trainer_job_id": "new", "base_model": ""}, ValueError, "base_model"),
        ({"trainer_job_id": "new", "base_model": TEN_MB}, ValueError, "base_model"),
        ({"trainer_job_id": "new", "base_model": "a\0b"}, ValueError, "base_model"),
        ({"trainer_job_id": "new", "lora_rank": 5000}, ValueError, "lora_rank: 5000"),
        ({"create_deployment": True, "deployment_id": "a/b"}, ValueError, "a/b"),
        ({"ranks": 3}, TypeError, "ranks"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_services(
    world: World, tiny_llama: Path, config: dict[str, Any], kind: type[Exception], text: str
) -> None:
    settings = {
        "base_model": str(tiny_llama),
        "lora_rank": 4,
        "trainer_job_id": "llama",
        "create_deployment": False,
        **config,
    }
    with pytest.raises(kind) as caught:
        with FiretitanServiceClient.from_firetitan_config(
            address=world.daemon.address, **settings
        ) as service:
            service.create_training_client()
    assert text in str(caught.value) and len(str(caught.value)) < 4000
    if isinstance(caught.value, FiretitanError):
        fit(caught.value)


def test_a_deployment_of_another_model(world: World) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        address=world.daemon.address,
        base_model=TOY,
        lora_rank=0,
        deployment_id="serving",
        create_deployment=True,
    ) as service:
        with pytest.raises(ValueError, match="firetitan/toy") as caught:
            service.create_sampling_client()
    assert "serving" in str(caught.value)


def test_models_that_do_not_exist(world: World, tmp_path: Path) -> None:
    wanted = tmp_path / "none"
    with FiretitanServiceClient.from_firetitan_config(
        address=world.daemon.address, base_model=str(wanted), lora_rank=0, create_deployment=False
    ) as service:
        error = refused(service.create_training_client)
    check(error, "MODEL_NOT_FOUND", error.field, str(wanted))
    assert isinstance(error, KeyError)


def test_sessions_that_do_not_exist(world: World) -> None:
    for session, kind, text in (
        ("trainers/llama/sessions/00000000", KeyError, "trainers/llama/sessions/00000000"),
        ("somewhere", ValueError, "session: 'somewhere' is no session name"),
        ("trainers/../sessions/x", ValueError, "is not a valid name"),
    ):
        with FiretitanServiceClient(address=world.daemon.address) as service:
            with pytest.raises(kind) as caught:
                service.create_training_client(session=session)
        assert text in str(caught.value)


def test_a_second_daemon_on_the_same_state(world: World) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", "serve"],
        env={**os.environ, "FIRETITAN_HOME": str(world.daemon.home)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 3
    assert str(world.daemon.process.pid) in second.stderr
    assert "Traceback" not in second.stderr
