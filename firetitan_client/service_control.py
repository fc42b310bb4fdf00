"""A service's part of the control plane: what was saved, and what becomes a model.

Knows: FireworksClient. Must not know: sessions, samples.
"""

from __future__ import annotations

from typing import Any

from firetitan_client.fireworks_client import FireworksClient
from firetitan_client.service_core import ServiceCore


class ControlCalls(ServiceCore):
    """The part of a service that looks after what trainers saved."""

    def list_checkpoints(self, job_id: str, *, page_size: int = 200) -> list[dict[str, Any]]:
        """See `FireworksClient.list_checkpoints`.

        Raises:
            RuntimeError: Nothing was provisioned yet.
        """
        return self._control("list_checkpoints").list_checkpoints(job_id, page_size=page_size)

    def promote_checkpoint(
        self,
        job_id: str | None = None,
        checkpoint_id: str | None = None,
        output_model_id: str | None = None,
        base_model: str | None = None,
        *,
        name: str | None = None,
        hot_load_deployment_id: str | None = None,
    ) -> dict[str, Any]:
        """See `FireworksClient.promote_checkpoint`.

        Raises:
            RuntimeError: Nothing was provisioned yet.
        """
        return self._control("promote_checkpoint").promote_checkpoint(
            job_id,
            checkpoint_id,
            output_model_id,
            base_model,
            name=name,
            hot_load_deployment_id=hot_load_deployment_id,
        )

    def _control(self, call: str) -> FireworksClient:
        if self._managed and self._provisioner.trainer is None:
            raise RuntimeError(
                f"{call}: nothing is provisioned yet; create a client first, or use "
                f"FireworksClient().{call}"
            )
        return FireworksClient._on(self._transport)
