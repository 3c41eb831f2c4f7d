//! Statements that belong together: sent without waiting in between, and answered together.
//!
//! The extended query protocol of the PostgreSQL manual ("Pipelining"), with one `Sync` behind the last statement. The
//! first that fails ends the exchange: the server steps over the others.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::IsNull;
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend::{self, BindError};
use postgres_types::Type;
use rustc_hash::FxHashMap;
use tokio::io::ReadBuf;

use super::connection::Connection;
use super::failure::{Cause, Said};
use super::sql::TextArray;
use super::wire::Turn;

/// Prepared statements that a connection keeps; beyond it the cache starts again.
const MAX_STATEMENTS: usize = 512;
/// Bytes that are gathered before they are sent.
const CHUNK: usize = 64 << 10;
/// A buffer that large parameters have grown beyond this is given back.
const KEEP: usize = 1 << 20;
/// Bytes of one read: answers are short.
const READ: usize = 4 << 10;
/// Code of the binary format.
const BINARY: i16 = 1;

/// One statement, whose parameters are all `text[]`.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) sql: &'a str,
    pub(super) params: &'a [TextArray],
}

impl<'a> Call<'a> {
    /// A statement without parameters.
    pub(super) const fn plain(sql: &'a str) -> Self {
        Self { sql, params: &[] }
    }
}

/// Why not all statements were executed.
#[derive(Debug)]
pub(super) struct Stopped {
    /// How many rows those changed that were, in order; the next is the one that failed.
    pub(super) done: Vec<u64>,
    pub(super) cause: Cause,
}

impl<E: Into<Cause>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self { done: Vec::new(), cause: error.into() }
    }
}

/// The prepared statements of a session, and what is on its way to and from the server.
#[derive(Default)]
pub(super) struct Exchange {
    /// Their names, by their texts.
    names: FxHashMap<Arc<str>, Arc<str>>,
    /// Names given so far.
    given: u64,
    /// Names of statements that the server need not keep any more.
    gone: Vec<Arc<str>>,
    /// Texts that are prepared in this exchange.
    fresh: Vec<Arc<str>>,
    out: BytesMut,
    input: BytesMut,
}

