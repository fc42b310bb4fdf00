"""Handles of sampling clients: an address and names, to open the same sampler in another process.

Knows: what names a sampler. Must not know: how it samples. A handle holds no key.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass
from typing import Any

_PREFIX = "firetitan-sampler:"


@dataclass(frozen=True)
class SamplerHandle:
    """What a sampling client samples from."""

    address: str
    """The daemon's gRPC target."""
    deployment: str
    snapshot: str = ""
    """Of a pinned client; empty: whatever the deployment serves."""
    base_model: str = ""
    tokenizer: str = ""
    """Folder or id."""

    def __str__(self) -> str:
        content = json.dumps(asdict(self), separators=(",", ":")).encode()
        return _PREFIX + base64.urlsafe_b64encode(content).decode("ascii")

    @classmethod
    def parse(cls, text: Any) -> SamplerHandle:
        """Read a handle.

        Raises:
            ValueError: It is none.
        """
        try:
            if not str(text).startswith(_PREFIX):
                raise ValueError("it does not begin as one")
            content = base64.urlsafe_b64decode(str(text).removeprefix(_PREFIX))
            values = json.loads(content)
            handle = cls(**{name: str(value) for name, value in values.items()})
        except (binascii.Error, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"handle: is no sampler handle ({error}); pass what get_sampler_handle() returned"
            ) from None
        return handle
