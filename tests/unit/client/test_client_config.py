"""Addresses, settings, references: what is refused in the call, before any daemon is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from firetitan_client import FiretitanServiceClient, address, references
from firetitan_client.managed import (
    FiretitanProvisioningConfig,
    build_config,
    default_deployment_id,
)
from firetitan_daemon.places import Places


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIRETITAN_HOME", str(tmp_path))
    monkeypatch.delenv("FIRETITAN_ADDRESS", raising=False)
    monkeypatch.delenv("FIRETITAN_AUTOSTART", raising=False)
    return tmp_path


def test_import_is_light() -> None:
    code = (
        "import sys, firetitan_client\n"
        "from firetitan_client import FiretitanServiceClient, GradAccNormalization\n"
        "heavy = {'torch', 'tinker', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_export_exists() -> None:
    import firetitan_client

    for name in firetitan_client.__all__:
        assert getattr(firetitan_client, name) is not None
    assert "FiretitanServiceClient" in dir(firetitan_client)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = firetitan_client.Nothing


def test_default_address(home: Path) -> None:
    assert address.resolve().address == f"unix:{Places(home).socket}"


@pytest.mark.parametrize("length", [1, *range(20, 90, 1), 200])
def test_a_daemon_that_is_started_serves_where_it_is_looked_for(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path("/" + "h" * length)
    monkeypatch.setenv("FIRETITAN_HOME", str(home))
    assert address.resolve().address == f"unix:{Places(home).socket}"


def test_address_comes_from_the_daemons_record(home: Path) -> None:
    (home / "daemon.json").write_text('{"address": "unix:/elsewhere.sock"}')
    assert address.resolve().address == "unix:/elsewhere.sock"


def test_a_home_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRETITAN_HOME", "~no-such-user/x")
    with pytest.raises(ValueError, match=r"FIRETITAN_HOME: '~no-such-user/x' .* give a folder"):
        address.resolve()


def test_argument_then_environment_then_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "daemon.json").write_text('{"address": "unix:/home.sock"}')
    monkeypatch.setenv("FIRETITAN_ADDRESS", "unix:/environment.sock")
    assert address.resolve().address == "unix:/environment.sock"
    assert address.resolve(address="/argument.sock").address == "unix:/argument.sock"


def test_cloud_urls_mean_the_local_daemon(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = address.resolve("https://user:QZQZ@api.fireworks.ai")
    assert found.address == f"unix:{Places(home).socket}"
    assert "api.fireworks.ai is not dialled" in caplog.text and "QZQZ" not in caplog.text


def test_endpoints_carry_the_trainer() -> None:
    endpoint = address.Endpoint("unix:/a.sock", "job-1")
    assert address.resolve(endpoint.base_url) == endpoint


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("gpubox:7465", "tcp:gpubox:7465"),
        ("tcp:127.0.0.1:7465", "tcp:127.0.0.1:7465"),
        ("[::1]:7465", "tcp:[::1]:7465"),
    ],
)
def test_addresses_over_tcp(given: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = address.resolve(given)
    assert endpoint.address == address.resolve(address=given).address == found
    assert address.resolve(address.Endpoint(found, "job-1").base_url).trainer_id == "job-1"
    assert address.resolve(endpoint.base_url) == endpoint
    monkeypatch.setenv("FIRETITAN_ADDRESS", given)
    assert address.resolve() == address.resolve("https://api.fireworks.ai") == endpoint


@pytest.mark.parametrize(
    "given",
    [
        "localhost",
        "localhost:port",
        "unix:@abstract",
        "unix-abstract:name",
        "unix-abstract:7465",
        "unix:relative.sock",
        "dns:7465",
        "dns:///gpubox:7465",
        "ipv4:127.0.0.1:7465",
        "vsock:2:7465",
        "grpc://gpubox:7465",
        "tcp://gpubox:7465",
        "user@gpubox:7465",
    ],
)
def test_other_addresses_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="is neither a Unix socket nor host:port"):
        FiretitanServiceClient(address=given)


def test_aliases_and_blank_ids() -> None:
    config = build_config(
        None, {"model_name": "m", "trainer_id": "", "training_shape": "s", "lora_rank": None}
    )
    assert (config.base_model, config.trainer_job_id, config.lora_rank) == ("m", None, None)
    assert config.training_shape_id == "s"


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"base_model": "a", "model_name": "b"}, ValueError, "not both"),
        ({"training_shape": "a", "training_shape_ref": "b"}, ValueError, "only one alias"),
        ({"lora_ranks": 3}, TypeError, "'lora_ranks'"),
        ({"lora_rank": -1}, ValueError, "lora_rank: is -1"),
        ({"cleanup_deployment_on_close": "stop"}, ValueError, "'scale_to_zero', 'delete'"),
        ({"max_lora_rank": 0}, ValueError, "max_lora_rank: is 0"),
        ({"max_lora_rank": 8, "forward_only": True}, ValueError, "forward_only"),
        ({"max_lora_rank": 8, "lora_rank": 4}, ValueError, "cannot be combined"),
        ({"replica_count": -2}, ValueError, "replica_count: is -2"),
        ({"trainer_replica_count": 2}, NotImplementedError, "trainer_replica_count=2"),
        ({"hot_load_transition_type": "later"}, ValueError, "SYNC or ASYNC"),
    ],
)
def test_wrong_settings(given: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FiretitanServiceClient.from_firetitan_config(**given)


def test_what_a_data_centre_needs_is_accepted() -> None:
    FiretitanServiceClient.from_firetitan_config(
        api_key="key",
        base_url="https://api.fireworks.ai",
        base_model="m",
        region="US",
        gradient_accumulation_steps=None,
        unknown_but_none=None,
        training_shape_id="accounts/fireworks/trainingShapes/x",
        learning_rate=1e-5,
        replica_count=1,
    )


def test_accelerators_are_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="accelerator_count"):
        FiretitanServiceClient.from_firetitan_config(base_model="m", accelerator_count=8)


def test_config_object_or_arguments() -> None:
    config = FiretitanProvisioningConfig(base_model="m")
    assert FiretitanServiceClient.from_firetitan_config(managed_config=config)._config == config
    with pytest.raises(ValueError, match="not both"):
        FiretitanServiceClient.from_firetitan_config(managed_config=config, base_model="m")


def test_no_daemon_names_the_command(home: Path) -> None:
    service = FiretitanServiceClient.from_firetitan_config(base_model="firetitan/toy")
    for _ in range(2):  # a second try is not taken for a duplicate
        with pytest.raises(ConnectionError, match="start one with: firetitand serve") as caught:
            service.create_training_client()
    assert str(Places(home).socket) in str(caught.value)
    with pytest.raises(ConnectionError, match="no daemon at"):
        service.create_sampling_client()


def test_disagreeing_with_the_service_names_both() -> None:
    service = FiretitanServiceClient.from_firetitan_config(base_model="a", lora_rank=4)
    with pytest.raises(ValueError, match="base_model: 'b' was given, this service has 'a'"):
        service.create_training_client("b")
    with pytest.raises(ValueError, match="lora_rank: 0 was given, this service has 4"):
        service.create_training_client(lora_rank=0)


def test_bare_service_needs_a_model() -> None:
    with pytest.raises(ValueError, match="base_model is required"):
        FiretitanServiceClient().create_training_client()


def test_closed_service_refuses() -> None:
    with FiretitanServiceClient() as service:
        pass
    with pytest.raises(RuntimeError, match="FiretitanServiceClient is closed"):
        service.create_training_client("m")
    service.close()


def test_deployment_ids_are_names() -> None:
    made = default_deployment_id("HuggingFaceTB/SmolLM2_135M!")
    assert made.startswith("smollm2-135m-")
    assert references.check_name(made) == made


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "a\0", "x" * 129, None])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(ValueError, match="is not a valid name"):
        references.check_name(name)


def test_checkpoint_references() -> None:
    class Saved:
        path = "trainers/t/sessions/s/checkpoints/c"

    class SaveWeightsForSamplerResponse:
        path = "x-12345678"

    assert references.checkpoint_reference(Saved()) == Saved.path
    assert references.checkpoint_reference(None, "c") == "c"
    assert references.checkpoint_reference("tinker://job/weights/c") == "cross_job://job/c"
    assert references.cross_job("c", "job") == "cross_job://job/c"
    assert references.cross_job("c", None) == "c"
    for snapshot in (
        SaveWeightsForSamplerResponse(),
        "snapshots/x",
        "tinker://job/sampler_weights/x",
    ):
        with pytest.raises(ValueError, match="is a snapshot for sampling"):
            references.checkpoint_reference(snapshot)
    with pytest.raises(ValueError, match="cannot be empty"):
        references.checkpoint_reference(" ")
    with pytest.raises(TypeError):
        references.checkpoint_reference(None)
