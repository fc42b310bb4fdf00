// Trains a session that Python made, serves the new weights and samples them.
//
//	./firetitan ADDRESS TRAINER_ID DEPLOYMENT_ID [STEPS]
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	v1 "example.com/firetitan/gen/firetitan/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

var (
	tokens = []int32{3, 1, 4, 1, 5, 9, 2, 6}
	adam   = &v1.AdamParams{LearningRate: 1e-3, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8}
)

func modelInput(tokens []int32) *v1.ModelInput {
	ids := make([]byte, 0, 4*len(tokens))
	for _, token := range tokens {
		ids = binary.LittleEndian.AppendUint32(ids, uint32(token))
	}
	text := &v1.InputChunk_EncodedText{EncodedText: &v1.EncodedText{TokenIds: ids}}
	return &v1.ModelInput{Chunks: []*v1.InputChunk{{Chunk: text}}}
}

// data is a text of N + 1 tokens: N inputs, and what follows each of them.
func data() []*v1.Datum {
	n := len(tokens) - 1
	targets := make([]byte, 0, 8*n)
	for _, token := range tokens[1:] {
		targets = binary.LittleEndian.AppendUint64(targets, uint64(token))
	}
	return []*v1.Datum{{
		ModelInput: modelInput(tokens[:n]),
		LossFnInputs: map[string]*v1.Tensor{"target_tokens": {
			DataType: v1.DataType_DATA_TYPE_INT64, Shape: []int64{int64(n)}, Data: targets,
		}},
	}}
}

func train(l *lane, steps int) error {
	training := l.connection.training
	var sent []*pending
	for i := 0; i < steps; i++ {
		// Both are sent before either is awaited: the daemon keeps their order.
		forward := &v1.ForwardBackwardRequest{Data: data(), LossFn: "cross_entropy"}
		first, err := send(l, training.ForwardBackward, forward, &forward.Header)
		if err != nil {
			return err
		}
		step := &v1.OptimStepRequest{AdamParams: adam}
		second, err := send(l, training.OptimStep, step, &step.Header)
		if err != nil {
			return err
		}
		sent = append(sent, first, second)
	}
	for i := 0; i < len(sent); i += 2 {
		forward, err := sent[i].result()
		if err != nil {
			return err
		}
		step, err := sent[i+1].result()
		if err != nil {
			return err
		}
		fmt.Printf("step %.0f loss %.6f\n",
			step.GetOptimStep().GetMetrics()["step"], forward.GetForward().GetMetrics()["loss:sum"])
	}
	return nil
}

// failAndGoOn shows what a failed command does to those sent behind it, and how to go on.
func failAndGoOn(l *lane) error {
	training := l.connection.training
	wrong := &v1.OptimStepRequest{AdamParams: adam, ExpectedStep: proto.Int64(1_000_000)}
	failing, err := send(l, training.OptimStep, wrong, &wrong.Header)
	if err != nil {
		return err
	}
	look := &v1.ForwardRequest{Data: data(), LossFn: "cross_entropy"}
	behind, err := send(l, training.Forward, look, &look.Header)
	if err != nil {
		return err
	}
	for _, sent := range []*pending{failing, behind} {
		var failed *operationError
		if _, err := sent.result(); !errors.As(err, &failed) {
			return fmt.Errorf("expected a failure, got %v", err)
		}
		fmt.Println("failed as it should:", failed.reason)
	}
	again := &v1.ForwardRequest{Data: data(), LossFn: "cross_entropy"}
	sent, err := send(l, training.Forward, again, &again.Header)
	if err != nil {
		return err
	}
	if _, err := sent.result(); err != nil {
		return err
	}
	fmt.Println("and on")
	return nil
}

func save(l *lane) (string, error) {
	request := &v1.SaveSnapshotRequest{SnapshotId: "from-go"}
	sent, err := send(l, l.connection.checkpoints.SaveSnapshot, request, &request.Header)
	if err != nil {
		return "", err
	}
	saved, err := sent.result()
	return saved.GetSnapshot().GetName(), err
}

// hotload hands a snapshot to the deployment and waits until it is served.
func hotload(c *connection, deployment, snapshot string) error {
	request := &v1.HotloadSnapshotRequest{
		Deployment: deployment, Snapshot: snapshot, RequestId: newID(),
	}
	answer, err := call(c.deployments.HotloadSnapshot, request)
	if err != nil {
		return err
	}
	operation := answer.GetOperation()
	for !operation.GetDone() {
		wait := &v1.WaitOperationRequest{
			Name: operation.GetName(), Timeout: durationpb.New(20 * time.Second),
		}
		answer, err := call(c.operations.WaitOperation, wait)
		if err != nil {
			return err
		}
		operation = answer.GetOperation()
	}
	if operation.GetError() != nil {
		return errorOf(operation.GetMethod(), operation.GetError())
	}
	return nil
}

// sample prints tokens as they come; a stream that breaks goes on behind what it brought.
func sample(c *connection, deployment string) error {
	request := &v1.SampleStreamRequest{Request: &v1.SampleRequest{
		Deployment: deployment,
		Prompt:     modelInput(tokens),
		NumSamples: 1,
		// The same seed on every try gives the same tokens.
		Params: &v1.SamplingParams{Seed: proto.Int64(7), MaxTokens: proto.Int32(16)},
	}}
	for {
		done, err := receive(c, request)
		if done || (err != nil && !brokenOff(err)) {
			return err
		}
		time.Sleep(pause)
	}
}

func receive(c *connection, request *v1.SampleStreamRequest) (bool, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := c.sampling.SampleStream(ctx, request)
	if err != nil {
		return false, err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return false, err
		}
		for _, part := range response.GetTokens() {
			ids := part.GetTokenIds()
			for i := 0; i < len(ids); i += 4 {
				fmt.Printf("sampled %d\n", int32(binary.LittleEndian.Uint32(ids[i:])))
			}
			received := part.GetFirstToken() + int32(len(ids)/4)
			request.Resume = &v1.SampleCursor{
				Snapshot: part.GetSnapshot(), Received: []int32{received},
			}
		}
		if response.GetSummary() != nil {
			fmt.Println("from", response.GetSummary().GetSnapshot())
			return true, nil
		}
	}
}

func run() error {
	if len(os.Args) < 4 {
		return errors.New("usage: firetitan ADDRESS TRAINER_ID DEPLOYMENT_ID [STEPS]")
	}
	steps, deployment := 3, "deployments/"+os.Args[3]
	if len(os.Args) > 4 {
		given, err := strconv.Atoi(os.Args[4])
		if err != nil {
			return fmt.Errorf("STEPS %q: give a whole number", os.Args[4])
		}
		steps = given
	}
	c, err := connect(os.Args[1])
	if err != nil {
		return err
	}
	defer c.channel.Close()
	l, err := attach(c, "trainers/"+os.Args[2])
	if err != nil {
		return err
	}
	defer l.cancel()
	if err := train(l, steps); err != nil {
		return err
	}
	if err := failAndGoOn(l); err != nil {
		return err
	}
	snapshot, err := save(l)
	if err != nil {
		return err
	}
	fmt.Println("saved", snapshot)
	if err := hotload(c, deployment, snapshot); err != nil {
		return err
	}
	return sample(c, deployment)
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}
