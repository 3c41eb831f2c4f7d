//! The part of etcd's v3 API that the store needs: messages with etcd's field numbers, and one client for one member.
//!
//! Written by hand because it is small and does not change: generated bindings would need a `protoc` to build, and
//! hide who answered a keep-alive.

use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// A page of the largest values that etcd takes by default.
const MOST_ANSWER_BYTES: usize = 256 << 20;

/// Said of who answers, and when.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Header {
    #[prost(uint64, tag = "1")]
    pub(super) cluster_id: u64,
    #[prost(int64, tag = "3")]
    pub(super) revision: i64,
}

/// A question or an order that is one message and gets one answer.
pub(super) trait Request: Message + Clone + Default + 'static {
    type Answer: Answer;
    const PATH: &'static str;
    /// Whether it may be sent twice.
    const REPEATABLE: bool;
}

/// An answer, which says who gave it and when.
pub(super) trait Answer: Message + Default + 'static {
    /// Whether the cluster agreed upon it, so that its revision is not smaller than that of earlier answers.
    const AGREED: bool;

    fn header(&self) -> Option<Header>;
}

macro_rules! method {
    ($request:ty => $answer:ty, $path:literal, repeatable = $repeatable:literal, agreed = $agreed:literal) => {
        impl Request for $request {
            type Answer = $answer;
            const PATH: &'static str = $path;
            const REPEATABLE: bool = $repeatable;
        }
        impl Answer for $answer {
            const AGREED: bool = $agreed;
            fn header(&self) -> Option<Header> {
                self.header
            }
        }
    };
}

method!(RangeRequest => RangeResponse, "/etcdserverpb.KV/Range", repeatable = true, agreed = true);
method!(TxnRequest => TxnResponse, "/etcdserverpb.KV/Txn", repeatable = false, agreed = true);
method!(ReadRequest => ReadResponse, "/etcdserverpb.KV/Txn", repeatable = true, agreed = true);
// A lease has a number that nobody else chooses, so these change nothing when they come twice.
method!(GrantRequest => GrantResponse, "/etcdserverpb.Lease/LeaseGrant", repeatable = true, agreed = false);
method!(RevokeRequest => RevokeResponse, "/etcdserverpb.Lease/LeaseRevoke", repeatable = true, agreed = false);
method!(TimeToLiveRequest => TimeToLiveResponse, "/etcdserverpb.Lease/LeaseTimeToLive", repeatable = true, agreed = false);
method!(MembersRequest => MembersResponse, "/etcdserverpb.Cluster/MemberList", repeatable = true, agreed = false);
method!(AuthenticateRequest => AuthenticateResponse, "/etcdserverpb.Auth/Authenticate", repeatable = true, agreed = false);

/// Messages with contents that are nobody's business.
macro_rules! hide {
    ($($message:ident),*) => {
        $(impl std::fmt::Debug for $message {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{} of {} bytes", stringify!($message), self.encoded_len())
            }
        })*
    };
}
hide!(KeyValue, PutRequest, Compare, CompareTarget, AuthenticateRequest, AuthenticateResponse);

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(int64, tag = "2")]
    pub(super) create_revision: i64,
    #[prost(int64, tag = "3")]
    pub(super) mod_revision: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub(super) value: Vec<u8>,
    #[prost(int64, tag = "6")]
    pub(super) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    /// Empty: only the key. One zero byte: everything behind the key.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) limit: i64,
    /// Zero: now.
    #[prost(int64, tag = "4")]
    pub(super) revision: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(message, repeated, tag = "2")]
    pub(super) kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) lease: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DeleteRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RequestOp {
    #[prost(oneof = "OneOp", tags = "2, 3")]
    pub(super) op: Option<OneOp>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum OneOp {
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    Delete(DeleteRequest),
}

/// Equality of one property of one key; the other comparisons that etcd knows are not needed.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct Compare {
    /// [`CREATE`], [`MOD`] or [`VALUE`].
    #[prost(int32, tag = "2")]
    pub(super) target: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) key: Vec<u8>,
    #[prost(oneof = "CompareTarget", tags = "5, 6, 7")]
    pub(super) to: Option<CompareTarget>,
}

pub(super) const CREATE: i32 = 1;
pub(super) const MOD: i32 = 2;
pub(super) const VALUE: i32 = 3;

#[derive(Clone, PartialEq, prost::Oneof)]
#[prost(skip_debug)]
pub(super) enum CompareTarget {
    #[prost(int64, tag = "5")]
    CreateRevision(i64),
    #[prost(int64, tag = "6")]
    ModRevision(i64),
    #[prost(bytes, tag = "7")]
    Value(Vec<u8>),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(super) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(super) failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(bool, tag = "2")]
    pub(super) succeeded: bool,
}

