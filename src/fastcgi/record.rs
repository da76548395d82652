//! FastCGI 1.0 records: the codec, strict in what it takes and exact in what it writes. No I/O.
//!
//! ```text
//!      0         1         2         3         4         5         6         7
//! ┌─────────┬─────────┬─────────┬─────────┬─────────┬─────────┬─────────┬─────────┐
//! │ version │  type   │     request id    │   content length  │ padding │reserved │
//! ├─────────┴─────────┴─────────┴─────────┴─────────┴─────────┴─────────┴─────────┤
//! │ content: BEGIN_REQUEST  role (2)  flags (1)  0 (5)                            │
//! │          PARAMS         name length (1|4)  value length (1|4)  name  value …  │
//! │          END_REQUEST    appStatus (4)  protocolStatus (1)  0 (3)              │
//! │          STDIN, STDOUT, STDERR  bytes                                         │
//! ├───────────────────────────────────────────────────────────────────────────────┤
//! │ padding, never looked at                                                      │
//! └───────────────────────────────────────────────────────────────────────────────┘
//!
//!   ──▶  BEGIN_REQUEST  PARAMS…  PARAMS(0)  STDIN…  STDIN(0)
//!   ◀──  (STDOUT | STDERR)…  END_REQUEST
//! ```
//!
//! An empty PARAMS or STDIN record ends its stream. So a length that wrapped to 0 would turn the bytes behind it into
//! records of a client's choosing: lengths are `u16` from where they are counted, and are never cast.

use std::{fmt, iter};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::{Error, Kind};

/// The only request id in use: FPM does not multiplex (`FCGI_MPXS_CONNS` is "0" in php-src `fcgi_init`).
pub const REQUEST_ID: u16 = 1;
/// Content and padding of one record together (`FCGI_MAX_LENGTH` in php-src).
pub const MAX_CONTENT: usize = 65_535;
/// The largest content of a STDIN record that keeps records aligned without padding; php-src `fcgi_write` uses it too.
pub const ALIGNED_CONTENT: usize = 65_528;
pub const HEADER_LEN: usize = 8;

/// Record types (FastCGI 1.0, section 8).
pub mod kind {
    pub const BEGIN_REQUEST: u8 = 1;
    pub const END_REQUEST: u8 = 3;
    pub const PARAMS: u8 = 4;
    pub const STDIN: u8 = 5;
    pub const STDOUT: u8 = 6;
    pub const STDERR: u8 = 7;
}

const VERSION: u8 = 1;
const ROLE_RESPONDER: u16 = 1;
pub(super) const KEEP_CONN: u8 = 1;

/// The eight bytes before a record's content.
pub fn header(kind: u8, id: u16, content: u16, padding: u8) -> [u8; HEADER_LEN] {
    let [i1, i0] = id.to_be_bytes();
    let [c1, c0] = content.to_be_bytes();
    [VERSION, kind, i1, i0, c1, c0, padding, 0]
}

/// FCGI_BEGIN_REQUEST in the role of RESPONDER; `keep` is FCGI_KEEP_CONN.
pub fn put_begin_request(out: &mut BytesMut, keep: bool) {
    let [r1, r0] = ROLE_RESPONDER.to_be_bytes();
    out.put_slice(&header(kind::BEGIN_REQUEST, REQUEST_ID, 8, 0));
    out.put_slice(&[r1, r0, if keep { KEEP_CONN } else { 0 }, 0, 0, 0, 0, 0]);
}

/// STDIN records for `content`. None at all where it is empty: an empty record is [`put_stdin_end`].
pub fn put_stdin(out: &mut BytesMut, content: &[u8]) {
    out.reserve(content.len() + HEADER_LEN);
    for piece in content.chunks(ALIGNED_CONTENT) {
        // Cannot fail on a chunk of at most ALIGNED_CONTENT.
        if let Ok(len) = u16::try_from(piece.len()) {
            out.put_slice(&stdin_header(len));
            out.put_slice(piece);
        }
    }
}

