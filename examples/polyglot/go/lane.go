package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"sync"
	"time"

	v1 "example.com/firetitan/gen/firetitan/v1"
	"google.golang.org/grpc/status"
)

// lane is one client's order of commands in a session that others use too: they run in the order in
// which they were sent, and their results come in that order.
type lane struct {
	connection *connection
	session    *v1.Session
	clientID   string
	cancel     context.CancelFunc

	mutex       sync.Mutex // guards what follows, and that commands are sent one by one
	nextSeq     uint64
	seenFailure uint64

	waiting sync.Map // seq -> chan *v1.Operation
}

// pending is a command that was accepted. It runs to its end whatever becomes of this process.
type pending struct {
	lane  *lane
	seq   uint64
	ended chan *v1.Operation
}

// attach opens a lane of our own. name is a session, or a trainer that has one open session.
func attach(c *connection, name string) (*lane, error) {
	clientID := newID()
	request := &v1.AttachSessionRequest{Name: name, ClientId: clientID}
	answer, err := call(c.training.AttachSession, request)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &lane{
		connection: c,
		session:    answer.GetSession(),
		clientID:   clientID,
		cancel:     cancel,
		nextSeq:    answer.GetNextSeq(),
	}
	go l.follow(ctx, l.nextSeq-1)
	return l, nil
}

type answer interface{ GetOperation() *v1.Operation }

// send sends a command behind those sent before. header is the request's field of that name.
func send[Q any, R answer](
	l *lane, rpc method[Q, R], request Q, header **v1.CommandHeader,
) (*pending, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	*header = &v1.CommandHeader{
		Session:     l.session.GetName(),
		Epoch:       l.session.GetEpoch(),
		ClientId:    l.clientID,
		Seq:         l.nextSeq,
		RequestId:   newID(),
		SeenFailure: l.seenFailure,
	}
	sent := &pending{lane: l, seq: l.nextSeq, ended: make(chan *v1.Operation, 1)}
	l.waiting.Store(sent.seq, sent.ended)
	if _, err := call(rpc, request); err != nil {
		// Refused: nothing was accepted, the next command takes this number.
		l.waiting.Delete(sent.seq)
		return nil, err
	}
	l.nextSeq++
	return sent, nil
}

// result waits for the operation; a failure has then been seen by the user.
func (p *pending) result() (*v1.Operation, error) {
	operation := <-p.ended
	if operation.GetError() == nil {
		return operation, nil
	}
	p.lane.mutex.Lock()
	defer p.lane.mutex.Unlock()
	if p.seq > p.lane.seenFailure {
		p.lane.seenFailure = p.seq
	}
	return nil, errorOf(operation.GetMethod(), operation.GetError())
}

// follow reads results as they come, in the order of seq; it opens the stream again when it breaks.
func (l *lane) follow(ctx context.Context, after uint64) {
	for ctx.Err() == nil {
		err := l.watch(ctx, &after)
		if err != nil && (ctx.Err() != nil || !brokenOff(err)) {
			l.abandon(status.Convert(err))
			return
		}
		time.Sleep(pause)
	}
}

func (l *lane) watch(ctx context.Context, after *uint64) error {
	stream, err := l.connection.operations.WatchOperations(ctx)
	if err != nil {
		return err
	}
	first := &v1.WatchOperationsRequest{
		Session: l.session.GetName(), ClientId: l.clientID, AfterSeq: *after,
	}
	if err := stream.Send(first); err != nil {
		_, err = stream.Recv()
		return err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		operation := response.GetOperation()
		if operation.GetResultOmitted() {
			request := &v1.GetOperationRequest{Name: operation.GetName()}
			whole, err := call(l.connection.operations.GetOperation, request)
			if err != nil {
				return err
			}
			operation = whole.GetOperation()
		}
		*after = operation.GetSeq()
		if ended, ok := l.waiting.LoadAndDelete(*after); ok {
			ended.(chan *v1.Operation) <- operation
		}
		// The daemon may drop the bytes of what we have. A send that fails is told by Recv.
		_ = stream.Send(&v1.WatchOperationsRequest{AckedThrough: *after})
	}
}

// abandon gives everybody who waits what ended the watch.
func (l *lane) abandon(why *status.Status) {
	l.waiting.Range(func(seq, ended any) bool {
		failed := &v1.Operation_Error{Error: why.Proto()}
		ended.(chan *v1.Operation) <- &v1.Operation{Method: "WatchOperations", Result: failed}
		l.waiting.Delete(seq)
		return true
	})
}

func newID() string {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		panic(err)
	}
	return hex.EncodeToString(bytes)
}
