"""A peer that is not ours: it knows a node by the .proto files and by what the wire looks like, nothing else.

It plays coordinator and maintainer towards one node: greets or is greeted, bootstraps a changefeed's dispatchers, is
fenced by a newer owner, sets a drain target, and closes. Everything that it did not expect ends it with a traceback.

    peer.py PROTO_DIR OUT_DIR NODE_ID NODE_ADDRESS dial|accept
"""

import collections
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from concurrent import futures

import grpc

PROTO_DIR, OUT_DIR, NODE, NODE_ADDRESS, DIRECTION = sys.argv[1:]
ME = "peer-in-python"
DEADLINE = 30.0
METHOD = "/proto.MessageService/streamMessages"

subprocess.run(
    ["protoc", f"-I{PROTO_DIR}", f"--python_out={OUT_DIR}", "heartbeat.proto", "message.proto"], check=True
)
sys.path.insert(0, OUT_DIR)
pb = importlib.import_module("heartbeat_pb2")
Message = importlib.import_module("message_pb2").Message

# Numbers of the wire.
SCHEDULE, BOOTSTRAP, BOOTSTRAP_RESPONSE, CLOSE, CLOSE_RESPONSE = 15, 29, 30, 33, 34
COORDINATOR_BOOTSTRAP, COORDINATOR_BOOTSTRAP_RESPONSE = 24, 25
HANDSHAKE, NODE_HEARTBEAT, DRAIN_TARGET, HEARTBEAT = 36, 42, 45, 13
TYPES = {
    HEARTBEAT: pb.HeartBeatRequest,
    BOOTSTRAP_RESPONSE: pb.MaintainerBootstrapResponse,
    CLOSE_RESPONSE: pb.MaintainerCloseResponse,
    COORDINATOR_BOOTSTRAP_RESPONSE: pb.CoordinatorBootstrapResponse,
    NODE_HEARTBEAT: pb.NodeHeartbeat,
}
TOPICS = {
    HEARTBEAT: "maintainer-manager",
    BOOTSTRAP_RESPONSE: "maintainer-manager",
    CLOSE_RESPONSE: "maintainer",
    COORDINATOR_BOOTSTRAP_RESPONSE: "coordinator",
    NODE_HEARTBEAT: "coordinator",
}


def say(text):
    print(text, flush=True)


class Stream:
    """What leaves on one stream."""

    def __init__(self):
        self.frames = queue.Queue()

    def __iter__(self):
        return iter(self.frames.get, None)


