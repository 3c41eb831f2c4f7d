//! One row image in a contiguous buffer.

use bytes::{BufMut, Bytes, BytesMut};

/// A value of a column.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Datum<'a> {
    /// SQL NULL.
    Null,
    /// The upstream did not send it because the statement left it as it was (an out-of-line TOAST value),
    /// or because the image holds only the replica identity. Never means NULL.
    Unchanged,
    /// The text form, as the upstream's output function writes it.
    Text(&'a [u8]),
}

impl std::fmt::Debug for Datum<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Datum::Null => f.write_str("null"),
            Datum::Unchanged => f.write_str("unchanged"),
            Datum::Text(text) => write!(f, "<{} bytes>", text.len()),
        }
    }
}

const NULL: u32 = u32::MAX;
const UNCHANGED: u32 = u32::MAX - 1;

/// Longest value that the encoding can carry; PostgreSQL's limit is 1 GiB.
pub const MAX_DATUM_BYTES: usize = (u32::MAX - 2) as usize;

/// Appends one tuple to a buffer: a column count, then each value behind its length.
///
/// [`TupleWriter::finish`] must be called; it fills in the count.
#[derive(Debug)]
pub struct TupleWriter<'a> {
    out: &'a mut BytesMut,
    count_at: usize,
    count: u16,
}

impl<'a> TupleWriter<'a> {
    /// Starts a tuple at the end of `out`.
    pub fn new(out: &'a mut BytesMut) -> Self {
        let count_at = out.len();
        out.put_u16(0);
        Self { out, count_at, count: 0 }
    }

    /// Appends a value.
    ///
    /// # Panics
    /// When a value is longer than [`MAX_DATUM_BYTES`], or after 65,535 columns; decoders check before.
    pub fn push(&mut self, datum: Datum<'_>) {
        match datum {
            Datum::Null => self.out.put_u32(NULL),
            Datum::Unchanged => self.out.put_u32(UNCHANGED),
            Datum::Text(text) => {
                assert!(text.len() <= MAX_DATUM_BYTES, "decoders bound the length of a value");
                self.out.put_u32(u32::try_from(text.len()).expect("bounded just above"));
                self.out.put_slice(text);
            }
        }
        self.count = self.count.checked_add(1).expect("a table has at most 1,600 columns");
    }

    /// Writes the count.
    pub fn finish(self) {
        self.out[self.count_at..self.count_at + 2].copy_from_slice(&self.count.to_be_bytes());
    }
}

/// One row image: values in the order of the table's columns. Cheap to copy; borrows the batch.
#[derive(Clone, Copy)]
pub struct Tuple<'a>(&'a [u8]);

impl std::fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> Tuple<'a> {
    /// Views an encoded tuple, checking every length; `None` when the bytes are no tuple.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (count, mut rest) = bytes.split_first_chunk::<2>()?;
        for _ in 0..u16::from_be_bytes(*count) {
            let (len, tail) = rest.split_first_chunk::<4>()?;
            let len = u32::from_be_bytes(*len);
            rest = if len >= UNCHANGED { tail } else { tail.get(len as usize..)? };
        }
        rest.is_empty().then_some(Self(bytes))
    }

    /// A tuple whose bytes were written by [`TupleWriter`] in this process.
    pub(crate) fn trusted(bytes: &'a [u8]) -> Self {
        debug_assert!(Self::parse(bytes).is_some());
        Self(bytes)
    }

    /// Number of columns.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(u16::from_be_bytes([self.0[0], self.0[1]]))
    }

    /// Whether it has no columns.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The encoded form.
    #[must_use]
    pub fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// The values in column order.
    #[must_use]
    pub fn iter(&self) -> Datums<'a> {
        Datums(&self.0[2..])
    }

    /// The value of one column; walks the values before it.
    #[must_use]
    pub fn get(&self, column: usize) -> Option<Datum<'a>> {
        self.iter().nth(column)
    }
}

/// Iterator over the values of a [`Tuple`].
#[derive(Clone, Debug)]
pub struct Datums<'a>(&'a [u8]);

impl<'a> Iterator for Datums<'a> {
    type Item = Datum<'a>;

    fn next(&mut self) -> Option<Datum<'a>> {
        let (len, tail) = self.0.split_first_chunk::<4>()?;
        let len = u32::from_be_bytes(*len);
        let (datum, rest) = match len {
            NULL => (Datum::Null, tail),
            UNCHANGED => (Datum::Unchanged, tail),
            len => {
                let (text, rest) = tail.split_at(len as usize);
                (Datum::Text(text), rest)
            }
        };
        self.0 = rest;
        Some(datum)
    }
}

/// Encodes values as an owned tuple buffer; for tests and small producers.
#[must_use]
pub fn encode_tuple<'a>(values: impl IntoIterator<Item = Datum<'a>>) -> Bytes {
    let mut out = BytesMut::new();
    let mut writer = TupleWriter::new(&mut out);
    for value in values {
        writer.push(value);
    }
    writer.finish();
    out.freeze()
}
