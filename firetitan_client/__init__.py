"""The Python client of firetitan: FireTitan's and Tinker's training API on a local daemon.

    from firetitan_client import FiretitanServiceClient, GradAccNormalization

Names are loaded when they are first used: importing this package imports neither torch nor tinker
nor gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firetitan_client.address import Endpoint as Endpoint
    from firetitan_client.compat.tinker_service import (
        install_tinker_service_client as install_tinker_service_client,
    )
    from firetitan_client.compat.tinker_service import (
        patched_tinker_service_client as patched_tinker_service_client,
    )
    from firetitan_client.compat.tinker_service import (
        restore_tinker_service_client as restore_tinker_service_client,
    )
    from firetitan_client.completions import SampledCompletion as SampledCompletion
    from firetitan_client.concurrency import (
        AdaptiveConcurrencyController as AdaptiveConcurrencyController,
    )
    from firetitan_client.concurrency import (
        FixedConcurrencyController as FixedConcurrencyController,
    )
    from firetitan_client.concurrency import (
        SamplingConcurrencyController as SamplingConcurrencyController,
    )
    from firetitan_client.constants import DEFAULT_CHECKSUM_FORMAT as DEFAULT_CHECKSUM_FORMAT
    from firetitan_client.constants import DEFAULT_DELTA_COMPRESSION as DEFAULT_DELTA_COMPRESSION
    from firetitan_client.constants import (
        DEFAULT_MERGED_BASE_EXPORT_PRECISION as DEFAULT_MERGED_BASE_EXPORT_PRECISION,
    )
    from firetitan_client.constants import ExportPrecision as ExportPrecision
    from firetitan_client.constants import GradNormMetricsMode as GradNormMetricsMode
    from firetitan_client.deployment_config import DeploymentConfig as DeploymentConfig
    from firetitan_client.deployment_config import DeploymentInfo as DeploymentInfo
    from firetitan_client.deployment_manager import DeploymentManager as DeploymentManager
    from firetitan_client.deployment_sampler import DeploymentSampler as DeploymentSampler
    from firetitan_client.errors import Aborted as Aborted
    from firetitan_client.errors import AlreadyExists as AlreadyExists
    from firetitan_client.errors import Busy as Busy
    from firetitan_client.errors import ClientClosed as ClientClosed
    from firetitan_client.errors import Corrupt as Corrupt
    from firetitan_client.errors import DaemonNotRunning as DaemonNotRunning
    from firetitan_client.errors import FailedPrecondition as FailedPrecondition
    from firetitan_client.errors import FiretitanError as FiretitanError
    from firetitan_client.errors import GraphExpired as GraphExpired
    from firetitan_client.errors import InternalError as InternalError
    from firetitan_client.errors import InvalidArgument as InvalidArgument
    from firetitan_client.errors import LaneBroken as LaneBroken
    from firetitan_client.errors import NoGradients as NoGradients
    from firetitan_client.errors import NotFound as NotFound
    from firetitan_client.errors import OperationCancelled as OperationCancelled
    from firetitan_client.errors import PrecedingFailed as PrecedingFailed
    from firetitan_client.errors import SessionLost as SessionLost
    from firetitan_client.errors import SessionRestarted as SessionRestarted
    from firetitan_client.errors import SnapshotNotActive as SnapshotNotActive
    from firetitan_client.errors import StepMismatch as StepMismatch
    from firetitan_client.errors import TrainingAPIError as TrainingAPIError
    from firetitan_client.errors import Unauthenticated as Unauthenticated
    from firetitan_client.errors import Unavailable as Unavailable
    from firetitan_client.errors import Unsupported as Unsupported
    from firetitan_client.errors import WeightsChanged as WeightsChanged
    from firetitan_client.fireworks_client import FireworksClient as FireworksClient
    from firetitan_client.futures import APIFuture as APIFuture
    from firetitan_client.managed import DeploymentCleanupOnClose as DeploymentCleanupOnClose
    from firetitan_client.managed import FiretitanProvisioningConfig as FiretitanProvisioningConfig
    from firetitan_client.sample_stream import SampleChunk as SampleChunk
    from firetitan_client.sample_stream import SampleStream as SampleStream
    from firetitan_client.sampling import FiretitanSamplingClient as FiretitanSamplingClient
    from firetitan_client.sdk_errors import (
        DeploymentSamplerTimeoutError as DeploymentSamplerTimeoutError,
    )
    from firetitan_client.sdk_errors import SamplingClientClosedError as SamplingClientClosedError
    from firetitan_client.sdk_errors import SamplingRequestError as SamplingRequestError
    from firetitan_client.sdk_errors import validate_output_model_id as validate_output_model_id
    from firetitan_client.server_metrics import ServerMetrics as ServerMetrics
    from firetitan_client.service import FiretitanServiceClient as FiretitanServiceClient
    from firetitan_client.trainer_job_config import CreatedTrainerJob as CreatedTrainerJob
    from firetitan_client.trainer_job_config import TrainerJobConfig as TrainerJobConfig
    from firetitan_client.trainer_job_config import TrainerServiceEndpoint as TrainerServiceEndpoint
    from firetitan_client.trainer_jobs import TrainerJobManager as TrainerJobManager
    from firetitan_client.training import FiretitanTrainingClient as FiretitanTrainingClient
    from firetitan_client.training_profile import TrainingShapeProfile as TrainingShapeProfile
    from firetitan_client.training_spec import ConstantSchedule as ConstantSchedule
    from firetitan_client.training_spec import CosineSchedule as CosineSchedule
    from firetitan_client.training_spec import LinearSchedule as LinearSchedule
    from firetitan_client.training_spec import LRSchedulerSpec as LRSchedulerSpec
    from firetitan_client.training_spec import WSDSchedule as WSDSchedule
    from firetitan_client.training_spec import compute_lr as compute_lr
    from firetitan_client.training_spec import (
        default_constant_schedule as default_constant_schedule,
    )
    from firetitan_client.training_spec import has_v1_scheduler_fields as has_v1_scheduler_fields
    from firetitan_client.training_spec import (
        normalize_lr_scheduler_spec as normalize_lr_scheduler_spec,
    )
    from firetitan_client.training_spec import parse_lr_scheduler_spec as parse_lr_scheduler_spec
    from firetitan_client.types import AdamParams as AdamParams
    from firetitan_client.types import FiretitanSamplingParams as FiretitanSamplingParams
    from firetitan_client.types import GradAccNormalization as GradAccNormalization
    from firetitan_client.types import SamplingParams as SamplingParams
    from firetitan_client.types import SaveSamplerResult as SaveSamplerResult
    from firetitan_client.weight_syncer import WeightSyncer as WeightSyncer

_EXPORTS = {
    "APIFuture": "futures",
    "Aborted": "errors",
    "AdamParams": "types",
    "AdaptiveConcurrencyController": "concurrency",
    "AlreadyExists": "errors",
    "Busy": "errors",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE": "managed",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO": "managed",
    "ClientClosed": "errors",
    "ConstantSchedule": "training_spec",
    "Corrupt": "errors",
    "CosineSchedule": "training_spec",
    "CreatedTrainerJob": "trainer_job_config",
    "DEFAULT_CHECKSUM_FORMAT": "constants",
    "DEFAULT_DELTA_COMPRESSION": "constants",
    "DEFAULT_MERGED_BASE_EXPORT_PRECISION": "constants",
    "DaemonNotRunning": "errors",
    "DeploymentCleanupOnClose": "managed",
    "DeploymentConfig": "deployment_config",
    "DeploymentInfo": "deployment_config",
    "DeploymentManager": "deployment_manager",
    "DeploymentSampler": "deployment_sampler",
    "DeploymentSamplerTimeoutError": "sdk_errors",
    "Endpoint": "address",
    "ExportPrecision": "constants",
    "FailedPrecondition": "errors",
    "FiretitanError": "errors",
    "FiretitanProvisioningConfig": "managed",
    "FiretitanSamplingClient": "sampling",
    "FiretitanSamplingParams": "types",
    "FiretitanServiceClient": "service",
    "FiretitanTrainingClient": "training",
    "FireworksClient": "fireworks_client",
    "FixedConcurrencyController": "concurrency",
    "GradAccNormalization": "types",
    "GradNormMetricsMode": "constants",
    "GraphExpired": "errors",
    "InternalError": "errors",
    "InvalidArgument": "errors",
    "LRSchedulerSpec": "training_spec",
    "LaneBroken": "errors",
    "LinearSchedule": "training_spec",
    "NoGradients": "errors",
    "NotFound": "errors",
    "OperationCancelled": "errors",
    "PrecedingFailed": "errors",
    "SampleChunk": "sample_stream",
    "SampleStream": "sample_stream",
    "SampledCompletion": "completions",
    "SamplingConcurrencyController": "concurrency",
    "SamplingParams": "types",
    "SamplingClientClosedError": "sdk_errors",
    "SamplingRequestError": "sdk_errors",
    "SaveSamplerResult": "types",
    "ServerMetrics": "server_metrics",
    "SessionLost": "errors",
    "SessionRestarted": "errors",
    "SnapshotNotActive": "errors",
    "StepMismatch": "errors",
    "TrainerJobConfig": "trainer_job_config",
    "TrainerJobManager": "trainer_jobs",
    "TrainerServiceEndpoint": "trainer_job_config",
    "TrainingAPIError": "errors",
    "TrainingShapeProfile": "training_profile",
    "Unauthenticated": "errors",
    "Unavailable": "errors",
    "Unsupported": "errors",
    "WSDSchedule": "training_spec",
    "WeightSyncer": "weight_syncer",
    "WeightsChanged": "errors",
    "compute_lr": "training_spec",
    "default_constant_schedule": "training_spec",
    "errors": "errors",
    "has_v1_scheduler_fields": "training_spec",
    "install_tinker_service_client": "compat.tinker_service",
    "normalize_lr_scheduler_spec": "training_spec",
    "parse_lr_scheduler_spec": "training_spec",
    "patched_tinker_service_client": "compat.tinker_service",
    "restore_tinker_service_client": "compat.tinker_service",
    "validate_output_model_id": "sdk_errors",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loaded = importlib.import_module(f"{__name__}.{module}")
    value = loaded if name == module else getattr(loaded, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
