// One channel to the daemon, and calls that survive its restart.

import {
  type CallOptions,
  type ClientUnaryCall,
  Metadata,
  type ServiceError,
  credentials,
  status,
} from "@grpc/grpc-js";
import { DeploymentServiceClient } from "../gen/firetitan/v1/deployment_service.js";
import { CheckpointServiceClient } from "../gen/firetitan/v1/checkpoint_service.js";
import { OperationServiceClient } from "../gen/firetitan/v1/operation_service.js";
import { SamplingServiceClient } from "../gen/firetitan/v1/sampling_service.js";
import { TrainingServiceClient } from "../gen/firetitan/v1/training_service.js";
import { callReason, retryAfterMs } from "./errors.js";

const DEADLINE_MS = 30_000;
const PATIENCE_MS = 300_000;
const PAUSE_MS = 100;

/** A unary method of a generated client; 64-bit fields are bigints. */
export type Method<Q, R> = (
  request: Q,
  metadata: Metadata,
  options: Partial<CallOptions>,
  callback: (error: ServiceError | null, response: R) => void,
) => ClientUnaryCall;

export function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** The services of one daemon over one channel. */
export class Connection {
  readonly training: TrainingServiceClient;
  readonly checkpoints: CheckpointServiceClient;
  readonly operations: OperationServiceClient;
  readonly deployments: DeploymentServiceClient;
  readonly sampling: SamplingServiceClient;

  /** `address` is the one in `daemon.json`, e.g. `unix:/home/me/.firetitan/run/firetitan.sock`. */
  constructor(address: string) {
    const options = {
      "grpc.max_receive_message_length": -1,
      "grpc.max_send_message_length": -1,
      // A restarted daemon is found within a quarter of a second.
      "grpc.initial_reconnect_backoff_ms": 50,
      "grpc.max_reconnect_backoff_ms": 250,
    };
    const insecure = credentials.createInsecure();
    this.training = new TrainingServiceClient(address, insecure, options);
    this.checkpoints = new CheckpointServiceClient(address, insecure, options);
    this.operations = new OperationServiceClient(address, insecure, options);
    this.deployments = new DeploymentServiceClient(address, insecure, options);
    this.sampling = new SamplingServiceClient(address, insecure, options);
  }

  close(): void {
    this.training.close();
    this.checkpoints.close();
    this.operations.close();
    this.deployments.close();
    this.sampling.close();
  }
}

/**
 * The same request, again while the daemon is away, for five minutes at most.
 *
 * Only what cannot have changed anything twice may pass here: reads, and requests with a
 * request id.
 */
export async function call<Q, R>(method: Method<Q, R>, request: Q): Promise<R> {
  const giveUp = Date.now() + PATIENCE_MS;
  for (;;) {
    try {
      return await once(method, request);
    } catch (error) {
      const pause = pauseBefore(error as ServiceError);
      if (pause === undefined || Date.now() + pause > giveUp) throw error;
      await sleep(pause);
    }
  }
}

function once<Q, R>(method: Method<Q, R>, request: Q): Promise<R> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + DEADLINE_MS };
    method(request, new Metadata(), options, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

/**
 * Whether a call ended because the daemon went away in the middle of it. CANCELLED is what a daemon
 * that ends leaves of a call: ask only where we did not cancel it ourselves.
 */
export function brokenOff(error: ServiceError): boolean {
  return error.code === status.UNAVAILABLE || error.code === status.CANCELLED;
}

/** Milliseconds to wait before the same request is sent again; undefined where it must not be. */
function pauseBefore(error: ServiceError): number | undefined {
  if (brokenOff(error) || error.code === status.DEADLINE_EXCEEDED) {
    return retryAfterMs(error) ?? PAUSE_MS;
  }
  return error.code === status.RESOURCE_EXHAUSTED ? retryAfterMs(error) : undefined;
}

/** One line for people: what was refused and why. */
export function describe(error: ServiceError): string {
  return `${status[error.code]} ${callReason(error) ?? ""}: ${error.details}`;
}