/// The header of a STDIN record of `len` bytes without padding, for vectored writes. 0 would end the stream.
pub fn stdin_header(len: u16) -> [u8; HEADER_LEN] {
    header(kind::STDIN, REQUEST_ID, len, 0)
}

pub fn put_stdin_end(out: &mut BytesMut) {
    out.put_slice(&stdin_header(0));
}

/// Writes the PARAMS stream straight into a buffer; each record's length is filled in when it closes.
///
/// Records are split between pairs only: php-src `fcgi_read_request` hands each record to `fcgi_get_params` by itself,
/// so that a pair across two records is a malformed request to FPM, whatever the specification allows.
#[derive(Debug)]
pub struct ParamsWriter<'a> {
    out: &'a mut BytesMut,
    /// Where the header of the open record stands.
    header: usize,
    /// Bytes of content in the open record. Its overflow is the limit of a record.
    content: u16,
}

/// A pair that does not fit into one record cannot be sent to FPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairTooLong {
    pub name: Vec<u8>,
    /// As encoded, with its two lengths.
    pub bytes: usize,
}

impl<'a> ParamsWriter<'a> {
    pub fn new(out: &'a mut BytesMut) -> Self {
        let header = open_params(out);
        ParamsWriter { out, header, content: 0 }
    }

    pub fn pair(&mut self, name: &[u8], value: &[u8]) -> Result<(), PairTooLong> {
        // Nearly all are so short that one byte tells each length, and find room in the open record.
        if let (Ok(n @ 0..0x80), Ok(v @ 0..0x80)) = (u8::try_from(name.len()), u8::try_from(value.len()))
            && let Some(content) = self.content.checked_add(2 + u16::from(n) + u16::from(v))
        {
            self.content = content;
            self.out.extend_from_slice(&[n, v]);
            self.out.extend_from_slice(name);
            self.out.extend_from_slice(value);
            return Ok(());
        }
        self.pair_joined(name, b"", |_| {}, || iter::once(value), b"")
    }

    /// A pair named `prefix` and `name`, `name` as `fold` rewrites it in place, with `values()` joined by `separator`.
    /// Nothing is allocated: the parts are measured first and then copied, so both runs must yield the same.
    pub fn pair_joined<'v, V: Iterator<Item = &'v [u8]>>(
        &mut self,
        prefix: &[u8],
        name: &[u8],
        fold: impl Fn(&mut [u8]),
        values: impl Fn() -> V,
        separator: &[u8],
    ) -> Result<(), PairTooLong> {
        let value = values().map(|part| part.len() + separator.len()).sum::<usize>().saturating_sub(separator.len());
        if let Err(bytes) = self.begin(prefix.len() + name.len(), value) {
            let mut folded = name.to_vec();
            fold(&mut folded);
            return Err(PairTooLong { name: [prefix, &folded].concat(), bytes });
        }
        self.out.put_slice(prefix);
        let start = self.out.len();
        self.out.put_slice(name);
        fold(&mut self.out[start..]);
        for (i, part) in values().enumerate() {
            if i > 0 {
                self.out.put_slice(separator);
            }
            self.out.put_slice(part);
        }
        Ok(())
    }

    /// Closes the last record and writes the empty one that ends the stream.
    pub fn finish(mut self) {
        // An open record without content is that empty record already.
        if self.content > 0 {
            self.seal();
            open_params(self.out);
        }
    }

    /// Makes room and writes the two lengths, or says how long the pair would be.
    fn begin(&mut self, name: usize, value: usize) -> Result<(), usize> {
        let bytes = len_bytes(name) + len_bytes(value) + name + value;
        let (Ok(name), Ok(value), Ok(pair)) = (u16::try_from(name), u16::try_from(value), u16::try_from(bytes)) else {
            return Err(bytes);
        };
        self.out.reserve(HEADER_LEN + bytes);
        match self.content.checked_add(pair) {
            Some(content) => self.content = content,
            None => {
                self.seal();
                self.header = open_params(self.out);
                self.content = pair;
            }
        }
        put_len(self.out, name);
        put_len(self.out, value);
        Ok(())
    }

