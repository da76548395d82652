//! Bytes that say where they belong: blocks of 4,096, each beginning with its number as 15 hexadecimal digits and
//! a line feed. A lost, doubled or swapped block is seen at once. `tests/php/big.php` writes the same.

use bytes::Bytes;

const BLOCK: usize = 4096;

/// One whole block.
fn block(number: usize) -> Vec<u8> {
    let mut bytes = format!("{number:015x}\n").into_bytes();
    bytes.extend((b'a'..=b'z').cycle().take(BLOCK - bytes.len()));
    bytes
}

/// The first `len` bytes.
pub fn pattern(len: usize) -> Bytes {
    let mut bytes = Vec::with_capacity(len.next_multiple_of(BLOCK));
    for number in 0..len.div_ceil(BLOCK) {
        bytes.extend_from_slice(&block(number));
    }
    bytes.truncate(len);
    bytes.into()
}

/// Compares what arrived with the first `len` bytes; says what differs first.
pub fn check(got: &[u8], len: usize) -> Result<(), String> {
    for (number, piece) in got.chunks(BLOCK).enumerate() {
        let want = block(number);
        if let Some(at) = piece.iter().zip(&want).position(|(a, b)| a != b) {
            let at = number * BLOCK + at;
            return Err(format!("byte {at} is wrong: {:?}", String::from_utf8_lossy(&got[at..got.len().min(at + 24)])));
        }
    }
    if got.len() == len { Ok(()) } else { Err(format!("{} bytes instead of {len}", got.len())) }
}
