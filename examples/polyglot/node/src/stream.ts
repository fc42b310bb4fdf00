// Tokens as they come, from a stream that goes on behind a restart of the daemon.

import { randomInt } from "node:crypto";
import type { ServiceError } from "@grpc/grpc-js";
import type { SampleRequest, SampledTokens } from "../gen/firetitan/v1/sampling_service.js";
import { SampleStreamRequest } from "../gen/firetitan/v1/sampling_service.js";
import { type Connection, brokenOff, sleep } from "./connection.js";

const PAUSE_MS = 100;
const PATIENCE_MS = 300_000;

/** Yields what comes to each sequence, every token once. */
export async function* sampleStream(
  connection: Connection,
  sample: SampleRequest,
): AsyncGenerator<SampledTokens> {
  // Drawn here: the same seed on every try gives the same tokens.
  const seed = sample.params?.seed ?? BigInt(randomInt(2 ** 47));
  const request = { ...sample, params: { ...sample.params!, seed } };
  const received = new Array<number>(Math.max(request.numSamples, 1)).fill(0);
  let snapshot: string | undefined;
  let giveUp = Date.now() + PATIENCE_MS;
  for (;;) {
    const resume = snapshot === undefined ? undefined : { snapshot, received: [...received] };
    const stream = connection.sampling.sampleStream(
      SampleStreamRequest.fromPartial({ request, resume }),
    );
    try {
      for await (const response of stream) {
        for (const tokens of response.tokens) {
          snapshot = tokens.snapshot;
          received[tokens.sequence] = tokens.firstToken + tokens.tokenIds.length / 4;
          yield tokens;
        }
        if (response.summary !== undefined) return;
        giveUp = Date.now() + PATIENCE_MS;
      }
    } catch (error) {
      if (!brokenOff(error as ServiceError) || Date.now() > giveUp) throw error;
    } finally {
      stream.cancel();
    }
    await sleep(PAUSE_MS);
  }
}
