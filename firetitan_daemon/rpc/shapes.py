"""ShapeService.

Knows: messages, the shapes. Must not know: rules.
"""

from __future__ import annotations

from firetitan.v1 import shape_service_pb2

from firetitan_daemon.core.shapes import DEPLOYMENT, TRAINING, Shapes
from firetitan_daemon.rpc import convert


class ShapeServicer:
    """Shows shapes."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    async def GetShape(
        self, request: shape_service_pb2.GetShapeRequest
    ) -> shape_service_pb2.GetShapeResponse:
        """The shape of a name, pinned to its version."""
        kind = DEPLOYMENT if f"/{DEPLOYMENT}/" in request.name else TRAINING
        found = self._shapes.find(kind, request.name)
        return shape_service_pb2.GetShapeResponse(shape=convert.shape(found))

    async def ListShapes(
        self, request: shape_service_pb2.ListShapesRequest
    ) -> shape_service_pb2.ListShapesResponse:
        """Built-in and configured shapes."""
        found = self._shapes.all(request.kind or TRAINING)
        return shape_service_pb2.ListShapesResponse(shapes=[convert.shape(one) for one in found])