impl Exchange {
    /// Sends statements and waits for their answers. Ends the turn unless the exchange stops in the middle.
    async fn run(&mut self, turn: Turn<'_>, calls: &[Call<'_>]) -> Result<Vec<u64>, Stopped> {
        let mut answers = Answers::default();
        let done = async {
            for name in self.gone.drain(..) {
                frontend::close(b'S', &name, &mut self.out)?;
            }
            for call in calls {
                self.put(call)?;
                if self.out.len() >= CHUNK {
                    self.send(&turn).await?;
                }
            }
            frontend::sync(&mut self.out);
            self.send(&turn).await?;
            self.receive(&turn, &mut answers).await
        };
        let done: io::Result<()> = done.await;
        if done.is_ok() {
            turn.end(self.input.split());
        }
        let Answers { done: counts, prepared, refused } = answers;
        // What the server did not come to is not prepared.
        for text in self.fresh.drain(..).skip(prepared) {
            self.names.remove(&text);
        }
        if self.out.capacity() > KEEP {
            self.out = BytesMut::new();
        }
        // The end of a session is announced by an error.
        match (refused, done) {
            (Some(said), _) => Err(Stopped { done: counts, cause: Cause::Said(said) }),
            (None, Err(error)) => Err(Stopped { done: counts, cause: error.into() }),
            (None, Ok(())) if counts.len() == calls.len() => Ok(counts),
            (None, Ok(())) => Err(unexpected("an answer is missing").into()),
        }
    }

    /// Writes the messages of a statement.
    fn put(&mut self, call: &Call<'_>) -> io::Result<()> {
        let name = self.name(call)?;
        let bound = frontend::bind(
            "",
            &name,
            [BINARY],
            call.params,
            |array, out| {
                array.put(out);
                Ok(IsNull::No)
            },
            [BINARY],
            &mut self.out,
        );
        bound.map_err(|error| match error {
            BindError::Conversion(error) => io::Error::other(error),
            BindError::Serialization(error) => error,
        })?;
        frontend::execute("", 0, &mut self.out)
    }

    /// The name of a statement, which is prepared if it is new.
    fn name(&mut self, call: &Call<'_>) -> io::Result<Arc<str>> {
        if let Some(name) = self.names.get(call.sql) {
            return Ok(Arc::clone(name));
        }
        if self.names.len() >= MAX_STATEMENTS && self.fresh.is_empty() {
            self.gone.extend(self.names.drain().map(|(_, name)| name));
        }
        self.given += 1;
        let name: Arc<str> = format!("millrace_{}", self.given).into();
        let text: Arc<str> = call.sql.into();
        let types = call.params.iter().map(|_| Type::TEXT_ARRAY.oid());
        frontend::parse(&name, &text, types, &mut self.out)?;
        self.fresh.push(Arc::clone(&text));
        self.names.insert(text, Arc::clone(&name));
        Ok(name)
    }

    /// Sends what was written. Takes what the server says meanwhile, or each could wait for the other to read.
    async fn send(&mut self, turn: &Turn<'_>) -> io::Result<()> {
        poll_fn(|cx| {
            loop {
                match self.poll_send(turn, cx) {
                    Poll::Pending => {}
                    Poll::Ready(sent) => return Poll::Ready(sent),
                }
                std::task::ready!(self.poll_fill(turn, cx))?;
            }
        })
        .await
    }

    fn poll_send(&mut self, turn: &Turn<'_>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            match std::task::ready!(turn.poll_write(cx, &self.out))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.out.advance(sent),
            }
        }
        turn.poll_flush(cx)
    }

    /// Waits for more bytes of the server.
    fn poll_fill(&mut self, turn: &Turn<'_>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; READ];
        let mut into = ReadBuf::new(&mut bytes);
        std::task::ready!(turn.poll_read(cx, &mut into))?;
        if into.filled().is_empty() {
            let closed = io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection");
            return Poll::Ready(Err(closed));
        }
        self.input.extend_from_slice(into.filled());
        Poll::Ready(Ok(()))
    }

    /// Takes answers up to the last.
    async fn receive(&mut self, turn: &Turn<'_>, answers: &mut Answers) -> io::Result<()> {
        loop {
            while let Some(message) = Message::parse(&mut self.input)? {
                if answers.take(message)? {
                    return Ok(());
                }
            }
            poll_fn(|cx| self.poll_fill(turn, cx)).await?;
        }
    }
}

/// What the server has answered so far.
#[derive(Default)]
struct Answers {
    /// Rows of the statements that were executed.
    done: Vec<u64>,
    /// How many statements were prepared.
    prepared: usize,
    /// The error that ended the exchange.
    refused: Option<Said>,
}

impl Answers {
    /// Takes one message; true: it was the last.
    #[expect(clippy::wildcard_enum_match_arm, reason = "most messages belong to other exchanges")]
    fn take(&mut self, message: Message) -> io::Result<bool> {
        match message {
            Message::ParseComplete => self.prepared += 1,
            Message::CommandComplete(body) => self.done.push(rows(body.tag()?)?),
            Message::EmptyQueryResponse => self.done.push(0),
            Message::ErrorResponse(body) => {
                let said = said(&body)?;
                self.refused.get_or_insert(said);
            }
            Message::ReadyForQuery(_) => return Ok(true),
            // Acknowledgements, rows that nobody asked for, and what a server may say at any time.
            Message::BindComplete
            | Message::CloseComplete
            | Message::DataRow(_)
            | Message::NoticeResponse(_)
            | Message::NotificationResponse(_)
            | Message::ParameterStatus(_) => {}
            _ => return Err(unexpected("it is none of a statement")),
        }
        Ok(false)
    }
}

/// How many rows a statement concerned, by the tag of its command.
fn rows(tag: &str) -> io::Result<u64> {
    // Nobody sends that here: it answers a COMMIT of a transaction that has failed.
    if tag == "ROLLBACK" {
        return Err(unexpected("the transaction was rolled back"));
    }
    Ok(tag.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0))
}

fn said(body: &ErrorResponseBody) -> io::Result<Said> {
    let mut said = Said::default();
    let mut fields = body.fields();
    while let Some(field) = fields.next()? {
        let text = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => said.code = text(),
            b'M' => said.message = text(),
            b't' => said.table = Some(text()),
            b'c' => said.column = Some(text()),
            b'n' => said.constraint = Some(text()),
            _ => {}
        }
    }
    Ok(said)
}

