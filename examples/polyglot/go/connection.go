package main

import (
	"context"
	"fmt"
	"time"

	v1 "example.com/firetitan/gen/firetitan/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	deadline = 30 * time.Second
	patience = 5 * time.Minute
	pause    = 100 * time.Millisecond
	domain   = "firetitan.v1"
	anySize  = 1<<31 - 1
)

// connection holds the services of one daemon over one channel.
type connection struct {
	channel     *grpc.ClientConn
	training    v1.TrainingServiceClient
	checkpoints v1.CheckpointServiceClient
	operations  v1.OperationServiceClient
	deployments v1.DeploymentServiceClient
	sampling    v1.SamplingServiceClient
}

// connect opens the address of daemon.json, e.g. "unix:/home/me/.firetitan/run/firetitan.sock".
func connect(address string) (*connection, error) {
	channel, err := grpc.Dial(
		address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(anySize), grpc.MaxCallSendMsgSize(anySize)),
		// A restarted daemon is found within a quarter of a second.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, MaxDelay: 250 * time.Millisecond,
		}}),
	)
	if err != nil {
		return nil, err
	}
	return &connection{
		channel:     channel,
		training:    v1.NewTrainingServiceClient(channel),
		checkpoints: v1.NewCheckpointServiceClient(channel),
		operations:  v1.NewOperationServiceClient(channel),
		deployments: v1.NewDeploymentServiceClient(channel),
		sampling:    v1.NewSamplingServiceClient(channel),
	}, nil
}

// method is a unary method of a generated client.
type method[Q, R any] func(context.Context, Q, ...grpc.CallOption) (R, error)

// call sends the same request again while the daemon is away, for five minutes at most. Only what
// cannot have changed anything twice may pass here: reads, and requests with a request id.
func call[Q, R any](send method[Q, R], request Q) (R, error) {
	giveUp := time.Now().Add(patience)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		response, err := send(ctx, request)
		cancel()
		if err == nil {
			return response, nil
		}
		wait, again := pauseBefore(err)
		if !again || time.Now().Add(wait).After(giveUp) {
			return response, err
		}
		time.Sleep(wait)
	}
}

// pauseBefore says how long to wait before the same request is sent again, and whether it may be.
func pauseBefore(err error) (time.Duration, bool) {
	failed := status.Convert(err)
	for _, detail := range failed.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration(), true
		}
	}
	return pause, brokenOff(err) || failed.Code() == codes.DeadlineExceeded
}

// brokenOff says whether a call ended because the daemon went away in the middle of it. Canceled is
// what a daemon that ends leaves of a call: ask only where we did not cancel it ourselves.
func brokenOff(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.Canceled
}

// operationError says how an operation ended that failed; it has changed nothing.
type operationError struct {
	method string
	reason string // of the protocol's table, e.g. "WEIGHTS_CHANGED"
	text   string
}

func (e *operationError) Error() string {
	return fmt.Sprintf("%s: %s: %s", e.method, e.reason, e.text)
}

func errorOf(method string, failed *spb.Status) *operationError {
	result := &operationError{method: method, text: failed.GetMessage()}
	for _, detail := range status.FromProto(failed).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			result.reason = info.GetReason()
		}
	}
	return result
}
