"""Workers as processes of this machine that outlive the daemon.

Knows: exec, bundles, identity. Must not know: what a worker computes. A worker gets a session of
its own, a log file (a pipe would end it with the daemon), no descriptor of ours and a scrubbed
environment; threads and malloc are set before its first import.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from firetitan_daemon import handshake
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import WorkerSpec
from firetitan_daemon.disk_errors import cannot_write
from firetitan_daemon.launch import convert, identity
from firetitan_daemon.launch.bundle import (
    Bundle,
    BundleError,
    BundleUnreadableError,
    sweep_logs,
)
from firetitan_daemon.launch.process import OsProcess, adopt_child
from firetitan_daemon.launch.remote import RemoteWorker

START_TIMEOUT_S = 60.0
START_POLL_S = 0.02
LOST_SOCKET_S = 30.0
"""More than a worker takes to end after its socket went; time to bring a moved folder back."""
TRIM_THRESHOLD_BYTES = 1 << 30

PASSED_NAMES = frozenset(
    {"HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV"}
)
PASSED_PREFIXES = (
    "CUDA_",
    "FIRETITAN_",
    "GOMP_",
    "HF_",
    "HUGGINGFACE_",
    "KMP_",
    "LC_",
    "LD_",
    "MKL_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "REQUESTS_",
    "SSL_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "XDG_",
)
SECRET_WORDS = frozenset({"KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS"})
"""A variable with one of these between the underscores of its name stays behind."""
HUB_TOKENS = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"})
"""But for these: the worker is who downloads from the hub."""
PROXIES = frozenset({"http_proxy", "https_proxy", "no_proxy", "all_proxy"})

_OF_THE_DISK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT}
)
"""Errors that last until someone sees to the disk, or puts a folder that is gone back in its place;
others are of the moment, such as no memory."""

log = logging.getLogger(__name__)


class LocalLauncher:
    """Starts, finds and forgets worker processes (see `core.worker_ports.WorkerLauncher`).

    Args:
        workers: Folder of the bundles, `$FIRETITAN_HOME/workers`.
        run: Folder of the sockets, short and this user's alone.
        start_timeout_s: How long a start may take until the worker serves.
        lost_socket_s: How long a live worker is waited for on whose socket nobody listens.
    """

    def __init__(
        self,
        workers: Path,
        run: Path,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        lost_socket_s: float = LOST_SOCKET_S,
    ) -> None:
        self._workers = workers
        self._run = run
        self._start_timeout_s = start_timeout_s
        self._lost_socket_s = lost_socket_s
        self._lost: dict[str, float] = {}
        """Starts of workers that live and on whose socket nobody listens; since when, monotonic."""

    async def launch(self, spec: WorkerSpec) -> RemoteWorker:
        """Start a worker and wait until it serves (not until its model is loaded).

        Raises:
            FiretitanError: ALREADY_EXISTS where it runs already; WORKER_UNAVAILABLE, with the end
                of its log, where it died or did not serve in time, or where this machine could
                start none; STATE_DISK_FULL or STATE_NOT_WRITABLE. No process is left then.
        """
        bundle = Bundle(self._workers, spec.worker_id)
        try:
            return await self._launch(spec, bundle)
        except (BundleError, OSError) as error:
            raise _unavailable(spec, "was not started", error) from error

    async def _launch(self, spec: WorkerSpec, bundle: Bundle) -> RemoteWorker:
        incarnation = uuid.uuid4().hex
        socket = handshake.socket_path(self._run, spec.worker_id, incarnation)
        # Never what is above them: where the home is away, another would stand in its place.
        with _writing(self._run):
            self._run.mkdir(mode=0o700, exist_ok=True)
        with _writing(self._workers):
            self._workers.mkdir(mode=0o700, exist_ok=True)
            lock = bundle.lock()
        if lock is None:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"worker {spec.worker_id} runs already; adopt it or end it first",
            )
        try:
            with _writing(self._workers):
                bundle.check_owned()
                bundle.prepare(convert.spec_to_proto(spec, f"unix:{socket}", incarnation))
                output = bundle.log.open("ab")
            with output:
                process = start(spec, bundle, lock, output)
        finally:
            os.close(lock)
        try:
            await self._wait_until_serving(bundle, process)
            await identity.find_listener(bundle, process.pid, incarnation, (socket,))
            worker = await self._connect(spec, bundle, process, socket, incarnation)
        except BaseException:
            # Nobody else knows of this process.
            process.kill()
            await process.wait()
            raise
        log.info("event=launched worker=%s pid=%d", spec.worker_id, process.pid)
        return worker

    async def adopt(self, spec: WorkerSpec) -> RemoteWorker | None:
        """The live worker of a specification, or None; its identity is checked.

        A process that is not beyond doubt this worker is left alone. One that is, and that nobody
        can reach any more, is ended.

        Raises:
            FiretitanError: WORKER_UNAVAILABLE where it lives but does not answer or cannot be
                connected to, or where it could not be seen whether it lives: ask again;
                UNSUPPORTED where it speaks a protocol that this daemon does not.
        """
        bundle = Bundle(self._workers, spec.worker_id)
        try:
            worker = await self._find(spec, bundle) if bundle.locked() else None
        except (BundleUnreadableError, OSError) as error:
            # Not that it is dead: whoever asks, asks again.
            raise _unavailable(spec, "cannot be looked for", error) from error
        except BundleError as error:
            log.warning("event=not_adopted worker=%s cause=%r", spec.worker_id, str(error))
            worker = None
        if worker is not None:
            log.info("event=adopted worker=%s pid=%d", spec.worker_id, worker.pid)
        return worker

    async def _find(self, spec: WorkerSpec, bundle: Bundle) -> RemoteWorker | None:
        bundle.check_owned()
        known = bundle.read_spec()
        wanted = convert.spec_to_proto(spec, known.address, known.incarnation)
        wanted.protocol_version = known.protocol_version
        if known != wanted:
            raise BundleError("its specification is not the one that is looked for")
        sockets = identity.sockets_of(known, self._run)
        await self._wait_for_bootstrap(bundle)
        process = identity.hold(bundle)
        try:
            socket = await identity.find_listener(bundle, process.pid, known.incarnation, sockets)
            worker = await self._connect(spec, bundle, process, socket, known.incarnation)
        except identity.NobodyListensError as error:
            try:
                await self._end_lost(bundle, process, known.incarnation, error)
            finally:
                process.release()
            return None
        except BaseException:
            self._lost.pop(known.incarnation, None)
            process.release()
            raise
        self._lost.pop(known.incarnation, None)
        return worker

    async def _end_lost(
        self,
        bundle: Bundle,
        process: OsProcess,
        incarnation: str,
        error: identity.NobodyListensError,
    ) -> None:
        """End a live worker that has had no socket for long.

        It binds none again, so no daemon ever reaches it: its weights are lost whether it lives or
        not, and come back by a replay in its successor. Left alone beside that it would hold them
        a second time, for ever, and be nobody's.

        Raises:
            NobodyListensError: Not yet: it may be about to end, or its folder may come back.
            BundleError: It is not beyond doubt the worker.
        """
        identity.check_has_lock(bundle, process.pid)
        now = time.monotonic()
        if now - self._lost.setdefault(incarnation, now) < self._lost_socket_s:
            raise error
        log.error(
            "event=ended_lost worker=%s pid=%d cause=%r", bundle.worker_id, process.pid, str(error)
        )
        process.kill()
        await process.wait()
        self._lost.pop(incarnation, None)

    async def discard(self, spec: WorkerSpec) -> None:
        """Remove what is left of a dead worker but its log, and old logs; a live one is left alone.

        Raises:
            FiretitanError: STATE_NOT_WRITABLE, WORKER_UNAVAILABLE; some of it may be left.
        """
        try:
            with _writing(self._workers):
                self._discard(spec, Bundle(self._workers, spec.worker_id))
        except (BundleUnreadableError, OSError) as error:
            raise _unavailable(spec, "was not removed", error) from error
        try:
            sweep_logs(self._workers)
        except (FiretitanError, OSError) as error:
            log.warning("event=logs_left folder=%s cause=%r", self._workers, str(error))

    def _discard(self, spec: WorkerSpec, bundle: Bundle) -> None:
        if bundle.locked():
            log.warning("event=left_alone worker=%s cause='it still runs'", spec.worker_id)
            return
        for socket in self._sockets_left(spec, bundle):
            socket.unlink(missing_ok=True)
        bundle.discard()

    def _sockets_left(self, spec: WorkerSpec, bundle: Bundle) -> list[Path]:
        """Where a dead worker's socket may be; no file that no launcher would have named."""
        try:
            bundle.check_owned()
            known = bundle.read_spec()
            sockets = identity.sockets_of(known, self._run)
        except BundleUnreadableError:
            raise
        except BundleError:
            return []
        name = handshake.socket_name(spec.worker_id, known.incarnation)
        return [one for one in sockets if one.name == name]

    async def _connect(
        self, spec: WorkerSpec, bundle: Bundle, process: OsProcess, socket: Path, incarnation: str
    ) -> RemoteWorker:
        """A worker behind a socket that its process listens on, once it has answered."""
        worker = RemoteWorker(spec, process, f"unix:{socket}", tail=bundle.log_tail)
        try:
            await self._check_answer(worker, incarnation)
        except BaseException:
            await worker.close()
            raise
        return worker

    @staticmethod
    async def _check_answer(worker: RemoteWorker, incarnation: str) -> None:
        answer = await worker.describe_raw()
        found = (answer.worker_id, answer.incarnation, answer.kind)
        if found != (worker.spec.worker_id, incarnation, worker.spec.kind.value):
            raise BundleError(f"who answers calls itself {found}")
        oldest, newest = handshake.OLDEST_PROTOCOL_VERSION, handshake.PROTOCOL_VERSION
        if not oldest <= answer.protocol_version <= newest:
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"worker {worker.spec.worker_id} (pid {worker.pid}) speaks worker protocol "
                f"{answer.protocol_version}, this firetitand {oldest} to {newest}: run the release "
                "that started it, or end the process; it is left alone",
                worker=worker.spec.worker_id,
                protocol=str(answer.protocol_version),
            )

    async def _wait_for_bootstrap(self, bundle: Bundle) -> None:
        """Wait for a worker that its launcher did not see come up; one that hangs is not dead."""
        deadline = time.monotonic() + self._start_timeout_s
        while not bundle.serves():
            if not bundle.locked():
                raise BundleError("it died at its start")
            if time.monotonic() > deadline:
                raise FiretitanError(
                    Reason.WORKER_UNAVAILABLE,
                    f"worker {bundle.worker_id} lives but does not serve yet, "
                    f"{self._start_timeout_s:g} s after it was looked for",
                    worker=bundle.worker_id,
                )
            await asyncio.sleep(START_POLL_S)

    async def _wait_until_serving(self, bundle: Bundle, process: OsProcess) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not bundle.serves():
            if not process.alive:
                raise _failed_start(bundle, f"died at its start: {await process.wait()}")
            if time.monotonic() > deadline:
                raise _failed_start(bundle, f"did not serve within {self._start_timeout_s:g} s")
            await asyncio.sleep(START_POLL_S)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises what is to be waited for as what it is; tries after other errors are counted."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise cannot_write(folder, error) from error


