"""`make fuzz`: bytes that find new ways through the code that reads and checks, for some minutes.

The daemon and its toy worker run in this process, so that what a request reaches counts as covered.
The first byte says what the others go to: an RPC, a file, or a function that reads names. Whatever
is not a refusal by reason is a finding: it is kept in `out/fuzz` and ends the run. A finding gets a
test of its own name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto"), str(ROOT / "tests")]

with atheris.instrument_imports(include=["firetitan_daemon", "firetitan_client"]):
    from firetitan.v1 import sampling_service_pb2, tensor_pb2, training_service_pb2
    from google.protobuf.message import DecodeError
    from google.protobuf.message_factory import GetMessageClass
    from support.adapters import write_toy
    from support.hostile import methods
    from support.hostile_world import GOOD, World, name_of, tamed

    from firetitan_client import address, errors, references
    from firetitan_client.sampler_handles import SamplerHandle
    from firetitan_daemon import durable
    from firetitan_daemon.app import Daemon
    from firetitan_daemon.config import load_config
    from firetitan_daemon.core import model_names, names
    from firetitan_daemon.core.errors import FiretitanError
    from firetitan_daemon.engine.peft import read_adapter
    from firetitan_daemon.engine.raw import read_safetensors
    from firetitan_daemon.launch.in_process import InProcessLauncher
    from firetitan_daemon.rpc.binding import is_command
    from firetitan_daemon.rpc.tcp import check_location
    from firetitan_daemon.worker import convert, convert_sampling

METHODS = [method for method in methods() if name_of(method) != "SystemService/Drain"]
ENDING = ("Delete", "Close", "Scale", "HoldLease", "ReleaseLease", "Export", "Promote")
"""RPCs that end, remove or copy a thing; never sent with the name of one that is there."""
NAMES = (
    names.parse_trainer, names.parse_session, names.parse_checkpoint, names.parse_snapshot,
    names.parse_saved, names.parse_checkpoint_reference, names.parse_operation,
    model_names.parse_model_id,
)  # fmt: skip
REFERENCES: tuple[Callable[[Any], Any], ...] = (
    references.check_name, references.checkpoint_reference, references.adapter_reference,
    references.parse_tinker_path, references.snapshot_reference, references.snapshot_kind,
    SamplerHandle.parse, address.resolve,
)  # fmt: skip


class InThisProcess:
    """A daemon on a loop of its own in this process."""

    def __init__(self, home: Path) -> None:
        self.home, self.process = home, self
        self.pid, self.address = os.getpid(), ""
        serving = threading.Event()
        threading.Thread(target=asyncio.run, args=(self._run(serving),), daemon=True).start()
        assert serving.wait(60), "the daemon does not serve"

    def poll(self) -> int | None:
        """It runs for as long as this process does."""
        return None

    async def _run(self, serving: threading.Event) -> None:
        config, _ = load_config(home=self.home, environment={"FIRETITAN_LIMITS_GAP_TIMEOUT_S": "1"})
        daemon = Daemon(config, InProcessLauncher(self.home / "w"))
        self.address = await daemon.start()
        serving.set()
        await asyncio.Event().wait()


class Target:
    """What bytes are given to."""

    def __init__(self, folder: Path) -> None:
        self._world = World(InThisProcess(folder / "home"), None)
        self._live = [b"toy", b"served", b"kept", b"hostile"]
        self._adapter = write_toy(folder / "adapter")
        self._sealed = folder / "sealed"
        self._sealed.mkdir()
        durable.seal_folder(self._sealed, {"kind": "state"})
        self._files: list[Callable[[bytes], object]] = [
            self._peft, self._safetensors, self._manifest, self._names, self._references,
            self._values, self._sampling, self._status, self._location,
        ]  # fmt: skip

    def seeds(self) -> list[bytes]:
        """A good input for each RPC and each kind of file."""
        requests = [GOOD[name_of(method)](self._world.toy) for method in METHODS]
        texts = ["trainers/t/sessions/s/checkpoints/c", "cross_job://t/c", "snapshots/s"]
        files = [
            (self._adapter / "adapter_config.json").read_bytes(),
            (self._adapter / "adapter_model.safetensors").read_bytes(),
            (self._sealed / durable.MANIFEST).read_bytes(),
            texts[0].encode(), texts[1].encode(),
            GOOD["TrainingService/Forward"](self._world.toy).SerializeToString(),
            GOOD["SamplingService/Sample"](self._world.toy).SerializeToString(),
            b"",
            bytes(self._adapter),
        ]  # fmt: skip
        bodies = [request.SerializeToString() for request in requests] + files
        return [bytes([index]) + body for index, body in enumerate(bodies)]

    def __call__(self, data: bytes) -> None:
        """One input; what it raises is a finding."""
        if not data:
            return
        which, body = data[0] % (len(METHODS) + len(self._files)), data[1:]
        if which < len(METHODS):
            self._rpc(METHODS[which], body)
            return
        try:
            self._files[which - len(METHODS)](body)
        except (FiretitanError, errors.FiretitanError):
            return

    def _rpc(self, method: Any, body: bytes) -> None:
        if method.name.startswith(ENDING) and any(name in body for name in self._live):
            return
        site = self._world.toy
        if is_command(method):
            # Behind a header that is right; a second one is merged into it.
            empty = GetMessageClass(method.input_type)()
            body = site.new_lane().header(empty).SerializeToString() + body
        elif method.name.startswith("Create"):
            body = tamed(method, body, GOOD[name_of(method)](site))
        self._world.outcome(method, body)

    def _peft(self, body: bytes) -> None:
        (self._adapter / "adapter_config.json").write_bytes(body)
        read_adapter(self._adapter)

    def _safetensors(self, body: bytes) -> None:
        path = self._adapter / "other.safetensors"
        path.write_bytes(body)
        read_safetensors(path)

    def _manifest(self, body: bytes) -> None:
        (self._sealed / durable.MANIFEST).write_bytes(body)
        durable.verify_folder(self._sealed)

    def _names(self, body: bytes) -> None:
        text = body.decode("utf-8", "replace")
        for parse in NAMES:
            try:
                parse(text)
            except FiretitanError:
                continue

    def _references(self, body: bytes) -> None:
        text = body.decode("utf-8", "replace")
        for parse in REFERENCES:
            try:
                parse(text)
            except (ValueError, errors.FiretitanError):
                continue

    def _values(self, body: bytes) -> None:
        request = _parsed(training_service_pb2.ForwardBackwardRequest, body)
        convert.data_from_proto(request.data)
        convert.loss_config_from_proto(request.loss_fn_config)
        step = _parsed(training_service_pb2.OptimStepRequest, body)
        convert.adam_params_from_proto(step)
        convert.tensor_from_proto(_parsed(tensor_pb2.Tensor, body), "tensor")

    def _sampling(self, body: bytes) -> None:
        request = _parsed(sampling_service_pb2.SampleRequest, body)
        request.params.seed = 1
        convert_sampling.sample_request_from_proto(request, (), 64)

    def _status(self, body: bytes) -> None:
        from google.rpc import status_pb2

        errors.from_status(_parsed(status_pb2.Status, body))

    def _location(self, body: bytes) -> None:
        """What may be named over TCP is below the root, or a name that is no path."""
        text, root = body.decode("utf-8", "surrogateescape"), self._adapter.parent
        check_location("adapter", text, (root,))
        if text.startswith("/"):
            assert Path(text).resolve().is_relative_to(root.resolve()), text


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        return kind()


def main() -> None:
    """Fuzz until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz")
    parser.add_argument("inputs", nargs="*", help="findings to run again, instead of fuzzing")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    corpus = given.out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ft-fuzz-") as folder:
        target = Target(Path(folder))
        for index, seed in enumerate(target.seeds()):
            (corpus / f"seed-{index}").write_bytes(seed)
        print(json.dumps({"rpcs": len(METHODS), "seconds": given.seconds}))
        if given.inputs:
            for one in given.inputs:
                target(Path(one).read_bytes())
            return
        options = [
            f"-max_total_time={given.seconds}", f"-artifact_prefix={given.out}/", "-timeout=60",
            "-max_len=4096", "-len_control=0", "-rss_limit_mb=4096", "-print_final_stats=1",
            str(corpus),
        ]  # fmt: skip
        atheris.Setup([sys.argv[0], *options], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
