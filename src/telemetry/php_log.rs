//! What PHP writes to STDERR, in the log with its request's id: whole up to a limit, and never a reason for a request to fail.

/// Of one request; the rest is counted.
const MAX_BYTES: usize = 64 * 1024;

/// The STDERR of one request; its drop writes what is left of a last line.
pub struct PhpLog {
    id: String,
    line: Vec<u8>,
    taken: usize,
    left_out: usize,
}

impl PhpLog {
    pub fn new(id: &str) -> Self {
        PhpLog { id: id.to_owned(), line: Vec::new(), taken: 0, left_out: 0 }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        let room = MAX_BYTES - self.taken;
        let (take, rest) = bytes.split_at(bytes.len().min(room));
        self.taken += take.len();
        self.left_out += rest.len();
        for part in take.split_inclusive(|b| *b == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.flush();
            }
        }
    }

    fn flush(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        let line = line.trim_end();
        if !line.is_empty() {
            tracing::warn!(target: "php", id = self.id, stderr = line, "PHP wrote to STDERR");
        }
        self.line.clear();
    }
}

impl Drop for PhpLog {
    fn drop(&mut self) {
        self.flush();
        if self.left_out > 0 {
            tracing::warn!(target: "php", id = self.id, bytes = self.left_out, "more of STDERR was left out");
        }
    }
}
