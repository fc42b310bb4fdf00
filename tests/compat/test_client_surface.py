"""What `import firetitan_client` costs and offers."""

from __future__ import annotations

import resource
import subprocess
import sys

import firetitan_client

HEAVY = ("torch", "transformers", "tinker", "grpc", "numpy", "google.protobuf", "firetitan_daemon")
DOCUMENTED = {
    "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO",
    "DeploymentCleanupOnClose",
    "DeploymentSampler",
    "FiretitanProvisioningConfig",
    "FiretitanSamplingClient",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "GradAccNormalization",
    "SampledCompletion",
    "SaveSamplerResult",
    "ServerMetrics",
    "TrainingAPIError",
}


def imported_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    return set(done.stdout.split())


def test_import_is_light() -> None:
    assert not imported_by("import firetitan_client").intersection(HEAVY)


def test_import_of_every_name_needs_no_engine() -> None:
    modules = imported_by("from firetitan_client import *")
    assert "firetitan_client.training" in modules
    assert not modules.intersection({"torch", "transformers", "tinker", "firetitan_daemon"})


def test_import_takes_less_than_a_quarter_second() -> None:
    def seconds(statement: str) -> float:
        # Of the processor, not of the clock: other tests may run beside this one.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", statement], check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    empty = min(seconds("pass") for _ in range(3))
    package = min(seconds("import firetitan_client") for _ in range(3))
    whole = min(seconds("from firetitan_client import FiretitanServiceClient") for _ in range(3))
    assert package - empty < 0.25
    # gRPC, protobuf and numpy; torch alone would be a second.
    assert whole - empty < 0.75


def test_documented_names_are_exported() -> None:
    assert set(firetitan_client.__all__) >= DOCUMENTED


def test_every_export_exists() -> None:
    for name in firetitan_client.__all__:
        assert getattr(firetitan_client, name) is not None, name
