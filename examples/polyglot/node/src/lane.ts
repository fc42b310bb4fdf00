// One client's order of commands in a session that others use too.

import { randomUUID } from "node:crypto";
import type { ClientDuplexStream, ServiceError } from "@grpc/grpc-js";
import type { CommandHeader } from "../gen/firetitan/v1/command.js";
import type { Operation } from "../gen/firetitan/v1/operation.js";
import type {
  WatchOperationsRequest,
  WatchOperationsResponse,
} from "../gen/firetitan/v1/operation_service.js";
import type { Session } from "../gen/firetitan/v1/session.js";
import { type Connection, type Method, brokenOff, call, sleep } from "./connection.js";
import { OperationError } from "./errors.js";

type Answer = { operation?: Operation | undefined };
type Command = { header?: CommandHeader | undefined };
type Waiter = { resolve: (operation: Operation) => void; reject: (error: unknown) => void };
type Watch = ClientDuplexStream<WatchOperationsRequest, WatchOperationsResponse>;

/** A command that was accepted. It runs to its end whatever becomes of this process. */
export class Pending {
  readonly seq: bigint;
  readonly name: string;
  private readonly ended: Promise<Operation>;
  private readonly lane: Lane;

  constructor(lane: Lane, operation: Operation, ended: Promise<Operation>) {
    this.lane = lane;
    this.seq = operation.seq;
    this.name = operation.name;
    this.ended = ended;
  }

  /** The operation once it is done. Throws OperationError, and has then been seen by the user. */
  async result(): Promise<Operation> {
    const operation = await this.ended;
    if (operation.error === undefined) return operation;
    this.lane.sawFailure(this.seq);
    throw new OperationError(operation.method, operation.error);
  }
}

/** A lane: commands run in the order in which they were sent, results come in that order. */
export class Lane {
  readonly session: Session;
  private readonly connection: Connection;
  private readonly clientId: string;
  private readonly waiting = new Map<bigint, Waiter>();
  private nextSeq: bigint;
  private endedThrough: bigint;
  private seenFailure = 0n;
  private sending: Promise<unknown> = Promise.resolve();
  private watch: Watch | undefined;
  private closed = false;

  private constructor(connection: Connection, clientId: string, session: Session, next: bigint) {
    this.connection = connection;
    this.clientId = clientId;
    this.session = session;
    this.nextSeq = next;
    this.endedThrough = next - 1n;
    this.follow().catch((error: unknown) => this.abandon(error));
  }

  /** Open a lane of our own. `name` is a session, or a trainer that has one open session. */
  static async attach(connection: Connection, name: string): Promise<Lane> {
    const clientId = randomUUID();
    const training = connection.training;
    const answer = await call(training.attachSession.bind(training), {
      name,
      clientId,
      baseModel: "",
      lora: undefined,
      seed: undefined,
    });
    if (answer.session === undefined) throw new Error("AttachSession answered without a session");
    return new Lane(connection, clientId, answer.session, answer.nextSeq);
  }

  /** Send a command behind those sent before; returns once it is accepted. */
  send<Q extends Command, R extends Answer>(method: Method<Q, R>, request: Q): Promise<Pending> {
    // Read now: what the user has seen when making this call decides whether it may run.
    const seenFailure = this.seenFailure;
    const accepted = this.sending.then(() => this.submit(method, request, seenFailure));
    this.sending = accepted.catch(() => undefined);
    return accepted;
  }

  /** For Pending: the user has been shown that this command failed. */
  sawFailure(seq: bigint): void {
    if (seq > this.seenFailure) this.seenFailure = seq;
  }

  close(): void {
    this.closed = true;
    this.watch?.cancel();
  }

  private async submit<Q extends Command, R extends Answer>(
    method: Method<Q, R>,
    request: Q,
    seenFailure: bigint,
  ): Promise<Pending> {
    const seq = this.nextSeq;
    const header: CommandHeader = {
      session: this.session.name,
      epoch: this.session.epoch,
      clientId: this.clientId,
      seq,
      requestId: randomUUID(),
      part: 0,
      parts: 0,
      seenFailure,
    };
    const ended = this.expect(seq);
    try {
      const { operation } = await call(method, { ...request, header });
      if (operation === undefined) throw new Error("the daemon answered without an operation");
      this.nextSeq = seq + 1n;
      return new Pending(this, operation, ended);
    } catch (error) {
      // Refused: nothing was accepted, the next command takes this number.
      this.waiting.delete(seq);
      throw error;
    }
  }

  /** What the watch will bring for `seq`. */
  private expect(seq: bigint): Promise<Operation> {
    const ended = new Promise<Operation>((resolve, reject) => {
      this.waiting.set(seq, { resolve, reject });
    });
    // Whoever awaits it is told; a result that nobody asks for is no unhandled rejection.
    ended.catch(() => undefined);
    return ended;
  }

  private abandon(error: unknown): void {
    for (const waiter of this.waiting.values()) waiter.reject(error);
    this.waiting.clear();
    this.closed = true;
  }

  /** Read results as they come, in the order of seq; open the stream again when it breaks. */
  private async follow(): Promise<void> {
    while (!this.closed) {
      const operations = this.connection.operations;
      const stream: Watch = operations.watchOperations();
      this.watch = stream;
      try {
        stream.write(this.progress({ session: this.session.name, clientId: this.clientId }));
        for await (const response of stream as AsyncIterable<WatchOperationsResponse>) {
          if (response.operation) await this.take(response.operation, stream);
        }
      } catch (error) {
        if (!this.closed && !brokenOff(error as ServiceError)) throw error;
      }
      if (!this.closed) await sleep(100);
    }
  }

  private async take(streamed: Operation, stream: Watch): Promise<void> {
    let operation = streamed;
    if (operation.resultOmitted) {
      const operations = this.connection.operations;
      const { name } = operation;
      operation = (await call(operations.getOperation.bind(operations), { name })).operation!;
    }
    this.endedThrough = operation.seq;
    this.waiting.get(operation.seq)?.resolve(operation);
    this.waiting.delete(operation.seq);
    // The daemon may drop the bytes of what we have.
    stream.write(this.progress({ ackedThrough: this.endedThrough }));
  }

  private progress(fields: Partial<WatchOperationsRequest>): WatchOperationsRequest {
    const { endedThrough } = this;
    return { session: "", clientId: "", ackedThrough: 0n, afterSeq: endedThrough, ...fields };
  }
}
