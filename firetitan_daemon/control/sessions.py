"""Sessions: opening, joining, finding them; each has a pipeline of its own.

Knows: session records, which settings two clients must agree on. Must not know: how commands run.
"""

from __future__ import annotations

import asyncio
import functools
import random
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.commands import CommandPipeline
from firetitan_daemon.control.recovery import RecoveryStats
from firetitan_daemon.control.services import Services, when_there_is_space
from firetitan_daemon.control.session_settings import Wanted, check_same, check_trainer
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import BaseFacts
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import Lane, Operation, Session, SessionState, Trainer
from firetitan_daemon.core.sequencer import SessionSequencer
from firetitan_daemon.core.texts import check_text
from firetitan_daemon.core.worker_ports import Worker

_ANSWER_S = 20.0
"""How long who opens or closes a session waits for a worker before it is told that it does."""


class SessionManager:
    """Every session by name.

    Owns the map of pipelines. A trainer has one open session at a time, or, with `max_lora_rank`,
    as many as are asked for.
    """

    def __init__(self, services: Services, checkpoints: CheckpointManager) -> None:
        self._services = services
        self._checkpoints = checkpoints
        self._pipelines: dict[str, CommandPipeline] = {}
        self._opening: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One a trainer: a worker that hangs holds up no other trainer's sessions."""
        self._closings: Counter[str] = Counter()
        """How often the sessions of each trainer were closed for good."""
        self._left: Counter[str] = Counter()
        """How often each trainer's worker was left: what is opened in it goes on in another."""
        self._made: dict[str, str] = {}
        self._refusal: FiretitanError | None = None
        self._used: Callable[[str], None] = lambda trainer_id: None

    def connect(self, used: Callable[[str], None]) -> None:
        """Say whom to tell that somebody uses a trainer, by its id; may raise why it cannot be."""
        self._used = used

    async def restore(self, ledger: Ledger) -> None:
        """Take over the sessions of a former daemon; they answer RECOVERING until `resume`."""
        for session in ledger.sessions:
            lanes = [lane for lane in ledger.lanes if lane.session == session.name]
            operations = [one for one in ledger.open_operations if one.target == session.name]
            for lane in lanes:
                # Cancelled while they were held: the lane must not wait for them.
                operations += await self._services.store.lane_operations(
                    session.name, lane.client_id, lane.next_seq - 1
                )
            if session.state is SessionState.ACTIVE:
                session = replace(session, state=SessionState.RECOVERING)
            sequencer = SessionSequencer.restore(
                session, lanes, operations, self._services.clock.monotonic()
            )
            pipeline = self._pipeline(session, sequencer)
            pipeline.recovery.restore(
                [one for one in ledger.recovery_points if one.session == session.name],
                [one for one in ledger.kept_operations if one.target == session.name],
            )
            self._pipelines[session.name] = pipeline
            self._made[session.request_id] = session.name

    async def create(
        self, trainer: Trainer, worker: Worker, wanted: Wanted, request_id: str
    ) -> tuple[Session, bool]:
        """Open the trainer's session, or return the open one where the settings agree.

        On a trainer that has many, each request opens another.

        Returns:
            The session, and whether this request opened it.

        Raises:
            FiretitanError: INVALID_ARGUMENT or ALREADY_EXISTS naming the setting that differs.
        """
        check_trainer(trainer, wanted)
        check_text(request_id, "request_id")
        # A caller that goes away must not leave a session that only the worker knows of.
        seen = (self._closings[trainer.id], self._left[trainer.id])
        opening = asyncio.create_task(self._create(trainer, worker, wanted, request_id, *seen))
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asyncio.shield(opening)
        except TimeoutError:
            raise FiretitanError(
                Reason.RECOVERING,
                f"{trainer.name}: its worker lives and has not answered for {_ANSWER_S:g} s; the "
                "session is opened when it does, send the request again",
                retry_after_s="0.5",
            ) from None

    async def _create(
        self,
        trainer: Trainer,
        worker: Worker,
        wanted: Wanted,
        request_id: str,
        closings: int,
        left: int,
    ) -> tuple[Session, bool]:
        async with self._opening[trainer.id]:
            for pipeline in self._candidates(trainer, request_id):
                check_same(pipeline.session, wanted, Reason.ALREADY_EXISTS)
                if pipeline.session.state is SessionState.LOST:
                    await pipeline.reopen(worker)
                    await self._start(pipeline, worker, left)
                    self._made[request_id] = pipeline.session.name
                made = self._made.get(request_id) == pipeline.session.name
                return pipeline.current, made and bool(request_id)
            session = self._new_session(trainer, wanted, request_id)
            # The row first: a daemon that dies here finds the session and opens it then.
            await self._services.operations.write(Change(sessions=[session], durable=True))
            try:
                await worker.open_session(session)
                if self._closings[trainer.id] != closings:
                    raise FiretitanError(
                        Reason.CLOSED, f"{trainer.name} was deleted while its session was opened"
                    )
            except FiretitanError:
                closed = replace(session, state=SessionState.CLOSED)
                await self._services.operations.write(Change(sessions=[closed]))
                raise
            pipeline = self._pipeline(session, SessionSequencer(session.name))
            if self._refusal is not None:
                pipeline.refuse(self._refusal)
            self._pipelines[session.name] = pipeline
            await self._start(pipeline, worker, left)
            self._made[request_id] = session.name
            return session, True

    async def _start(self, pipeline: CommandPipeline, worker: Worker, left: int) -> None:
        """Begin with a session that was opened; `resume` does where its worker was left since."""
        if self._left[pipeline.session.trainer_id] == left:
            pipeline.start(worker)
        else:
            await pipeline.suspend()

    def attach(self, name: str, client_id: str, wanted: Wanted) -> tuple[Session, Lane]:
        """Open or resume a lane; changes no weights.

        Args:
            name: A session, or a trainer that has exactly one.
            client_id: The lane.
            wanted: Settings to insist on.

        Raises:
            FiretitanError: SESSION_NOT_FOUND, INVALID_ARGUMENT naming the setting that differs,
                LANE_BROKEN, RECOVERING.
        """
        pipeline = self._find(name)
        self._used(pipeline.session.trainer_id)
        check_same(pipeline.session, wanted, Reason.INVALID_ARGUMENT)
        lane = pipeline.attach(client_id)
        return pipeline.current, lane

    def get(self, name: str) -> Session:
        """One session.

        Raises:
            FiretitanError: NAME_INVALID, SESSION_NOT_FOUND.
        """
        return self._find(name).current

    def all(self, parent: str) -> list[Session]:
        """Sessions, all or of one trainer, by name."""
        trainer = names.parse_trainer(parent, "parent") if parent else None
        return sorted(
            (
                pipeline.current
                for pipeline in self._pipelines.values()
                if trainer in (None, pipeline.session.trainer_id)
            ),
            key=lambda session: names.natural_key(session.name),
        )

    def of_trainer(self, trainer: Trainer) -> Session | None:
        """The open session of a trainer that has one at a time."""
        for pipeline in self._of_trainer(trainer.id):
            return None if trainer.max_lora_rank else pipeline.current
        return None

    async def submit(self, header: Header, method: str, payload: bytes) -> Operation:
        """Accept a command; see `CommandPipeline.submit`."""
        pipeline = self._find(header.session, "header.session")
        self._used(pipeline.session.trainer_id)
        return await pipeline.submit(header, method, payload)

    async def cancel(self, operation: Operation) -> Operation:
        """Cancel an operation that has not started; one that has goes on."""
        pipeline = self._pipelines.get(operation.target)
        if pipeline is None or operation.done:
            return operation
        # Begun, it is finished: half of it would be a command that runs and is told cancelled.
        return await asyncio.shield(asyncio.create_task(pipeline.cancel(operation)))

    async def suspend(self, trainer_id: str) -> None:
        """The trainer's worker is gone: its sessions wait for another."""
        self._left[trainer_id] += 1
        for pipeline in self._of_trainer(trainer_id):
            if pipeline.session.state is not SessionState.LOST:
                await pipeline.suspend()

    async def rest(self, trainer_id: str, serves: Callable[[], bool]) -> bool:
        """Let a trainer's sessions do without a worker until `resume`.

        Args:
            trainer_id: Which.
            serves: Whether their worker is still there; else whoever replaces it lets them go on.

        Returns:
            False where they cannot: commands are open, or what the worker holds could not be
            brought back. They go on then.
        """

        def held() -> list[tuple[Session, CommandPipeline]]:
            return [
                (pipeline.session, pipeline)
                for pipeline in self._of_trainer(trainer_id)
                if pipeline.session.state is not SessionState.LOST
            ]

        asked = held()
        for session, pipeline in asked:
            if not await pipeline.recovery.can_rebuild(session):
                return False
        # Another session or another command than were asked about: it is in use.
        if self.busy(trainer_id) or not serves() or held() != asked:
            return False
        self._left[trainer_id] += 1
        # All at once: what one would do while another is suspended would go with the worker.
        await asyncio.gather(*(pipeline.suspend() for _, pipeline in asked))
        return True

    def busy(self, trainer_id: str) -> bool:
        """Whether commands of a trainer's sessions are being accepted, wait or run."""
        return any(pipeline.busy for pipeline in self._of_trainer(trainer_id))

    def broken(self, name: str) -> bool:
        """Whether a session runs nothing any more: what is open ends when it is closed."""
        pipeline = self._pipelines.get(name)
        return pipeline is not None and pipeline.broken

    async def resume(self, trainer_id: str, worker: Worker, *, exact: bool) -> None:
        """Go on with a trainer's sessions on its adopted worker, or on a new one.

        Args:
            trainer_id: Which.
            worker: With the model loaded.
            exact: Whether a replay must come out bit for bit.

        Raises:
            FiretitanError: SESSION_LOSS where one cannot be brought back; WORKER_UNAVAILABLE where
                the worker ended meanwhile.
        """
        await self._opened(trainer_id)
        recovering = [
            pipeline
            for pipeline in self._of_trainer(trainer_id)
            if pipeline.session.state is SessionState.RECOVERING
        ]
        for pipeline in recovering:
            try:
                await pipeline.resume(worker, exact=exact)
            except FiretitanError as error:
                if error.reason is not Reason.SESSION_LOSS or len(recovering) == 1:
                    raise
                # Its neighbours go on without it.
                lose = functools.partial(pipeline.lose, error.message)
                await when_there_is_space(pipeline.session.name, lose)
                await worker.close_session(pipeline.session.name)

    async def _opened(self, trainer_id: str) -> None:
        """Wait for what is still being opened in a worker that is gone; none is any more then."""
        async with self._opening[trainer_id]:
            pass

    def recovered(self, trainer_id: str, seconds: float, start_s: float) -> None:
        """A worker of the trainer was replaced: count it (see `SessionRecovery.recovered`)."""
        for pipeline in self._of_trainer(trainer_id):
            pipeline.recovery.recovered(seconds, start_s)

    def recoveries(self) -> list[tuple[Session, RecoveryStats]]:
        """How well each open session is kept against its worker's death."""
        return [
            (pipeline.session, pipeline.recovery.stats)
            for pipeline in self._pipelines.values()
            if pipeline.session.state is not SessionState.CLOSED
        ]

    async def lose(self, trainer_id: str, cause: str) -> None:
        """The trainer's worker is gone."""
        await self._opened(trainer_id)
        for pipeline in self._of_trainer(trainer_id):
            if pipeline.session.state is not SessionState.LOST:
                await when_there_is_space(
                    pipeline.session.name, functools.partial(pipeline.lose, cause)
                )

    async def close(self, name: str) -> None:
        """Finish what a session accepted, free it in its worker, close it for good.

        Raises:
            FiretitanError: SESSION_NOT_FOUND; RECOVERING; UNSUPPORTED where it trains every
                parameter: those are its trainer's weights.
        """
        pipeline = self._find(name)
        session = pipeline.session
        if session.lora.rank == 0 and not session.forward_only:
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"{session.name} trains every parameter of its trainer; delete the trainer instead",
            )
        if session.state is SessionState.RECOVERING:
            # A stopped trainer is started again: what was accepted runs, and is freed, in a worker.
            self._used(session.trainer_id)
        if session.state is not SessionState.CLOSED:
            await asyncio.shield(asyncio.create_task(pipeline.unload(_ANSWER_S)))

    async def close_trainer(self, trainer_id: str) -> None:
        """Finish what a trainer's sessions accepted and close them; one being opened fails."""
        self._closings[trainer_id] += 1
        for pipeline in self._of_trainer(trainer_id):
            await pipeline.close()

    def forget(self, trainer_id: str) -> None:
        """Drop the closed sessions of a trainer whose rows are gone."""
        for name in [
            name
            for name, pipeline in self._pipelines.items()
            if pipeline.session.trainer_id == trainer_id
        ]:
            del self._pipelines[name]

    def refuse(self, error: FiretitanError) -> None:
        """Answer every further command with an error; accepted ones go on."""
        self._refusal = error
        for pipeline in self._pipelines.values():
            pipeline.refuse(error)

    async def pause(self, timeout_s: float) -> None:
        """Let running commands end and start no others."""
        await asyncio.gather(*(one.pause(timeout_s) for one in self._pipelines.values()))

    async def expire(self) -> None:
        """Close lanes whose missing command is overdue."""
        for pipeline in list(self._pipelines.values()):
            await pipeline.expire()

    def _find(self, name: str, field_path: str = "name") -> CommandPipeline:
        pipeline = self._pipelines.get(name)
        if pipeline is not None:
            return pipeline
        if "/sessions/" in name:
            names.parse_session(name, field_path)
            raise FiretitanError(
                Reason.SESSION_NOT_FOUND, f"{field_path}: {name} does not exist", field=field_path
            )
        trainer = names.parse_trainer(name, field_path)
        found = self._of_trainer(trainer)
        if len(found) > 1:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"{field_path}: trainers/{trainer} has {len(found)} sessions; name one of them",
                field=field_path,
            )
        for pipeline in found:
            return pipeline
        raise FiretitanError(
            Reason.SESSION_NOT_FOUND,
            f"{field_path}: trainers/{trainer} has no open session; open one first",
            field=field_path,
        )

    def _of_trainer(self, trainer_id: str) -> Sequence[CommandPipeline]:
        return [
            pipeline
            for pipeline in self._pipelines.values()
            if pipeline.session.trainer_id == trainer_id
            and pipeline.session.state is not SessionState.CLOSED
        ]

    def _candidates(self, trainer: Trainer, request_id: str) -> Sequence[CommandPipeline]:
        """The session a request may mean, instead of a new one."""
        found = self._of_trainer(trainer.id)
        if trainer.max_lora_rank:
            made = self._made.get(request_id) if request_id else None
            found = [pipeline for pipeline in found if pipeline.session.name == made]
        return found

    def _pipeline(self, session: Session, sequencer: SessionSequencer) -> CommandPipeline:
        return CommandPipeline(session, sequencer, self._services, self._checkpoints)

    def _new_session(self, trainer: Trainer, wanted: Wanted, request_id: str) -> Session:
        suffixes = {pipeline.session.suffix for pipeline in self._pipelines.values()}
        suffix = uuid.uuid4().hex[:8]
        while suffix in suffixes:
            suffix = uuid.uuid4().hex[:8]
        return Session(
            name=names.session_name(trainer.id, suffix),
            trainer_id=trainer.id,
            base_model=trainer.base_model,
            lora=wanted.lora(trainer),
            seed=random.getrandbits(31) if wanted.seed is None else wanted.seed,
            suffix=suffix,
            state=SessionState.ACTIVE,
            create_time=self._services.clock.now(),
            user_metadata=wanted.user_metadata,
            base=self._base_facts(trainer),
            forward_only=trainer.forward_only or wanted.forward_only,
            request_id=request_id,
        )

    def _base_facts(self, trainer: Trainer) -> BaseFacts:
        model = trainer.model
        if model is None:
            return BaseFacts()
        tokenizer = model.path
        if model.source == "hub":
            tokenizer = self._services.models.reference(trainer.base_model).partition("@")[0]
        return BaseFacts(model.fingerprint, model.revision, tokenizer)