def _unavailable(spec: WorkerSpec, what: str, error: BundleError | OSError) -> FiretitanError:
    return FiretitanError(Reason.WORKER_UNAVAILABLE, f"worker {spec.worker_id} {what}: {error}")


def start(spec: WorkerSpec, bundle: Bundle, lock: int, output: IO[bytes]) -> OsProcess:
    """Exec a worker for a prepared bundle.

    Args:
        spec: What it is for.
        bundle: Holds the specification.
        lock: The bundle's lock; the worker inherits it, never looks at it, and so holds it until
            its end, however that comes.
        output: Its log.
    """
    command = [
        sys.executable,
        "-m",
        "firetitan_daemon.worker",
        spec.kind.value,
        spec.worker_id,
        str(bundle.folder.absolute()),
    ]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=bundle.folder,
        env=environment(os.environ, spec.num_threads),
        start_new_session=True,
        close_fds=True,
        pass_fds=(lock,),
    )
    try:
        process = OsProcess(child.pid, os.pidfd_open(child.pid), bundle.read_exit)
    except BaseException:
        # Out of descriptors, say: nobody could end it any more.
        child.kill()
        child.wait()
        raise
    adopt_child(child)
    return process


def environment(ours: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """A worker's environment: what libraries need, no secrets of others, threads and malloc.

    Args:
        ours: The daemon's.
        num_threads: 0: as many as there are cores, or as OMP_NUM_THREADS says.
    """
    theirs = {
        name: value
        for name, value in ours.items()
        if name in PASSED_NAMES | HUB_TOKENS
        or (name.startswith(PASSED_PREFIXES) and not SECRET_WORDS & set(name.upper().split("_")))
        or name.lower() in PROXIES
    }
    if "PYTHONPATH" in theirs:
        # An empty entry would be whatever folder this process was started in.
        folders = filter(None, theirs["PYTHONPATH"].split(os.pathsep))
        theirs["PYTHONPATH"] = os.pathsep.join(str(Path(folder).absolute()) for folder in folders)
    threads = str(num_threads or ours.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    theirs["OMP_NUM_THREADS"] = theirs["MKL_NUM_THREADS"] = threads
    # Threads spin for about the time between two kernels and then sleep: asleep at once, a decode
    # step takes twice as long; spinning on, a machine shared with a sampler or a notebook loses
    # most of its time (a step took 10 s instead of 2 s).
    if "OMP_WAIT_POLICY" not in theirs:
        theirs.setdefault("GOMP_SPINCOUNT", "10000")
    # Activations come and go by the hundred megabytes: keep their pages instead of faulting anew.
    theirs["MALLOC_MMAP_MAX_"] = "0"
    theirs["MALLOC_TRIM_THRESHOLD_"] = str(TRIM_THRESHOLD_BYTES)
    theirs["PYTHONUNBUFFERED"] = "1"
    # Progress bars are for terminals, not for logs.
    theirs["TQDM_DISABLE"] = "1"
    return theirs


def _failed_start(bundle: Bundle, how: str) -> FiretitanError:
    tail = bundle.log_tail()
    return FiretitanError(
        Reason.WORKER_UNAVAILABLE,
        f"worker {bundle.worker_id} {how}"
        + (f"; its log ends with:\n{tail}" if tail else "; its log is empty"),
        worker=bundle.worker_id,
    )
