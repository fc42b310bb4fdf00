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
    from firetitan_client.deployment_sampler import DeploymentSampler as DeploymentSampler
    from firetitan_client.deployment_sampler import SampledCompletion as SampledCompletion
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
    from firetitan_client.futures import APIFuture as APIFuture
    from firetitan_client.managed import DeploymentCleanupOnClose as DeploymentCleanupOnClose
    from firetitan_client.managed import FiretitanProvisioningConfig as FiretitanProvisioningConfig
    from firetitan_client.sample_requests import ServerMetrics as ServerMetrics
    from firetitan_client.sampling import FiretitanSamplingClient as FiretitanSamplingClient
    from firetitan_client.service import FiretitanServiceClient as FiretitanServiceClient
    from firetitan_client.training import FiretitanTrainingClient as FiretitanTrainingClient
    from firetitan_client.types import AdamParams as AdamParams
    from firetitan_client.types import GradAccNormalization as GradAccNormalization
    from firetitan_client.types import SamplingParams as SamplingParams
    from firetitan_client.types import SaveSamplerResult as SaveSamplerResult

_EXPORTS = {
    "APIFuture": "futures",
    "Aborted": "errors",
    "AdamParams": "types",
    "AlreadyExists": "errors",
    "Busy": "errors",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE": "managed",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO": "managed",
    "ClientClosed": "errors",
    "Corrupt": "errors",
    "DaemonNotRunning": "errors",
    "DeploymentCleanupOnClose": "managed",
    "DeploymentSampler": "deployment_sampler",
    "Endpoint": "address",
    "FailedPrecondition": "errors",
    "FiretitanError": "errors",
    "FiretitanProvisioningConfig": "managed",
    "FiretitanSamplingClient": "sampling",
    "FiretitanServiceClient": "service",
    "FiretitanTrainingClient": "training",
    "GradAccNormalization": "types",
    "GraphExpired": "errors",
    "InternalError": "errors",
    "InvalidArgument": "errors",
    "LaneBroken": "errors",
    "NoGradients": "errors",
    "NotFound": "errors",
    "OperationCancelled": "errors",
    "PrecedingFailed": "errors",
    "SampledCompletion": "deployment_sampler",
    "SamplingParams": "types",
    "SaveSamplerResult": "types",
    "ServerMetrics": "sample_requests",
    "SessionLost": "errors",
    "SessionRestarted": "errors",
    "SnapshotNotActive": "errors",
    "StepMismatch": "errors",
    "TrainingAPIError": "errors",
    "Unauthenticated": "errors",
    "Unavailable": "errors",
    "Unsupported": "errors",
    "WeightsChanged": "errors",
    "errors": "errors",
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
