"""Code that imports the managed service's SDK gets firetitan's names."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import firetitan_client
from firetitan_client import compat
from firetitan_client.compat import names

needs_no_real_sdk = pytest.mark.skipif(
    importlib.util.find_spec("fireworks") is not None, reason="a real fireworks is installed"
)
SDK = "fireworks.training.sdk"
# What recipes written for the managed service import, by module.
IMPORTED_BY_RECIPES = {
    SDK: {
        "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO",
        "DeploymentCleanupOnClose",
        "DeploymentManager",
        "FiretitanServiceClient",
        "FireworksClient",
        "TrainerJobManager",
        "validate_output_model_id",
    },
    f"{SDK}.client": {"FiretitanServiceClient", "FiretitanTrainingClient", "GradAccNormalization"},
    f"{SDK}.trainer": {"TrainerJobManager", "TrainerServiceEndpoint"},
    f"{SDK}.deployment": {
        "AdaptiveConcurrencyController",
        "DEFAULT_DELTA_COMPRESSION",
        "DeploymentConfig",
        "DeploymentInfo",
        "DeploymentManager",
        "DeploymentSampler",
    },
    f"{SDK}.errors": {"DOCS_SDK", "format_sdk_error", "request_with_retries"},
    f"{SDK}.training_spec": {
        "LRSchedulerSpec",
        "compute_lr",
        "default_constant_schedule",
        "normalize_lr_scheduler_spec",
    },
    f"{SDK}.sampling": {"SampledCompletion"},
    f"{SDK}.weight_syncer": {"WeightSyncer"},
    f"{SDK}.fireworks_client": {"TrainingShapeProfile"},
}
EXPORTED = """
    FiretitanServiceClient FiretitanTrainingClient FiretitanSamplingClient FiretitanSamplingParams
    FiretitanSampleResponse FiretitanSampledSequence SaveSamplerResult GradAccNormalization
    GradNormMetricsMode FiretitanProvisioningConfig TrainingAPIError TrainerJobConfig
    CreatedTrainerJob TrainerJobManager TrainerServiceEndpoint CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE
    CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO DeploymentCleanupOnClose DEFAULT_CHECKSUM_FORMAT
    DEFAULT_DELTA_COMPRESSION DeploymentInfo DeploymentConfig DeploymentManager ServerMetrics
    DeploymentSampler SampledCompletion SamplingRequestError DeploymentSamplerTimeoutError
    SamplingConcurrencyController AdaptiveConcurrencyController FixedConcurrencyController
    install_tinker_service_client patched_tinker_service_client restore_tinker_service_client
    WSDSchedule CosineSchedule LinearSchedule ConstantSchedule LRSchedulerSpec compute_lr
    has_v1_scheduler_fields parse_lr_scheduler_spec default_constant_schedule
    normalize_lr_scheduler_spec WeightSyncer DEFAULT_MERGED_BASE_EXPORT_PRECISION ExportPrecision
    FireworksClient TrainingShapeProfile validate_output_model_id
""".split()


@pytest.fixture
def installed() -> Iterator[None]:
    assert compat.install(force=True)
    yield
    compat.uninstall()


def write_real_sdk(folder: Path) -> Path:
    sdk = folder / "fireworks" / "training" / "sdk"
    sdk.mkdir(parents=True)
    for package in (sdk, sdk.parent, sdk.parent.parent):
        (package / "__init__.py").write_text("real = True\n")
    (sdk / "client.py").write_text("FiretitanServiceClient = 'the cloud'\n")
    return folder


def run(program: str, *path: Path) -> str:
    lines = [f"import sys; sys.path[:0] = {[str(one) for one in path]!r}", program]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tables_hold_every_documented_name() -> None:
    assert set(names.ROOT) == set(EXPORTED)
    for module, wanted in IMPORTED_BY_RECIPES.items():
        assert wanted <= set(names.listed(module)), module


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("module", [SDK, *(f"{SDK}.{name}" for name in names.SUBMODULES)])
def test_every_name_is_firetitans_or_says_that_it_is_missing(module: str) -> None:
    stand_in = importlib.import_module(module)
    for name in names.listed(module):
        if names.exists(name):
            ours = getattr(firetitan_client, name, None)
            assert ours is None or getattr(stand_in, name) is ours
            assert name in dir(stand_in)
        else:
            with pytest.raises(NotImplementedError, match=rf"{module}\.{name} has no counterpart"):
                getattr(stand_in, name)
            assert name not in dir(stand_in)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = stand_in.nothing_of_the_kind


@needs_no_real_sdk
def test_one_line_makes_the_documented_imports_work() -> None:
    program = """
