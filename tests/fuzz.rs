//! A short smoke of everything that `tests/long fuzz` drives for longer: what was found once (`fuzz/corpus`), and what a few thousand random changes of it
//! make. The same bytes in every run.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// In all for each target, so that the quick tier stays quick.
const TIME: Duration = Duration::from_secs(3);

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// What often matters to a parser.
const WORDS: [&[u8]; 16] = [
    b"\r\n",
    b"\0",
    b"..",
    b"/",
    b"%2e",
    b"{{",
    b"}}",
    b": ",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"\xff",
    b"\"",
    b"[[site]]",
    b"Status: 200",
    b"\x01\x06\x00\x01\xff\xff\xff\x00",
    b"?",
];

fn changed(seed: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(5) {
            0 => bytes.insert(at, random.below(256) as u8),
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 => drop(bytes.splice(at..at, WORDS[random.below(WORDS.len())].iter().copied())),
            3 => bytes.truncate(at),
            _ => {
                let end = (at + random.below(32)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, part);
            }
        }
    }
    bytes
}

#[test]
fn nothing_that_was_found_and_nothing_near_it_breaks_a_parser() {
    for (name, target) in targets::ALL {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut seeds: Vec<_> = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect();
        seeds.sort();
        assert!(!seeds.is_empty(), "{name} has no corpus");
        for seed in &seeds {
            target(seed);
        }
        let (mut random, began, mut count) = (Random(0x9E37_79B9_7F4A_7C15), Instant::now(), 0);
        while count < 20_000 && began.elapsed() < TIME {
            let input = changed(&seeds[random.below(seeds.len())], &mut random);
            if let Err(panic) = std::panic::catch_unwind(|| target(&input)) {
                println!("{name}: {:?} ({input:?})", String::from_utf8_lossy(&input));
                std::panic::resume_unwind(panic);
            }
            count += 1;
        }
        println!("{name}: {} of the corpus, {count} changed", seeds.len());
        assert!(count > 100, "{name}: {count} in {TIME:?}");
    }
}