    fn seal(&mut self) {
        self.out[self.header + 4..self.header + 6].copy_from_slice(&self.content.to_be_bytes());
    }
}

/// Writes the header of an empty PARAMS record and says where it stands.
fn open_params(out: &mut BytesMut) -> usize {
    let at = out.len();
    out.put_slice(&header(kind::PARAMS, REQUEST_ID, 0, 0));
    at
}

/// Bytes that a name's or value's length takes (FastCGI 1.0, section 3.4).
fn len_bytes(len: usize) -> usize {
    if len < 0x80 { 1 } else { 4 }
}

fn put_len(out: &mut BytesMut, len: u16) {
    match u8::try_from(len) {
        Ok(short @ 0..0x80) => out.put_u8(short),
        _ => out.put_u32(u32::from(len) | 0x8000_0000),
    }
}

/// What the application says, piece by piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Never empty.
    Stdout(Bytes),
    /// Never empty.
    Stderr(Bytes),
    /// FPM's appStatus is always 0 (php-src `fcgi_flush`).
    End { app_status: u32, protocol_status: u8 },
}

/// An application that does not speak FastCGI 1.0, or not to us. The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    Version(u8),
    /// Anything but STDOUT, STDERR and END_REQUEST.
    Type(u8),
    RequestId(u16),
    /// END_REQUEST with a content of so many bytes; it has 8.
    BadEnd(u16),
    /// Something follows END_REQUEST.
    AfterEnd,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Version(v) => write!(f, "a record of version {v}; is there FastCGI at this address?"),
            ProtocolError::Type(t) => write!(f, "a record of type {t}, which an application does not send"),
            ProtocolError::RequestId(id) => write!(f, "a record of request {id}; only {REQUEST_ID} was begun"),
            ProtocolError::BadEnd(len) => write!(f, "END_REQUEST of {len} bytes instead of 8"),
            ProtocolError::AfterEnd => f.write_str("bytes after END_REQUEST"),
        }
    }
}

impl std::error::Error for ProtocolError {}

impl From<ProtocolError> for Error {
    fn from(error: ProtocolError) -> Self {
        Error::new(Kind::UpstreamProtocol, error.to_string())
    }
}

/// Reads one answer. Content is given on as it arrives and without a copy: a record is never waited for.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Header,
    Content {
        stderr: bool,
        left: u16,
        padding: u8,
    },
    Padding(u8),
    End {
        padding: u8,
    },
    Ended,
}

impl Decoder {
    /// The next piece of the answer, or `None` until more has been read into `buf`. After an error it must not be used
    /// again; after [`Frame::End`] only once [`Decoder::reset`].
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, ProtocolError> {
        // A loop, for an application may send any number of empty records in a row.
        loop {
            match self.state {
                State::Header => {
                    let Some(&header) = buf.first_chunk::<HEADER_LEN>() else { return Ok(None) };
                    self.state = after_header(header)?;
                    buf.advance(HEADER_LEN);
                }
                State::Content { left: 0, padding, .. } => self.state = State::Padding(padding),
                State::Content { stderr, left, padding } => {
                    if buf.is_empty() {
                        return Ok(None);
                    }
                    // More than a u16 is there: all that is left of the record is.
                    let size = u16::try_from(buf.len()).map_or(left, |there| there.min(left));
                    self.state = State::Content { stderr, left: left - size, padding };
                    let piece = buf.split_to(usize::from(size)).freeze();
                    return Ok(Some(if stderr { Frame::Stderr(piece) } else { Frame::Stdout(piece) }));
                }
                State::Padding(0) => self.state = State::Header,
                State::Padding(left) => {
                    if buf.is_empty() {
                        return Ok(None);
                    }
                    let size = u8::try_from(buf.len()).map_or(left, |there| there.min(left));
                    buf.advance(usize::from(size));
                    self.state = State::Padding(left - size);
                }
                State::End { padding } => {
                    // With its padding, lest that be taken for the beginning of the next answer on a kept connection.
                    let Some(&[a, b, c, d, protocol_status, ..]) = buf.first_chunk::<8>() else { return Ok(None) };
                    if buf.len() < 8 + usize::from(padding) {
                        return Ok(None);
                    }
                    buf.advance(8 + usize::from(padding));
                    self.state = State::Ended;
                    return Ok(Some(Frame::End { app_status: u32::from_be_bytes([a, b, c, d]), protocol_status }));
                }
                State::Ended if buf.is_empty() => return Ok(None),
                State::Ended => return Err(ProtocolError::AfterEnd),
            }
        }
    }