fn unexpected(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("an answer of the server does not fit: {what}"))
}

impl Connection {
    /// Executes statements in order and says how many rows each concerned.
    ///
    /// # Errors
    /// The first failure; nothing behind it is executed.
    pub(super) async fn run(&mut self, calls: &[Call<'_>]) -> Result<Vec<u64>, Stopped> {
        self.settle().await?;
        let turn = self.wire.turn()?;
        self.exchange.run(turn, calls).await
    }
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::super::wire::{Plain, Wire};
    use super::*;

    fn put(out: &mut BytesMut, tag: u8, body: &[u8]) {
        out.put_u8(tag);
        out.put_u32(u32::try_from(body.len() + 4).unwrap());
        out.put_slice(body);
    }

    /// The kinds of the next messages of a client up to its `Sync`.
    async fn next_asked(server: &mut DuplexStream) -> String {
        let mut tags = String::new();
        while !tags.ends_with('S') {
            tags.push(char::from(server.read_u8().await.unwrap()));
            let len = server.read_u32().await.unwrap() as usize;
            server.read_exact(&mut vec![0; len - 4]).await.unwrap();
        }
        tags
    }

    /// A server that answers each exchange by one of `answers`: kinds of messages and their contents.
    struct Rig {
        exchange: Exchange,
        wire: Wire,
        server: DuplexStream,
    }

    impl Rig {
        fn new() -> Self {
            let (ours, server) = tokio::io::duplex(256);
            Self { exchange: Exchange::default(), wire: Wire::new(Box::new(Plain(ours))), server }
        }

        /// What is asked, and what comes of it.
        async fn run(
            &mut self,
            calls: &[Call<'_>],
            answers: &[(u8, &[u8])],
        ) -> (String, Result<Vec<u64>, Stopped>) {
            let mut bytes = BytesMut::new();
            answers.iter().for_each(|(tag, body)| put(&mut bytes, *tag, body));
            let server = async {
                let asked = next_asked(&mut self.server).await;
                self.server.write_all(&bytes).await.unwrap();
                asked
            };
            let turn = self.wire.turn().unwrap();
            tokio::join!(server, self.exchange.run(turn, calls))
        }
    }

    const READY: (u8, &[u8]) = (b'Z', b"I");
    const CONFLICT: (u8, &[u8]) = (b'E', b"SERROR\0C23505\0Mduplicate\0tt\0nkey\0\0");

    #[tokio::test]
    async fn one_sync_is_behind_all_statements_and_each_is_prepared_once() {
        let mut rig = Rig::new();
        let mut array = TextArray::new(1);
        array.push_text("a value");
        let params = [array];
        let calls = [Call::plain("BEGIN"), Call { sql: "UPDATE", params: &params }];
        let answers: [(u8, &[u8]); 7] = [
            (b'1', b""),
            (b'2', b""),
            (b'C', b"BEGIN\0"),
            (b'1', b""),
            (b'2', b""),
            (b'C', b"UPDATE 3\0"),
            READY,
        ];
        let (asked, done) = rig.run(&calls, &answers).await;
        assert_eq!((asked.as_str(), done.unwrap()), ("PBEPBES", vec![0, 3]));
        let answers: [(u8, &[u8]); 5] =
            [(b'2', b""), (b'C', b"BEGIN\0"), (b'2', b""), (b'C', b"UPDATE 1\0"), READY];
        let (asked, done) = rig.run(&calls, &answers).await;
        assert_eq!((asked.as_str(), done.unwrap()), ("BEBES", vec![0, 1]));
    }

    #[tokio::test]
    async fn the_first_failure_ends_the_exchange_and_what_was_not_prepared_is_prepared_again() {
        let mut rig = Rig::new();
        let calls = ["a", "b", "c"].map(Call::plain);
        let answers: [(u8, &[u8]); 7] =
            [(b'1', b""), (b'2', b""), (b'C', b"DELETE 2\0"), (b'1', b""), (b'2', b""), CONFLICT, READY];
        let (asked, done) = rig.run(&calls, &answers).await;
        let Stopped { done, cause } = done.unwrap_err();
        assert_eq!((asked.as_str(), done), ("PBEPBEPBES", vec![2]));
        let Cause::Said(said) = cause else { panic!("{cause:?}") };
        assert_eq!((said.code.as_str(), said.table.as_deref()), ("23505", Some("t")));
        let answers: [(u8, &[u8]); 3] = [(b'2', b""), CONFLICT, READY];
        let (asked, done) = rig.run(&calls, &answers).await;
        assert_eq!((asked.as_str(), done.unwrap_err().done.len()), ("BEBEPBES", 0), "only the third is new");
    }

    #[tokio::test]
    async fn a_session_that_is_ended_says_why() {
        let mut bytes = BytesMut::new();
        put(&mut bytes, b'E', b"SFATAL\0C57P01\0Mterminating\0\0");
        let Rig { mut exchange, wire, mut server } = Rig::new();
        let calls = [Call::plain("a")];
        let ends = async {
            next_asked(&mut server).await;
            server.write_all(&bytes).await.unwrap();
            drop(server);
        };
        let turn = wire.turn().unwrap();
        let ((), done) = tokio::join!(ends, exchange.run(turn, &calls));
        let stopped = done.unwrap_err();
        assert!(matches!(&stopped.cause, Cause::Said(said) if said.code == "57P01"), "{stopped:?}");
        assert!(wire.turn().is_err(), "the stream is given up");
    }

    #[tokio::test]
    async fn answers_that_do_not_fit_are_refused() {
        for answers in [
            &[(b'1', &b""[..]), (b'2', b""), READY][..],
            &[(b'1', b""), (b'2', b""), (b'C', b"ROLLBACK\0"), READY],
            &[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0"), READY],
        ] {
            let mut rig = Rig::new();
            let (_, done) = rig.run(&[Call::plain("COMMIT")], answers).await;
            assert!(matches!(done, Err(Stopped { cause: Cause::Gone(_), .. })), "{done:?}");
        }
    }

    #[tokio::test]
    async fn more_than_the_network_holds_is_sent_while_answers_come() {
        let mut rig = Rig::new();
        let mut array = TextArray::new(1);
        array.push_text(&"x".repeat(3 * CHUNK));
        let params = [array];
        let calls = [Call { sql: "INSERT", params: &params }];
        let answers: [(u8, &[u8]); 4] = [(b'1', b""), (b'2', b""), (b'C', b"INSERT 0 1\0"), READY];
        let (asked, done) = rig.run(&calls, &answers).await;
        assert_eq!((asked.as_str(), done.unwrap()), ("PBES", vec![1]));
        // A server that complains at length before it has read everything is listened to.
        let notice = "n".repeat(200);
        let (mut bytes, mut end) = (BytesMut::new(), BytesMut::new());
        (0..20).for_each(|_| put(&mut bytes, b'N', notice.as_bytes()));
        for (tag, body) in &answers[1..] {
            put(&mut end, *tag, body);
        }
        let turn = rig.wire.turn().unwrap();
        let server = async {
            rig.server.write_all(&bytes).await.unwrap();
            let asked = next_asked(&mut rig.server).await;
            rig.server.write_all(&end).await.unwrap();
            asked
        };
        let (asked, done) = tokio::join!(server, rig.exchange.run(turn, &calls));
        assert_eq!((asked.as_str(), done.unwrap()), ("BES", vec![1]));
    }

    #[tokio::test]
    async fn a_session_does_not_keep_statements_without_end() {
        let mut rig = Rig::new();
        let one: [(u8, &[u8]); 4] = [(b'1', b""), (b'2', b""), (b'C', b"SELECT 0\0"), READY];
        for at in 0..MAX_STATEMENTS {
            let (asked, done) = rig.run(&[Call::plain(&format!("s{at}"))], &one).await;
            assert!(asked == "PBES" && done.is_ok());
        }
        assert_eq!(rig.run(&[Call::plain("s0")], &one[1..]).await.0, "BES");
        assert_eq!(rig.run(&[Call::plain("new")], &one).await.0, "PBES");
        let mut closed = vec![(b'3', &b""[..]); MAX_STATEMENTS];
        closed.extend(one);
        let (asked, done) = rig.run(&[Call::plain("s0")], &closed).await;
        assert!(asked == format!("{}PBES", "C".repeat(MAX_STATEMENTS)) && done.is_ok());
    }
}
