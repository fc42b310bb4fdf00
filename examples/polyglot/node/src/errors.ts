// Decide on reasons, never on texts: where they are in a failed call and in a failed operation.

import type { ServiceError } from "@grpc/grpc-js";
import { ErrorInfo, RetryInfo } from "../gen/google/rpc/error_details.js";
import { Status } from "../gen/google/rpc/status.js";

const DOMAIN = "firetitan.v1";

function detail(status: Status | undefined, type: string): Uint8Array | undefined {
  return status?.details.find((any) => any.typeUrl.endsWith(`/google.rpc.${type}`))?.value;
}

function statusOf(error: ServiceError): Status | undefined {
  const bytes = error.metadata?.get("grpc-status-details-bin")[0];
  return bytes instanceof Buffer ? Status.decode(bytes) : undefined;
}

/** The reason of the protocol's table, e.g. "WEIGHTS_CHANGED". */
export function statusReason(status: Status | undefined): string | undefined {
  const bytes = detail(status, "ErrorInfo");
  if (bytes === undefined) return undefined;
  const info = ErrorInfo.decode(bytes);
  return info.domain === DOMAIN ? info.reason : undefined;
}

/** The reason of a call that was refused. */
export function callReason(error: ServiceError): string | undefined {
  return statusReason(statusOf(error));
}

/** When the daemon says the same request may be sent again. */
export function retryAfterMs(error: ServiceError): number | undefined {
  const bytes = detail(statusOf(error), "RetryInfo");
  if (bytes === undefined) return undefined;
  const delay = RetryInfo.decode(bytes).retryDelay;
  return delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
}

/** An operation that ended with an error; it has changed nothing. */
export class OperationError extends Error {
  readonly reason: string | undefined;

  constructor(method: string, status: Status) {
    super(`${method}: ${status.message}`);
    this.name = "OperationError";
    this.reason = statusReason(status);
  }
}
