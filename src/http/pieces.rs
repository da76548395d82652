//! Bytes that are kept in the order in which they came, without a buffer for each of the small ones.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::fastcgi::record;

/// hyper reads a body into buffers that are larger than this.
const SMALL_OF_BODY: usize = 32 * 1024;
/// A script may write byte by byte.
const SMALL_OF_ANSWER: usize = 1024;

/// Small pieces are copied together: each kept by itself would hold the whole buffer that it was read into.
#[derive(Debug)]
pub struct Pieces {
    all: VecDeque<Bytes>,
    /// Of the small ones that came last.
    tail: BytesMut,
    /// How many bytes there are in all.
    bytes: usize,
    /// Up to this size a piece is small.
    small: usize,
}

impl Pieces {
    /// For what a client sends.
    pub fn of_body() -> Self {
        Pieces::with_small(SMALL_OF_BODY)
    }

    /// For what FPM says.
    pub fn of_answer() -> Self {
        Pieces::with_small(SMALL_OF_ANSWER)
    }

    /// Pieces of up to so many bytes are copied together.
    fn with_small(small: usize) -> Self {
        Pieces { all: VecDeque::new(), tail: BytesMut::new(), bytes: 0, small }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        if piece.len() > self.small {
            self.end_tail();
            self.all.push_back(piece);
            return;
        }
        self.tail.extend_from_slice(&piece);
        if self.tail.len() > record::MAX_CONTENT {
            self.end_tail();
        }
    }

    /// The first, as it is: there is one of it.
    pub fn push_first(&mut self, piece: Bytes) {
        if self.is_empty() && !piece.is_empty() {
            self.bytes = piece.len();
            self.all.push_back(piece);
        } else {
            self.push(piece);
        }
    }

    pub fn pop(&mut self) -> Option<Bytes> {
        if self.all.is_empty() {
            self.end_tail();
        }
        let piece = self.all.pop_front()?;
        self.bytes -= piece.len();
        Some(piece)
    }

    /// Up to `most` bytes from the front to the end of `other`.
    pub fn move_to(&mut self, other: &mut Pieces, most: usize) {
        let mut left = most;
        while left > 0
            && let Some(mut piece) = self.pop()
        {
            if piece.len() > left {
                let rest = piece.split_off(left);
                self.bytes += rest.len();
                self.all.push_front(rest);
            }
            left -= piece.len();
            other.push_first(piece);
        }
    }

    /// Nothing more comes.
    pub fn whole(mut self) -> Self {
        self.end_tail();
        self
    }

    /// Each by itself, none of them empty. Of what is `whole`.
    pub fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.all.iter()
    }

    /// In one; copied where there are several.
    pub fn join(mut self) -> Bytes {
        self.end_tail();
        if self.all.len() == 1 {
            return self.all.pop_front().unwrap_or_default();
        }
        let mut whole = BytesMut::with_capacity(self.bytes);
        self.all.iter().for_each(|piece| whole.extend_from_slice(piece));
        whole.freeze()
    }

    fn end_tail(&mut self) {
        if !self.tail.is_empty() {
            self.all.push_back(self.tail.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ones_are_copied_together_large_ones_are_not() {
        let mut pieces = Pieces::with_small(4);
        for piece in ["abc", "d", "efghij", "kl", "m"] {
            pieces.push(Bytes::from_static(piece.as_bytes()));
        }
        assert_eq!(pieces.bytes(), 13);
        assert_eq!(pieces.pop().unwrap(), "abcd");
        assert_eq!(pieces.bytes(), 9);
        assert_eq!(pieces.whole().iter().collect::<Vec<_>>(), ["efghij", "klm"]);
    }

    #[test]
    fn small_pieces_are_copied_together_and_large_ones_are_not_in_the_order_in_which_they_came() {
        let large = Bytes::from(vec![b'L'; SMALL_OF_BODY + 1]);
        let mut pieces = Pieces::of_body();
        let small = (0..100_000u32).map(|n| Bytes::from(vec![(n % 251) as u8]));
        let all: Vec<Bytes> = small.clone().chain([large.clone()]).chain(small).chain([large.clone(), large.clone()]).collect();
        all.iter().cloned().for_each(|piece| pieces.push(piece));
        let pieces = pieces.whole();
        assert_eq!(pieces.bytes(), all.iter().map(Bytes::len).sum::<usize>());
        assert!(pieces.iter().count() <= 7, "{} pieces", pieces.iter().count());
        assert!(pieces.iter().any(|piece| piece.as_ptr() == large.as_ptr()), "a large one is not copied");
        assert_eq!(pieces.iter().flatten().copied().collect::<Vec<u8>>(), all.concat());
    }

    #[test]
    fn what_was_taken_is_not_joined() {
        let mut pieces = Pieces::with_small(1024);
        pieces.push_first(Bytes::from_static(b"first"));
        pieces.push_first(Bytes::from_static(b" second"));
        assert_eq!(pieces.pop().unwrap(), "first");
        pieces.push_first(Bytes::from_static(b" third"));
        assert_eq!(pieces.join(), " second third");
    }

    #[test]
    fn a_part_moves_and_the_rest_stays_in_order() {
        let mut pieces = Pieces::with_small(2);
        for piece in ["abcdef", "g", "h", "ijklmn"] {
            pieces.push(Bytes::from_static(piece.as_bytes()));
        }
        let mut other = Pieces::with_small(2);
        pieces.move_to(&mut other, 4);
        assert_eq!((other.bytes(), pieces.bytes()), (4, 10));
        pieces.move_to(&mut other, usize::MAX);
        assert!(pieces.is_empty());
        assert_eq!(other.join(), "abcdefghijklmn");
    }

    #[test]
    fn a_hundred_thousand_bytes_one_by_one_take_a_few_pieces() {
        let mut pieces = Pieces::with_small(1024);
        for _ in 0..100_000 {
            pieces.push_first(Bytes::from_static(b"x"));
        }
        assert_eq!(pieces.bytes(), 100_000);
        assert!(pieces.whole().iter().count() <= 3);
    }
}
