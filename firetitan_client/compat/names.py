"""The names of the managed service's SDK: which of its modules has which, and where ours is.

Knows: one table. Must not know: how modules are made.

A name is looked up in `firetitan_client` itself, or where `ELSEWHERE` says. One that is listed but
not found there does not exist yet; asking for it says so.
"""

from __future__ import annotations

import importlib
from typing import Any

from firetitan_client.errors import Unsupported

SDK = "fireworks.training.sdk"

_CONSTANTS = (
    "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO",
    "DeploymentCleanupOnClose",
)
_CONTROLLERS = (
    "AdaptiveConcurrencyController",
    "FixedConcurrencyController",
    "SamplingConcurrencyController",
)

SUBMODULES: dict[str, tuple[str, ...]] = {
    "client": (
        "FiretitanSampleResponse",
        "FiretitanSampledSequence",
        "FiretitanSamplingClient",
        "FiretitanSamplingParams",
        "FiretitanServiceClient",
        "FiretitanTrainingClient",
        "GradAccNormalization",
        "GradNormMetricsMode",
        "SaveSamplerResult",
    ),
    "concurrency": _CONTROLLERS,
    "deployment": (
        "DEFAULT_CHECKSUM_FORMAT",
        "DEFAULT_DELTA_COMPRESSION",
        "DeploymentConfig",
        "DeploymentInfo",
        "DeploymentManager",
        "DeploymentSampler",
        "SampledCompletion",
        "ServerMetrics",
        *_CONTROLLERS,
    ),
    "errors": (
        "DOCS_SDK",
        "TrainingAPIError",
        "format_sdk_error",
        "parse_api_error",
        "request_with_retries",
    ),
    "fireworks_client": ("FireworksClient", "TrainingShapeProfile", "validate_output_model_id"),
    "managed": ("FiretitanProvisioningConfig", *_CONSTANTS),
    "patches": (),
    "sampling": ("DeploymentSampler", "SampledCompletion", "ServerMetrics"),
    "tinker_compat": (
        "install_tinker_service_client",
        "patched_tinker_service_client",
        "restore_tinker_service_client",
    ),
    "trainer": (
        "CreatedTrainerJob",
        "TrainerJobConfig",
        "TrainerJobManager",
        "TrainerServiceEndpoint",
    ),
    "training_spec": (
        "ConstantSchedule",
        "CosineSchedule",
        "LRSchedulerSpec",
        "LinearSchedule",
        "WSDSchedule",
        "compute_lr",
        "default_constant_schedule",
        "has_v1_scheduler_fields",
        "normalize_lr_scheduler_spec",
        "parse_lr_scheduler_spec",
    ),
    "weight_syncer": ("WeightSyncer",),
}
"""Submodule of the SDK to its names."""

_ONLY_IN_SUBMODULES = frozenset(
    {"DOCS_SDK", "format_sdk_error", "parse_api_error", "request_with_retries"}
)
_ONLY_IN_ROOT = (
    "DEFAULT_MERGED_BASE_EXPORT_PRECISION",
    "DeploymentSamplerTimeoutError",
    "ExportPrecision",
    "SamplingRequestError",
)
ROOT: tuple[str, ...] = tuple(
    sorted(
        {name for names in SUBMODULES.values() for name in names}.difference(_ONLY_IN_SUBMODULES)
        | set(_ONLY_IN_ROOT)
    )
)
"""Names of the SDK itself."""

ELSEWHERE = dict.fromkeys(_ONLY_IN_SUBMODULES, "sdk_errors") | {
    "FiretitanSampleResponse": "types",
    "FiretitanSampledSequence": "types",
}
"""Names that `firetitan_client` does not export: their module in it."""


def listed(module: str) -> tuple[str, ...]:
    """The names of the SDK or of one of its submodules.

    Args:
        module: Full name, e.g. `fireworks.training.sdk.client`.
    """
    return ROOT if module == SDK else SUBMODULES[module.rpartition(".")[2]]


def exists(name: str) -> bool:
    """Whether firetitan has it."""
    import firetitan_client

    return name in ELSEWHERE or name in firetitan_client.__all__


def resolve(module: str, name: str) -> Any:
    """What a name of the SDK is here.

    Args:
        module: Full name of the SDK's module.
        name: The name in it.

    Raises:
        AttributeError: The SDK's module has no such name.
        Unsupported: It has, firetitan has not; a NotImplementedError.
    """
    if name not in listed(module):
        raise AttributeError(f"module {module!r} (of firetitan) has no attribute {name!r}")
    if not exists(name):
        raise Unsupported(
            f"{module}.{name} has no counterpart in firetitan_client; leave it out. "
            f"dir({module}) lists what there is"
        )
    home = ELSEWHERE.get(name)
    where = "firetitan_client" if home is None else f"firetitan_client.{home}"
    return getattr(importlib.import_module(where), name)
