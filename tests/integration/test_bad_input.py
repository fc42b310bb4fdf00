"""Bad input to a training client: told by field, value and way out, with nothing changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from support.bad_input import (
    ADAM,
    INF,
    NAN,
    PROMPT,
    TEN_MB,
    VOCAB,
    World,
    bad_input_world,
    check,
    datum,
    refused,
)
from support.stubs import TOY

from firetitan_client import FiretitanServiceClient

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    with bad_input_world(tmp_path_factory.mktemp("bad-input") / "home", tiny_llama) as world:
        yield world


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    with world.unharmed():
        yield


def rl(**inputs: Any) -> tinker.Datum:
    return datum(**{"logprobs": [-1.0] * 3, "advantages": [1.0] * 3, **inputs})


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