from firetitan_client import compat
compat.install()
from fireworks.training.sdk import FiretitanServiceClient, GradAccNormalization
from fireworks.training.sdk.client import FiretitanTrainingClient
from fireworks.training.sdk.training_spec import compute_lr, default_constant_schedule
from fireworks.training.sdk.errors import DOCS_SDK, format_sdk_error, request_with_retries
import fireworks.training.sdk.patches
import fireworks.training.sdk.deployment as deployment
service = FiretitanServiceClient.from_firetitan_config(
    api_key="key", base_url="https://api.fireworks.ai", base_model="m", address="unix:/nowhere"
)
print(type(service).__module__, deployment.DEFAULT_DELTA_COMPRESSION)
print(compute_lr(default_constant_schedule(), 1, 0.5), GradAccNormalization.NUM_SEQUENCES.value)
"""
    assert run(program) == "firetitan_client.service arc_v2\n0.5 num_sequences\n"


@pytest.mark.usefixtures("installed")
def test_star_gives_what_there_is() -> None:
    space: dict[str, object] = {}
    exec(f"from {SDK} import *", space)
    assert space["FiretitanServiceClient"] is firetitan_client.FiretitanServiceClient
    assert set(space).intersection(EXPORTED) == {one for one in EXPORTED if names.exists(one)}


@pytest.mark.usefixtures("installed")
def test_unknown_modules_are_not_found() -> None:
    assert compat.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{SDK}.tito")
    assert importlib.util.find_spec(SDK) is not None


@needs_no_real_sdk
def test_uninstall_leaves_nothing() -> None:
    compat.install()
    compat.uninstall()
    compat.uninstall()
    assert not [name for name in sys.modules if name.partition(".")[0] == "fireworks"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fireworks")


def test_a_real_sdk_stays(tmp_path: Path) -> None:
    program = """
import logging; logging.basicConfig(stream=sys.stdout, format="%(message)s")
from firetitan_client import compat
assert compat.install() is False
from fireworks.training.sdk.client import FiretitanServiceClient
print(FiretitanServiceClient)
"""
    said, client = run(program, write_real_sdk(tmp_path)).splitlines()
    assert said.startswith("compat.install(): a real fireworks package is installed and stays")
    assert client == "the cloud"


@pytest.mark.parametrize("before", ["", "import fireworks.training.sdk.client"])
def test_force_stands_in_for_a_real_sdk(tmp_path: Path, before: str) -> None:
    program = f"""
{before}
from firetitan_client import compat
assert compat.install(force=True)
import fireworks
from fireworks.training.sdk.client import FiretitanServiceClient
print(fireworks.real, FiretitanServiceClient.__module__)
compat.uninstall()
import fireworks.training.sdk.client as client
print(fireworks.training.sdk.real, client.FiretitanServiceClient)
"""
    assert run(program, write_real_sdk(tmp_path)).splitlines() == [
        "True firetitan_client.service",
        "True the cloud",
    ]


@needs_no_real_sdk
def test_a_folder_of_that_name_is_no_sdk(tmp_path: Path) -> None:
    (tmp_path / "fireworks").mkdir()
    program = "from firetitan_client import compat\nprint(compat.install())"
    assert run(program, tmp_path) == "True\n"


def test_importing_the_package_changes_nothing() -> None:
    program = """
import firetitan_client.compat
print(sorted({"tinker", "torch", "fireworks", "pydantic"}.intersection(sys.modules)))
"""
    assert run(program) == "[]\n"
