"""Bad input through the client: told by field, value and way out, with nothing changed."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tinker
from support.daemon import DaemonProcess
from support.stubs import TOY, LaneClient, Stubs

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient
from firetitan_client.errors import BY_REASON, FiretitanError

pytestmark = pytest.mark.timeout(120)

VOCAB = 272
CONTEXT = 64
TEN_MB = "x" * 10_000_000
ADAM = tinker.AdamParams(learning_rate=1e-2)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


@dataclasses.dataclass
class World:
    """One daemon, one session with a gradient pending, one deployment, something of a toy."""

    daemon: DaemonProcess
    stubs: Stubs
    service: FiretitanServiceClient
    policy: FiretitanTrainingClient
    sampler: Any
    lane: LaneClient
    snapshot: str
    """Of the session, served."""
    foreign: str
    """Of another base model."""

    def state(self) -> tuple[str, list[int]]:
        """Digest of weights, optimizer and gradients; the daemon and its workers."""
        saved = self.stubs.done(self.lane.save_state("probe")).checkpoint
        return saved.digest, [self.daemon.process.pid, *sorted(self.daemon.worker_pids())]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    daemon = DaemonProcess(tmp_path_factory.mktemp("bad-input") / "home")
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        service = FiretitanServiceClient.from_firetitan_config(
            address=daemon.address,
            base_model=str(tiny_llama),
            lora_rank=4,
            seed=5,
            max_context_length=CONTEXT,
            trainer_job_id="llama",
            deployment_id="serving",
        )
        policy = service.create_training_client()
        go_on(policy)
        saved = policy.save_weights_for_sampler("served").result()
        policy.save_state("kept").result()
        stubs.create_trainer("toy")
        toy = LaneClient(stubs, stubs.session("trainers/toy"))
        foreign = stubs.done(toy.save_snapshot("foreign")).snapshot.name
        yield World(
            daemon,
            stubs,
            service,
            policy,
            service.create_sampling_client(saved.path),
            LaneClient(stubs, policy.session_name),
            saved.path,
            foreign,
        )
        service.close()
        stubs.channel.close()
    finally:
        daemon.stop()


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    """What was there before is there after, and the next good calls work."""
    before = world.state()
    yield
    assert world.state() == before
    go_on(world.policy)
    answer = world.sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=2)).result()
    assert answer.snapshot == world.snapshot


def go_on(policy: FiretitanTrainingClient) -> None:
    """A step where there is a gradient, then a gradient."""
    policy.forward_backward([datum()], "cross_entropy").result()
    policy.optim_step(ADAM).result()
    policy.forward_backward([datum()], "cross_entropy").result()


def datum(tokens: Any = (1, 2, 3), targets: Any = (2, 3, 4), **inputs: Any) -> tinker.Datum:
    arrays = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
    if targets is not None:
        arrays["target_tokens"] = np.asarray(targets)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(tokens)), loss_fn_inputs=arrays
    )


def rl(**inputs: Any) -> tinker.Datum:
    return datum(**{"logprobs": [-1.0] * 3, "advantages": [1.0] * 3, **inputs})


def refused(call: Callable[[], Any]) -> FiretitanError:
    """What a call or its future raised, fit to be shown."""
    with pytest.raises(FiretitanError) as caught:
        outcome = call()
        outcome.result()
    return fit(caught.value)


def fit(error: FiretitanError) -> FiretitanError:
    text = f"{error} {error.field} {error.metadata}"
    for internal in ("Traceback", 'File "', "site-packages", "firetitan_daemon", "/home/"):
        assert internal not in text
    assert len(text) < 4000
    assert error.reason != "INTERNAL" and isinstance(error, BY_REASON[error.reason])
    return error


def check(error: FiretitanError, reason: str, field: str | None, *texts: str) -> None:
    assert (error.reason, error.field) == (reason, field), str(error)
    for text in texts:
        assert text in str(error)


NAN, INF = float("nan"), float("inf")
WEIGHTS = 'data[0].loss_fn_inputs["weights"]'
TARGETS = 'data[0].loss_fn_inputs["target_tokens"]'
TOKENS = "data[0].model_input"
CE, IS = "cross_entropy", "importance_sampling"


@pytest.mark.parametrize(
    ("data", "loss", "reason", "field", "texts"),
    [
        ([datum([1, VOCAB, 3])], CE, "INVALID_DATUM", f"{TOKENS}[1]", ["272", "0 to 271"]),
        ([datum([1, 2, -7])], CE, "INVALID_DATUM", f"{TOKENS}[2]", ["-7", "0 to 271"]),
        ([datum(), datum([9999] * 3)], CE, "INVALID_DATUM", "data[1].model_input[0]", ["9999"]),
        ([datum([1, 2, 2**31])], CE, "INVALID_ARGUMENT", f"{TOKENS}.chunks[0].tokens",
         ["2147483648"]),
        ([datum(targets=[1, VOCAB, 3])], CE, "INVALID_DATUM", f"{TARGETS}[1]", ["272"]),
        ([datum(targets=[1, 2, -1])], CE, "INVALID_DATUM", f"{TARGETS}[2]", ["-1"]),
        ([datum(targets=[1.5, 2.0, 3.0])], CE, "INVALID_ARGUMENT", TARGETS, ["token ids"]),
        ([], CE, "INVALID_ARGUMENT", "data", []),
        ([datum([], [])], CE, "INVALID_DATUM", TOKENS, ["0 tokens", "1 to 64"]),
        ([datum([1] * 65, [1] * 65)], CE, "INVALID_DATUM", TOKENS, ["65 tokens", "1 to 64"]),
        ([datum(targets=[1, 2])], CE, "INVALID_DATUM", TARGETS, ["[2]", "3 tokens"]),
        ([datum(weights=[1.0, 1.0])], CE, "INVALID_DATUM", WEIGHTS,
         ["has 2 values, target_tokens has 3; give one per target"]),
        ([datum(weights=[1.0, NAN, 1.0])], CE, "NON_FINITE", f"{WEIGHTS}[1]", ["nan", "finite"]),
        ([datum(weights=[1.0, 1.0, -INF])], CE, "NON_FINITE", f"{WEIGHTS}[2]", ["-inf"]),
        ([rl(logprobs=[NAN, 0, 0])], IS, "NON_FINITE",
         'data[0].loss_fn_inputs["logprobs"][0]', ["nan"]),
        ([rl(advantages=[0, INF, 0])], IS, "NON_FINITE",
         'data[0].loss_fn_inputs["advantages"][1]', ["inf"]),
        ([rl(logprobs=[-1e30] * 3)], IS, "NON_FINITE", "data[0]", ["position 0", "overflows"]),
        ([datum()], "ppo", "LOSS_INPUT_MISSING", 'data[0].loss_fn_inputs["advantages"]',
         ["'advantages'", "ppo"]),
        ([datum(targets=None, weights=[1.0] * 3)], CE, "LOSS_INPUT_MISSING", TARGETS,
         ["'target_tokens'"]),
        ([datum(rewards=[1.0] * 3)], CE, "INVALID_DATUM", 'data[0].loss_fn_inputs["rewards"]',
         ["rewards", "target_tokens, weights"]),
        ([datum(**{TEN_MB: [1.0] * 3})], CE, "INVALID_DATUM", None, ["target_tokens, weights"]),
        ([datum(targets=[[1, 2]] * 3, logprobs=[[0.0] * 2] * 3, advantages=[[0.0] * 2] * 3)],
         "gspo", "INVALID_DATUM", TARGETS, ["[3, 2]", "gspo"]),
        ([datum()], "mean_of_means", "UNKNOWN_LOSS", "loss_fn", ["mean_of_means", "ppo"]),
        ([datum()], "", "UNKNOWN_LOSS", "loss_fn", ["cross_entropy"]),
        ([datum()], TEN_MB, "UNKNOWN_LOSS", "loss_fn", ["cross_entropy"]),
    ],
)  # fmt: skip
def test_data(
    world: World, data: Any, loss: str, reason: str, field: str | None, texts: list[str]
) -> None:
    error = refused(lambda: world.policy.forward_backward(data, loss))
    check(error, reason, error.field if field is None else field, *texts)
    assert isinstance(error, ValueError)
    if "rewards" not in (field or "") and field is not None:
        check(refused(lambda: world.policy.forward(data, loss)), reason, field, *texts)


def test_forward_ignores_what_it_does_not_know(world: World) -> None:
    given = datum(rewards=[NAN] * 3)
    known = world.policy.forward([datum()], CE).result()
    assert world.policy.forward([given], CE).result().metrics == known.metrics


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        ({"clip_lo": 0.5}, ["clip_lo", "clip_low_threshold"]),
        ({"clip_low_threshold": NAN}, ["nan", "finite"]),
        ({"clip_high_threshold": INF}, ["inf", "finite"]),
        ({"clip_low_threshold": "low"}, ["'low'", "number"]),
        ({"clip_low_threshold": 2.0, "clip_high_threshold": 1.0}, ["2.0", "1"]),
        ({"clip_low_threshold": [0.5]}, ["list", "number"]),
        ({TEN_MB: 1.0}, ["clip_low_threshold"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_loss_settings(world: World, config: dict[str, Any], texts: list[str]) -> None:
    error = refused(lambda: world.policy.forward_backward([rl()], "ppo", config))
    check(error, "INVALID_ARGUMENT", error.field, *texts)
    assert error.field is not None and error.field.startswith("loss_fn_config[")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("learning_rate", NAN, "NON_FINITE"),
        ("learning_rate", INF, "NON_FINITE"),
        ("learning_rate", 1e39, "NON_FINITE"),
        ("learning_rate", -1.0, "INVALID_ARGUMENT"),
        ("learning_rate", "fast", "INVALID_ARGUMENT"),
        ("beta1", 1.0, "INVALID_ARGUMENT"),
        ("beta1", -0.1, "INVALID_ARGUMENT"),
        ("beta2", 1.5, "INVALID_ARGUMENT"),
        ("beta2", NAN, "NON_FINITE"),
        ("eps", 0.0, "INVALID_ARGUMENT"),
        ("weight_decay", -1.0, "INVALID_ARGUMENT"),
        ("weight_decay", INF, "NON_FINITE"),
        ("grad_clip_norm", -1.0, "INVALID_ARGUMENT"),
        ("grad_clip_norm", NAN, "NON_FINITE"),
    ],
)
def test_optimizer_settings(world: World, name: str, value: Any, reason: str) -> None:
    params = SimpleNamespace(**{**ADAM.model_dump(), name: value})
    error = refused(lambda: world.policy.optim_step(params))
    check(error, reason, f"adam_params.{name}", name, str(value))
    assert isinstance(error, ValueError)


def test_a_step_without_a_gradient(world: World) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        address=world.daemon.address,
        base_model=TOY,
        lora_rank=0,
        trainer_job_id="toy",
        create_deployment=False,
    )
    with service:
        policy = service.create_training_client()
        error = refused(lambda: policy.optim_step(ADAM))
    check(error, "NO_GRADIENTS", None, "no gradients accumulated")
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", ".x", "a\0b", "a b", "é", 5, TEN_MB],
    ids=lambda value: repr(value)[:12],
)
def test_names_of_new_things(world: World, name: Any) -> None:
    for call in (world.policy.save_state, world.policy.save_weights_for_sampler):
        error = refused(lambda call=call: call(name))
        check(error, "NAME_INVALID", "name", repr(name)[:20], "letters")
        assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("reference", "reason", "text"),
    [
        ("nothing", "CHECKPOINT_NOT_FOUND", "trainers/llama has kept, probe; nothing was loaded"),
        ("cross_job://nobody/kept", "CHECKPOINT_NOT_FOUND", "nobody"),
        ("trainers/llama/sessions/01234567/checkpoints/kept", "CHECKPOINT_NOT_FOUND", "01234567"),
        ("cross_job://nobody", "NAME_INVALID", "cross_job://<source_job_id>/<checkpoint_name>"),
        ("gs://bucket/kept", "NAME_INVALID", "logical name"),
        ("../../kept", "NAME_INVALID", "traversal"),
        ("/etc/passwd", "NAME_INVALID", "logical name"),
        ("a\0b", "NAME_INVALID", "invalid characters"),
        ("", "INVALID_ARGUMENT", "empty"),
        (TEN_MB, "NAME_INVALID", "use 1 to 128 letters"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_checkpoints_that_are_none(world: World, reference: str, reason: str, text: str) -> None:
    for call in (world.policy.load_state, world.policy.load_state_with_optimizer):
        error = refused(lambda call=call: call(reference))
        assert error.reason == reason and text in str(error), str(error)
        assert isinstance(error, KeyError if reason.endswith("NOT_FOUND") else ValueError)


def test_what_the_client_can_see_raises_in_the_call(world: World) -> None:
    """Not in the future, and in the documented kind of exception: nothing is sent."""
    policy, service = world.policy, world.service
    for kind, text, call in (
        (ValueError, "No data provided", lambda: policy.forward(None, CE)),
        (ValueError, "data: is a int; give a list", lambda: policy.forward_backward(3, CE)),
        (ValueError, "loss_fn_config: is a list", lambda: policy.forward([datum()], CE, [1])),
        (ValueError, "loss_fn_config: is a str", lambda: policy.forward_backward([rl()], IS, "x")),
        (ValueError, "empty or traversal", lambda: policy.load_state("a/../b")),
        (ValueError, "empty or traversal", lambda: policy.load_state("cross_job://../kept")),
        (ValueError, "invalid characters", lambda: policy.load_state("a\\b")),
        (ValueError, "opaque cross_job", lambda: policy.load_state_with_optimizer("/etc/passwd")),
        (ValueError, "Expected 'cross_job://", lambda: policy.load_state("cross_job://kept")),
        (ValueError, "segment 'b c' is not valid", lambda: policy.load_state("cross_job://a/b c")),
        (ValueError, "user_metadata: holds 'a': 1", lambda: (
            policy.save_state("s", user_metadata={"a": 1}))),
        (ValueError, "user_metadata: is a list", lambda: policy.save_state("s", user_metadata=[1])),
        (ValueError, "timeout: is 'soon'", lambda: policy.save_state("s", timeout="soon")),
        (ValueError, "sampling_params: is a dict", lambda: world.sampler.sample(
            PROMPT, 1, {"max_tokens": 2})),
        (ValueError, "deployment_config: is a str", lambda: (
            service.create_inference_deployment_sampler("teacher"))),
        (ValueError, "user_metadata: holds 1: 'a'", lambda: (
            service.create_reference_client(user_metadata={1: "a"}))),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value), text


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


def test_a_snapshot_is_no_checkpoint(world: World) -> None:
    for reference in (
        world.snapshot,
        f"snapshots/{world.snapshot}",
        f"tinker://llama/sampler_weights/{world.snapshot}",
        SimpleNamespace(path=world.snapshot),
    ):
        error = refused(lambda reference=reference: world.policy.load_state(reference))
        assert isinstance(error, ValueError) and error.field in ("path", "checkpoint")
        for text in (world.snapshot, "is a snapshot", "save_state"):
            assert text in str(error)


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