class Peer:
    def __init__(self):
        self.streams = {"event": Stream(), "command": Stream()}
        self.heard = queue.Queue()
        self.kept = {}
        self.ready = {"event": threading.Event(), "command": threading.Event()}

    def listen(self, frames, kind):
        """Takes what arrives on a stream and checks its envelope."""
        try:
            for frame in frames:
                assert frame.to == ME, frame.to
                assert getattr(frame, "from") == NODE, getattr(frame, "from")
                assert kind == "command", f"type {frame.type} on the {kind} stream"
                assert frame.topic == TOPICS[frame.type], (frame.type, frame.topic)
                assert len(frame.payload) > 0, "an empty envelope"
                for payload in frame.payload:
                    self.heard.put((frame.type, TYPES[frame.type].FromString(payload)))
        except grpc.RpcError as error:
            self.heard.put((None, error))
        except Exception as error:
            self.heard.put((None, error))

    def dial(self):
        channel = grpc.insecure_channel(NODE_ADDRESS)
        open_stream = channel.stream_stream(
            METHOD, request_serializer=Message.SerializeToString, response_deserializer=Message.FromString
        )
        for kind, stream in self.streams.items():
            greeting = json.dumps({"Version": 1, "Timestamp": int(time.time()), "StreamType": kind})
            first = Message(type=HANDSHAKE, to=NODE, payload=[greeting.encode()])
            setattr(first, "from", ME)
            stream.frames.put(first)
            call = open_stream(iter(stream))
            threading.Thread(target=self.listen, args=(call, kind), daemon=True).start()
            self.ready[kind].set()

    def accept(self):
        def stream_messages(frames, context):
            first = next(frames)
            assert first.type == HANDSHAKE and first.to == ME and getattr(first, "from") == NODE, first
            assert first.topic == "" and len(first.payload) == 1
            greeting = json.loads(first.payload[0])
            assert greeting["Version"] == 1 and abs(greeting["Timestamp"] - time.time()) < 600, greeting
            kind = greeting["StreamType"]
            threading.Thread(target=self.listen, args=(frames, kind), daemon=True).start()
            self.ready[kind].set()
            return iter(self.streams[kind])

        handler = grpc.stream_stream_rpc_method_handler(
            stream_messages, request_deserializer=Message.FromString, response_serializer=Message.SerializeToString
        )
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("proto.MessageService", {"streamMessages": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.server = server
        say(f"listening 127.0.0.1:{port}")

    def send(self, number, topic, *messages):
        frame = Message(type=number, to=NODE, topic=topic)
        frame.payload.extend(message.SerializeToString() for message in messages)
        setattr(frame, "from", ME)
        self.streams["command"].frames.put(frame)

    def hear(self, number, fits=lambda message: True):
        """The next message of a type that fits; those of other types are kept for later."""
        end = time.monotonic() + DEADLINE
        while True:
            kept = self.kept.setdefault(number, collections.deque())
            while kept:
                message = kept.popleft()
                if fits(message):
                    return message
            if not self.next(end - time.monotonic()):
                raise AssertionError(f"no message of type {number} came in time")

    def silence(self, number, seconds):
        """Nothing of a type comes for a while."""
        end = time.monotonic() + seconds
        while self.next(end - time.monotonic()):
            pass
        assert not self.kept.get(number), f"an answer of type {number}: {self.kept[number]}"

    def forget(self, number):
        """What has come of a type so far does not count."""
        while self.next(0):
            pass
        self.kept.pop(number, None)

    def next(self, seconds):
        """Keeps the next message, if one comes."""
        try:
            number, message = self.heard.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return False
        if number is None:
            raise message
        self.kept.setdefault(number, collections.deque()).append(message)
        return True


FEED = pb.ChangefeedID(high=1, low=2, name="feed", keyspace="default")
TRIGGER = pb.DispatcherID(high=5, low=1)


def bootstrap(epoch):
    config = {
        "changefeed": {"id": {"low": 2, "high": 1}, "display": {"name": "feed", "keyspace": "default"}},
        "sink-uri": "blackhole://",
        "start-ts": 50,
        "target-ts": 0,
        "epoch": epoch,
    }
    return pb.MaintainerBootstrapRequest(
        changefeedID=FEED,
        config=json.dumps(config).encode(),
        start_ts=50,
        table_trigger_event_dispatcher_id=TRIGGER,
        maintainer_epoch=epoch,
    )


def create(epoch, low):
    span = pb.TableSpan(TableID=40 + low, StartKey=b"", EndKey=b"\xff")
    config = pb.DispatcherConfig(span=span, startTs=50, dispatcherID=pb.DispatcherID(high=5, low=low), schemaID=1)
    return pb.ScheduleDispatcherRequest(
        changefeedID=FEED, config=config, scheduleAction=pb.Create, operatorType=pb.O_Add, maintainer_epoch=epoch
    )


def ids(response):
    return sorted(span.ID.low for span in response.spans)


def bootstrapped(peer, epoch, wanted):
    """Asks until the dispatchers of the node are the wanted ones."""
    end = time.monotonic() + DEADLINE
    while True:
        peer.send(BOOTSTRAP, "dispatcher-manager-manager", bootstrap(epoch))
        answer = peer.hear(BOOTSTRAP_RESPONSE, lambda answer: answer.maintainer_epoch == epoch)
        assert answer.changefeedID.high == 1 and answer.changefeedID.low == 2, answer
        assert not answer.HasField("err"), answer
        if ids(answer) == wanted:
            return answer
        assert time.monotonic() < end, f"dispatchers {ids(answer)} and not {wanted}"
        time.sleep(0.1)


def as_coordinator(peer):
    peer.send(COORDINATOR_BOOTSTRAP, "maintainer-manager", pb.CoordinatorBootstrapRequest(version=3))
    answer = peer.hear(COORDINATOR_BOOTSTRAP_RESPONSE)
    assert answer.drain_protocol_version == 1 and len(answer.statuses) == 0, answer
    say("known as coordinator")

    def drain(target, epoch):
        request = pb.SetDispatcherDrainTargetRequest(target_node_id=target, target_epoch=epoch)
        peer.send(DRAIN_TARGET, "maintainer-manager", request)

    def applied(target, epoch):
        return lambda beat: (
            beat.dispatcher_drain_target_node_id == target and beat.dispatcher_drain_target_epoch == epoch
        )

    drain("some-node", 5)
    beat = peer.hear(NODE_HEARTBEAT, applied("some-node", 5))
    assert beat.liveness == pb.ALIVE and beat.node_epoch != 0, beat
    peer.forget(NODE_HEARTBEAT)
    drain("another-node", 4)
    beat = peer.hear(NODE_HEARTBEAT)
    assert applied("some-node", 5)(beat), beat
    drain("", 6)
    peer.hear(NODE_HEARTBEAT, applied("", 6))
    say("drain target applied, and the stale one not")


def as_maintainer(peer):
    answer = bootstrapped(peer, 7, [1])
    assert answer.checkpoint_ts == 50, answer
    say("dispatcher manager bootstrapped")
    # Two messages of one type in one envelope.
    peer.send(SCHEDULE, "heartbeat-collector", create(7, 2), create(7, 3))
    answer = bootstrapped(peer, 7, [1, 2, 3])
    span = next(span for span in answer.spans if span.ID.low == 2)
    assert (span.span.TableID, span.span.StartKey, span.span.EndKey) == (42, b"", b"\xff"), span
    beat = peer.hear(HEARTBEAT)
    assert beat.changefeedID.low == 2 and beat.HasField("watermark"), beat
    say("dispatchers created")

    bootstrapped(peer, 8, [1, 2, 3])
    # The owner of before is fenced: it is not answered, and what it asks for does not happen.
    peer.forget(BOOTSTRAP_RESPONSE)
    peer.send(BOOTSTRAP, "dispatcher-manager-manager", bootstrap(7))
    peer.silence(BOOTSTRAP_RESPONSE, 1.0)
    peer.send(SCHEDULE, "heartbeat-collector", create(7, 4))
    stale_close = pb.MaintainerCloseRequest(changefeedID=FEED, removed=True, maintainer_epoch=7)
    peer.send(CLOSE, "dispatcher-manager-manager", stale_close)
    peer.hear(CLOSE_RESPONSE, lambda answer: answer.success and answer.maintainer_epoch == 7)
    bootstrapped(peer, 8, [1, 2, 3])
    say("fenced by the newer owner")

    end = time.monotonic() + DEADLINE
    closed = False
    while not closed:
        assert time.monotonic() < end, "not closed in time"
        request = pb.MaintainerCloseRequest(changefeedID=FEED, removed=True, maintainer_epoch=8)
        peer.send(CLOSE, "dispatcher-manager-manager", request)
        closed = peer.hear(CLOSE_RESPONSE, lambda answer: answer.maintainer_epoch == 8).success
    peer.forget(BOOTSTRAP_RESPONSE)
    peer.send(BOOTSTRAP, "dispatcher-manager-manager", bootstrap(8))
    peer.silence(BOOTSTRAP_RESPONSE, 1.0)
    say("closed")


def main():
    peer = Peer()
    if DIRECTION == "dial":
        peer.dial()
    else:
        peer.accept()
    for kind, ready in peer.ready.items():
        assert ready.wait(DEADLINE), f"no {kind} stream"
    say("greeted")
    as_coordinator(peer)
    as_maintainer(peer)
    say("done")


try:
    main()
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    # Streams that are still open keep threads, and those the interpreter.
    os._exit(1)
os._exit(0)