    /// Whether the bytes taken so far end with a whole record.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header | State::Padding(0) | State::Content { left: 0, padding: 0, .. } | State::Ended)
    }

    /// For the next request on a kept connection.
    pub fn reset(&mut self) {
        self.state = State::Header;
    }
}

fn after_header([version, kind, i1, i0, c1, c0, padding, _]: [u8; HEADER_LEN]) -> Result<State, ProtocolError> {
    let (id, left) = (u16::from_be_bytes([i1, i0]), u16::from_be_bytes([c1, c0]));
    match (version, kind, id) {
        (VERSION, kind::STDOUT, REQUEST_ID) => Ok(State::Content { stderr: false, left, padding }),
        (VERSION, kind::STDERR, REQUEST_ID) => Ok(State::Content { stderr: true, left, padding }),
        (VERSION, kind::END_REQUEST, REQUEST_ID) if left == 8 => Ok(State::End { padding }),
        (VERSION, kind::END_REQUEST, REQUEST_ID) => Err(ProtocolError::BadEnd(left)),
        (VERSION, kind::STDOUT | kind::STDERR | kind::END_REQUEST, id) => Err(ProtocolError::RequestId(id)),
        (VERSION, kind, _) => Err(ProtocolError::Type(kind)),
        (version, ..) => Err(ProtocolError::Version(version)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::fastcgi::responder::parse_params;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;
    /// STDOUT, STDERR, protocolStatus.
    type Answer = (Vec<u8>, Vec<u8>, Option<u8>);

    fn encode(pairs: &Pairs) -> BytesMut {
        let mut out = BytesMut::new();
        let mut writer = ParamsWriter::new(&mut out);
        for (name, value) in pairs {
            writer.pair(name, value).unwrap();
        }
        writer.finish();
        out
    }

    /// The records of a stream: type and content.
    fn records(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
        let mut all = Vec::new();
        while let Some((&[1, kind, 0, 1, c1, c0, 0, 0], rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
            let (content, rest) = rest.split_at(usize::from(u16::from_be_bytes([c1, c0])));
            all.push((kind, content));
            bytes = rest;
        }
        assert!(bytes.is_empty());
        all
    }

    /// As FPM reads it: each record by itself, up to the empty one, which is the last.
    fn read_as_fpm(stream: &[u8]) -> Pairs {
        let mut records = records(stream);
        assert_eq!(records.pop(), Some((kind::PARAMS, &[][..])));
        assert!(records.iter().all(|(kind, content)| *kind == kind::PARAMS && !content.is_empty()));
        records.iter().flat_map(|(_, content)| parse_params(content).unwrap()).collect()
    }

    /// All frames, with pieces of the same stream joined.
    fn decode_in(bytes: &[u8], cut: usize) -> Result<Answer, ProtocolError> {
        let (mut decoder, mut buf) = (Decoder::default(), BytesMut::new());
        let (mut stdout, mut stderr, mut end) = (Vec::new(), Vec::new(), None);
        for piece in bytes.chunks(cut) {
            buf.extend_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buf)? {
                match frame {
                    Frame::Stdout(piece) => stdout.extend_from_slice(&piece),
                    Frame::Stderr(piece) => stderr.extend_from_slice(&piece),
                    Frame::End { protocol_status, .. } => end = Some(protocol_status),
                }
            }
        }
        assert!(end.is_none() || decoder.at_boundary());
        Ok((stdout, stderr, end))
    }

    fn record(kind: u8, content: &[u8], padding: u8) -> Vec<u8> {
        let mut bytes = header(kind, REQUEST_ID, u16::try_from(content.len()).unwrap(), padding).to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len() + usize::from(padding), b'p');
        bytes
    }

    #[test]
    fn a_request_is_these_bytes() {
        let mut out = BytesMut::new();
        put_begin_request(&mut out, true);
        let mut params = ParamsWriter::new(&mut out);
        params.pair(b"A", b"bc").unwrap();
        params.pair_joined(b"HTTP_", b"x", <[u8]>::make_ascii_uppercase, || [&b"1"[..], b"2"].into_iter(), b", ").unwrap();
        params.finish();
        put_stdin(&mut out, b"hi");
        put_stdin_end(&mut out);
        assert_eq!(out[..24], [1, 1, 0, 1, 0, 8, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 4, 0, 1, 0, 17, 0, 0]);
        assert_eq!(out[24..41], *b"\x01\x02Abc\x06\x04HTTP_X1, 2");
        assert_eq!(out[41..], *b"\x01\x04\0\x01\0\0\0\0\x01\x05\0\x01\0\x02\0\0hi\x01\x05\0\x01\0\0\0\0");
    }

    #[test]
    fn lengths_change_size_at_128() {
        assert_eq!(encode(&vec![])[..], header(kind::PARAMS, 1, 0, 0));
        assert_eq!(encode(&vec![(b"N".to_vec(), vec![b'v'; 127])])[8..11], [1, 127, b'N']);
        assert_eq!(encode(&vec![(b"N".to_vec(), vec![b'v'; 128])])[8..14], [1, 0x80, 0, 0, 128, b'N']);
        for len in [0, 1, 127, 128, 255, 256] {
            let pairs = vec![(vec![b'n'; len], vec![b'v'; len]), (b"LAST".to_vec(), b"".to_vec())];
            assert_eq!(read_as_fpm(&encode(&pairs)), pairs);
        }
    }

    #[test]
    fn a_pair_may_fill_a_record_and_not_more() {
        let fits = MAX_CONTENT - 1 - 4 - 1;
        let pairs = vec![(b"N".to_vec(), vec![b'v'; fits]), (b"M".to_vec(), b"w".to_vec())];
        let out = encode(&pairs);
        assert_eq!(read_as_fpm(&out), pairs);
        assert_eq!(records(&out).iter().map(|(_, content)| content.len()).collect::<Vec<_>>(), [65_535, 4, 0]);
        for len in [fits + 1, MAX_CONTENT, 65_536, 70_000] {
            let mut out = BytesMut::new();
            let mut writer = ParamsWriter::new(&mut out);
            let value = vec![b'v'; len];
            let error = writer.pair(b"N", &value).unwrap_err();
            assert_eq!(error, PairTooLong { name: b"N".to_vec(), bytes: len + 6 });
            assert_eq!(writer.pair_joined(b"", b"N", |_| {}, || [&value[..]].into_iter(), b""), Err(error));
            // The refused pair has left nothing behind.
            writer.pair(b"A", b"b").unwrap();
            writer.finish();
            assert_eq!(read_as_fpm(&out), [(b"A".to_vec(), b"b".to_vec())]);
        }
    }

    #[test]
    fn stdin_is_split_and_never_empty() {
        let a = ALIGNED_CONTENT;
        for (len, sizes) in [
            (0, vec![]),
            (1, vec![1]),
            (a, vec![a]),
            (a + 1, vec![a, 1]),
            (65_535, vec![a, 7]),
            (65_536, vec![a, 8]),
            (2 * a + 1, vec![a, a, 1]),
        ] {
            let body: Vec<u8> = (0..=255).cycle().take(len).collect();
            let mut out = BytesMut::new();
            put_stdin(&mut out, &body);
            let records = records(&out);
            assert_eq!(records.iter().map(|(_, content)| content.len()).collect::<Vec<_>>(), sizes);
            assert_eq!(records.into_iter().flat_map(|(_, content)| content.to_vec()).collect::<Vec<_>>(), body);
        }
    }

    #[test]
    fn content_is_given_on_before_its_record_is_whole() {
        let (mut decoder, mut buf) = (Decoder::default(), BytesMut::new());
        buf.extend_from_slice(&record(kind::STDOUT, &[b'x'; 65_535], 3)[..10]);
        assert_eq!(decoder.decode(&mut buf), Ok(Some(Frame::Stdout(Bytes::from_static(b"xx")))));
        assert_eq!(decoder.decode(&mut buf), Ok(None));
        assert!(!decoder.at_boundary());
    }

    #[test]
    fn a_flood_of_empty_records_yields_nothing() {
        let mut bytes = record(kind::STDOUT, b"", 5).repeat(200_000);
        bytes.extend(record(kind::STDERR, b"", 0));
        bytes.extend(record(kind::END_REQUEST, &[0; 8], 0));
        assert_eq!(decode_in(&bytes, bytes.len()), Ok((vec![], vec![], Some(0))));
    }

    #[test]
    fn what_is_not_for_us_is_refused() {
        let decode = |bytes: &[u8]| Decoder::default().decode(&mut BytesMut::from(bytes)).unwrap_err();
        assert_eq!(decode(b"HTTP/1.1 400 Bad Request"), ProtocolError::Version(b'H'));
        assert_eq!(decode(&header(kind::STDOUT, 2, 0, 0)), ProtocolError::RequestId(2));
        assert_eq!(decode(&header(kind::END_REQUEST, 0, 8, 0)), ProtocolError::RequestId(0));
        for kind in [0, 1, 2, 4, 5, 8, 9, 10, 11, 255] {
            assert_eq!(decode(&header(kind, 1, 0, 0)), ProtocolError::Type(kind));
        }
        for len in [0, 7, 9, 65_535] {
            assert_eq!(decode(&header(kind::END_REQUEST, 1, len, 0)), ProtocolError::BadEnd(len));
        }
        let mut end = record(kind::END_REQUEST, &[0; 8], 0);
        end.push(1);
        assert_eq!(decode_in(&end, 17), Err(ProtocolError::AfterEnd));
    }

    #[test]
    fn a_reset_decoder_reads_the_next_answer() {
        let (mut decoder, mut buf) = (Decoder::default(), BytesMut::new());
        for _ in 0..2 {
            buf.extend_from_slice(&record(kind::END_REQUEST, &[0, 0, 0, 9, 2, 0, 0, 0], 255));
            assert_eq!(decoder.decode(&mut buf), Ok(Some(Frame::End { app_status: 9, protocol_status: 2 })));
            assert_eq!((decoder.decode(&mut buf), decoder.at_boundary()), (Ok(None), true));
            decoder.reset();
        }
    }

    proptest! {
        #[test]
        fn pairs_come_back_and_never_straddle(pairs in vec((vec(any::<u8>(), 0..200), any::<u8>(), 0_usize..20_000), 0..16)) {
            let pairs: Pairs = pairs.into_iter().map(|(name, byte, len)| (name, vec![byte; len])).collect();
            prop_assert_eq!(read_as_fpm(&encode(&pairs)), pairs);
        }

        #[test]
        fn a_cut_changes_nothing(
            records in vec((any::<bool>(), vec(any::<u8>(), 0..600), any::<u8>()), 0..8),
            padding: u8,
            cut in 1_usize..700,
        ) {
            let mut bytes = Vec::new();
            let mut expected = (Vec::new(), Vec::new(), Some(0));
            for (stderr, content, padding) in &records {
                bytes.extend(record(if *stderr { kind::STDERR } else { kind::STDOUT }, content, *padding));
                if *stderr { &mut expected.1 } else { &mut expected.0 }.extend_from_slice(content);
            }
            bytes.extend(record(kind::END_REQUEST, &[0; 8], padding));
            for cut in [1, cut, bytes.len()] {
                prop_assert_eq!(decode_in(&bytes, cut), Ok(expected.clone()));
            }
        }

        #[test]
        fn garbage_never_panics(bytes in vec(any::<u8>(), 0..300), cut in 1_usize..300) {
            let _ = decode_in(&bytes, cut);
        }
    }
}
