//! A peer that says whatever a test wants.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use heartbeatpb::wire::proto::Message as Envelope;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use messaging::grpc::PATH;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

struct Channel(SendRequest<Body>);

impl Service<Request<Body>> for Channel {
    type Response = Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// A stream to a node, without any of the rules.
pub(crate) struct Raw {
    pub(crate) out: mpsc::UnboundedSender<Envelope>,
    pub(crate) inbound: Streaming<Envelope>,
}

impl Raw {
    /// Opens a stream with a first frame; an error is the node's answer.
    pub(crate) async fn open(address: &str, first: Option<Envelope>) -> Result<Self, Status> {
        let stream = TcpStream::connect(address).await.unwrap();
        let (requests, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let origin: Uri = format!("http://{address}").parse().unwrap();
        let (out, frames) = mpsc::unbounded_channel();
        match first {
            Some(first) => out.send(first).unwrap(),
            None => return Self::empty(requests, origin).await,
        }
        let mut grpc = Grpc::with_origin(Channel(requests), origin);
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<Envelope, Envelope>::default();
        let request = tonic::Request::new(UnboundedReceiverStream::new(frames));
        let response = grpc.streaming(request, PATH.parse().unwrap(), codec).await?;
        Ok(Self { out, inbound: response.into_inner() })
    }

    /// A stream that ends before its first frame.
    async fn empty(requests: SendRequest<Body>, origin: Uri) -> Result<Self, Status> {
        let mut grpc = Grpc::with_origin(Channel(requests), origin);
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<Envelope, Envelope>::default();
        let request = tonic::Request::new(tokio_stream::empty());
        let response = grpc.streaming(request, PATH.parse().unwrap(), codec).await?;
        let (out, _) = mpsc::unbounded_channel();
        Ok(Self { out, inbound: response.into_inner() })
    }
}

/// A first frame.
pub(crate) fn greeting(from: &str, to: &str, class: &str) -> Envelope {
    let json = format!(r#"{{"Version":1,"Timestamp":1700000000,"StreamType":"{class}"}}"#);
    frame(36, from, to, "", vec![Bytes::from(json)])
}

pub(crate) fn frame(number: i32, from: &str, to: &str, topic: &str, payload: Vec<Bytes>) -> Envelope {
    Envelope {
        r#type: number,
        from: from.to_owned(),
        to: to.to_owned(),
        topic: topic.to_owned(),
        payload,
        sequence: 0,
    }
}

/// Makes a connection and sends bytes that are no HTTP/2.
pub(crate) async fn babble(address: &str, bytes: &[u8]) -> Result<(), Infallible> {
    use tokio::io::AsyncWriteExt as _;
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The node may have closed the connection already.
    let _ = stream.write_all(bytes).await;
    Ok(())
}
