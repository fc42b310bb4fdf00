// Trains a session that Python made, serves the new weights and samples them.
//
//   node dist/src/main.js ADDRESS TRAINER_ID DEPLOYMENT_ID [STEPS]

import { randomUUID } from "node:crypto";
import type { ServiceError } from "@grpc/grpc-js";
import { SaveSnapshotRequest } from "../gen/firetitan/v1/checkpoint_service.js";
import { HotloadSnapshotRequest } from "../gen/firetitan/v1/deployment_service.js";
import { SampleRequest } from "../gen/firetitan/v1/sampling_service.js";
import { DataType, Datum, ModelInput } from "../gen/firetitan/v1/tensor.js";
import {
  ForwardBackwardRequest,
  ForwardRequest,
  OptimStepRequest,
} from "../gen/firetitan/v1/training_service.js";
import { Connection, call, describe } from "./connection.js";
import { OperationError } from "./errors.js";
import { Lane, type Pending } from "./lane.js";
import { sampleStream } from "./stream.js";

const TOKENS = [3, 1, 4, 1, 5, 9, 2, 6];
const ADAM = { learningRate: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8 };
const WAIT_S = 20n;

function modelInput(tokens: number[]): ModelInput {
  // Int32Array is little-endian wherever Node runs, as the protocol wants it.
  const tokenIds = Buffer.from(Int32Array.from(tokens).buffer);
  return ModelInput.fromPartial({ chunks: [{ encodedText: { tokenIds } }] });
}

/** A text of N + 1 tokens: N inputs, and what follows each of them. */
function datum(tokens: number[]): Datum {
  const targets = BigInt64Array.from(tokens.slice(1).map(BigInt));
  return Datum.fromPartial({
    modelInput: modelInput(tokens.slice(0, -1)),
    lossFnInputs: {
      target_tokens: {
        dataType: DataType.DATA_TYPE_INT64,
        shape: [BigInt(targets.length)],
        data: Buffer.from(targets.buffer),
      },
    },
  });
}

/** Hands a snapshot to the deployment and waits until it is served. */
async function hotload(connection: Connection, deployment: string, snapshot: string): Promise<void> {
  const { deployments, operations } = connection;
  const request = HotloadSnapshotRequest.fromPartial({
    deployment,
    snapshot,
    requestId: randomUUID(),
  });
  let { operation } = await call(deployments.hotloadSnapshot.bind(deployments), request);
  while (operation !== undefined && !operation.done) {
    const wait = { name: operation.name, timeout: { seconds: WAIT_S, nanos: 0 } };
    ({ operation } = await call(operations.waitOperation.bind(operations), wait));
  }
  if (operation?.error) throw new OperationError(operation.method, operation.error);
}

async function train(connection: Connection, lane: Lane, steps: number): Promise<void> {
  const { training } = connection;
  const data = [datum(TOKENS)];
  const sent: [Pending, Pending][] = [];
  for (let step = 0; step < steps; step++) {
    // Both are sent before either is awaited: the daemon keeps their order.
    sent.push([
      await lane.send(
        training.forwardBackward.bind(training),
        ForwardBackwardRequest.fromPartial({ data, lossFn: "cross_entropy" }),
      ),
      await lane.send(
        training.optimStep.bind(training),
        OptimStepRequest.fromPartial({ adamParams: ADAM }),
      ),
    ]);
  }
  for (const [forward, optim] of sent) {
    const loss = (await forward.result()).forward?.metrics["loss:sum"];
    const step = (await optim.result()).optimStep?.metrics["step"];
    console.log(`step ${step} loss ${loss?.toFixed(6)}`);
  }
}

/** What a failed command does to those sent behind it, and how to go on. */
async function failAndGoOn(connection: Connection, lane: Lane): Promise<void> {
  const { training } = connection;
  const data = [datum(TOKENS)];
  const step = training.optimStep.bind(training);
  const forward = training.forward.bind(training);
  const wrong = OptimStepRequest.fromPartial({ adamParams: ADAM, expectedStep: 1_000_000n });
  const look = ForwardRequest.fromPartial({ data, lossFn: "cross_entropy" });
  const failing = await lane.send(step, wrong);
  const behind = await lane.send(forward, look);
  for (const pending of [failing, behind]) {
    try {
      await pending.result();
    } catch (error) {
      if (!(error instanceof OperationError)) throw error;
      console.log(`failed as it should: ${error.reason}`);
    }
  }
  await (await lane.send(forward, look)).result();
  console.log("and on");
}

async function sample(connection: Connection, deployment: string): Promise<void> {
  const request = SampleRequest.fromPartial({
    deployment,
    prompt: modelInput(TOKENS),
    numSamples: 1,
    params: { seed: 7n, maxTokens: 16, temperature: 1 },
  });
  const tokens: number[] = [];
  let snapshot = "";
  for await (const part of sampleStream(connection, request)) {
    // A copy: a typed array may only start at a multiple of its element size.
    tokens.push(...new Int32Array(new Uint8Array(part.tokenIds).buffer));
    snapshot = part.snapshot;
  }
  console.log(`sampled ${tokens.join(" ")} from ${snapshot}`);
}

async function main(): Promise<void> {
  const [address, trainer, deployment, steps] = process.argv.slice(2);
  if (!address || !trainer || !deployment) {
    throw new Error("usage: node dist/src/main.js ADDRESS TRAINER_ID DEPLOYMENT_ID [STEPS]");
  }
  const connection = new Connection(address);
  const lane = await Lane.attach(connection, `trainers/${trainer}`);
  try {
    await train(connection, lane, Number(steps ?? "3"));
    await failAndGoOn(connection, lane);
    const { checkpoints } = connection;
    const saved = await lane.send(
      checkpoints.saveSnapshot.bind(checkpoints),
      SaveSnapshotRequest.fromPartial({ snapshotId: "from-node" }),
    );
    const snapshot = (await saved.result()).snapshot!.name;
    console.log(`saved ${snapshot}`);
    await hotload(connection, `deployments/${deployment}`, snapshot);
    await sample(connection, `deployments/${deployment}`);
  } finally {
    lane.close();
    connection.close();
  }
}

main().catch((error: Error | ServiceError) => {
  console.error("code" in error ? describe(error) : error.message);
  process.exitCode = 1;
});