/// A transaction that only reads.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ReadRequest {
    #[prost(message, repeated, tag = "2")]
    pub(super) reads: Vec<ReadOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ReadOp {
    #[prost(message, optional, tag = "1")]
    pub(super) range: Option<RangeRequest>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ReadResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(message, repeated, tag = "3")]
    pub(super) found: Vec<FoundOp>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct FoundOp {
    #[prost(message, optional, tag = "1")]
    pub(super) range: Option<RangeResponse>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GrantRequest {
    /// Seconds.
    #[prost(int64, tag = "1")]
    pub(super) ttl: i64,
    #[prost(int64, tag = "2")]
    pub(super) id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GrantResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(string, tag = "4")]
    pub(super) error: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RevokeRequest {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RevokeResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TimeToLiveRequest {
    #[prost(int64, tag = "1")]
    pub(super) id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TimeToLiveResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    /// Seconds; -1 when the lease is gone.
    #[prost(int64, tag = "3")]
    pub(super) ttl: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeepAliveRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct KeepAliveResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    /// Seconds; zero when the lease is gone.
    #[prost(int64, tag = "3")]
    pub(super) ttl: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MembersRequest {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MembersResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(message, repeated, tag = "2")]
    pub(super) members: Vec<Member>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Member {
    #[prost(string, repeated, tag = "4")]
    pub(super) client_urls: Vec<String>,
    #[prost(bool, tag = "5")]
    pub(super) is_learner: bool,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) password: String,
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct AuthenticateResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(string, tag = "2")]
    pub(super) token: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchRequest {
    #[prost(oneof = "OneWatchRequest", tags = "1, 3")]
    pub(super) request: Option<OneWatchRequest>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum OneWatchRequest {
    #[prost(message, tag = "1")]
    Create(WatchCreateRequest),
    #[prost(message, tag = "3")]
    Progress(WatchProgressRequest),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub(super) start_revision: i64,
    #[prost(bool, tag = "4")]
    pub(super) progress_notify: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchProgressRequest {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WatchResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) header: Option<Header>,
    /// -1 in an answer to a request for progress.
    #[prost(int64, tag = "2")]
    pub(super) watch_id: i64,
    #[prost(bool, tag = "3")]
    pub(super) created: bool,
    #[prost(bool, tag = "4")]
    pub(super) canceled: bool,
    #[prost(int64, tag = "5")]
    pub(super) compact_revision: i64,
    #[prost(string, tag = "6")]
    pub(super) cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub(super) events: Vec<Event>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Event {
    /// 0: written, 1: deleted.
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) kv: Option<KeyValue>,
}

/// What a range request has to end with to cover everything that starts with `prefix`; the key to begin with comes
/// first, because an empty one means something else to etcd.
pub(super) fn range_of(prefix: &str) -> (Vec<u8>, Vec<u8>) {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return (prefix.as_bytes().to_vec(), end);
        }
    }
    (vec![0], vec![0])
}

/// One member, as one user.
#[derive(Clone)]
pub(super) struct Client {
    channel: Channel,
    token: Option<MetadataValue<Ascii>>,
}

impl Client {
    /// Connects at the first request.
    pub(super) fn new(channel: Channel, token: Option<MetadataValue<Ascii>>) -> Self {
        Self { channel, token }
    }

    fn dress<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        // A member that is cut off from the others says so instead of letting us wait.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    async fn ready(&self) -> Result<tonic::client::Grpc<Channel>, Status> {
        let mut grpc =
            tonic::client::Grpc::new(self.channel.clone()).max_decoding_message_size(MOST_ANSWER_BYTES);
        grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
        Ok(grpc)
    }

    pub(super) async fn ask<R: Request>(&self, request: R) -> Result<R::Answer, Status> {
        let codec = tonic_prost::ProstCodec::<R, R::Answer>::default();
        let path = PathAndQuery::from_static(R::PATH);
        Ok(self.ready().await?.unary(self.dress(request), path, codec).await?.into_inner())
    }

    /// Renews a lease once.
    pub(super) async fn keep_alive(&self, lease: i64) -> Result<KeepAliveResponse, Status> {
        let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
        let codec = tonic_prost::ProstCodec::<KeepAliveRequest, KeepAliveResponse>::default();
        let once = self.dress(tokio_stream::once(KeepAliveRequest { id: lease }));
        let mut answers = self.ready().await?.streaming(once, path, codec).await?.into_inner();
        answers.message().await?.ok_or_else(|| Status::unavailable("the keep-alive was not answered"))
    }

    /// Opens a stream of changes; more requests go through the sender.
    pub(super) async fn watch(
        &self,
        create: WatchCreateRequest,
    ) -> Result<(mpsc::Sender<WatchRequest>, Streaming<WatchResponse>), Status> {
        let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let codec = tonic_prost::ProstCodec::<WatchRequest, WatchResponse>::default();
        // Room for the request that creates the watch and a few for progress that nobody has read yet.
        let (sender, requests) = mpsc::channel(8);
        let create = WatchRequest { request: Some(OneWatchRequest::Create(create)) };
        sender.send(create).await.map_err(|_| Status::internal("the watch was closed"))?;
        let requests = self.dress(ReceiverStream::new(requests));
        let answers = self.ready().await?.streaming(requests, path, codec).await?.into_inner();
        Ok((sender, answers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_a_prefix_and_nothing_else() {
        assert_eq!(range_of("a/"), (b"a/".to_vec(), b"a0".to_vec()));
        assert_eq!(range_of("a\u{7f}"), (b"a\x7f".to_vec(), b"a\x80".to_vec()));
        assert_eq!(range_of(""), (vec![0], vec![0]));
    }

    #[test]
    fn secrets_are_not_shown() {
        let put = PutRequest { key: b"key".to_vec(), value: b"secret".to_vec(), lease: 0 };
        let op = RequestOp { op: Some(OneOp::Put(put)) };
        let txn = TxnRequest {
            compare: vec![Compare {
                target: VALUE,
                key: b"key".to_vec(),
                to: Some(CompareTarget::Value(b"secret".to_vec())),
            }],
            success: vec![op],
            failure: Vec::new(),
        };
        let login = AuthenticateRequest { name: "me".to_owned(), password: "secret".to_owned() };
        let bytes = format!("{:?}", b"secret");
        for shown in [format!("{txn:?}"), format!("{login:?}")] {
            assert!(!shown.contains("secret") && !shown.contains(&bytes[1..bytes.len() - 1]), "{shown}");
        }
    }
}
