//! Instructions in user space per operation, counted by callgrind: the same whatever else the machine does. Each has a budget, so that a step back shows
//! as a number; beyond it by a tenth this ends with an error. (The whole way of a request: `benches/compare/run`, "Counted".)
//!
//!   cargo bench --bench instructions      valgrind must be there

#[path = "typical/mod.rs"]
mod typical;

use std::{
    hint::black_box,
    process::{Command, ExitCode},
};

use bytes::BytesMut;
use http::{Method, Request};
use slackwater::{
    control::config,
    fastcgi::{
        params,
        record::{self, Decoder},
        responder,
        response::{self, Limits},
    },
    http::{layers::guards, route},
};

/// Name, instructions that it took when this was last looked at, what is done.
type Case = (&'static str, u64, fn(u64));

const CASES: [Case; 5] = [
    ("request: GET with 15 headers as records", 9_500, request),
    ("answer: head of 6 headers", 6_700, head),
    ("answer: records of 1 KiB", 650, answer),
    ("guards", 1_350, guard),
    // From 2,400 to 3,600, by the seed of the hashes.
    ("site and route, the last of ten", 3_400, routing),
];

fn request(times: u64) {
    let headers = typical::headers();
    let input = typical::input(&headers);
    let mut out = BytesMut::with_capacity(4096);
    for _ in 0..times {
        out.clear();
        record::put_begin_request(&mut out, true);
        params::write(&mut out, black_box(&input)).expect("it fits");
        record::put_stdin_end(&mut out);
        black_box(&out);
    }
}

fn head(times: u64) {
    for _ in 0..times {
        let _ = black_box(response::parse_head(black_box(typical::HEAD), &Limits::default()).expect("it is well-formed"));
    }
}

fn answer(times: u64) {
    let mut wire = BytesMut::new();
    responder::put_answer(&mut wire, record::REQUEST_ID, &[typical::HEAD, &[b'x'; 1024][..]].concat());
    let mut buf = BytesMut::with_capacity(8 * 1024);
    for _ in 0..times {
        buf.extend_from_slice(&wire);
        let mut decoder = Decoder::default();
        while let Some(frame) = decoder.decode(&mut buf).expect("it is well-formed") {
            black_box(frame);
        }
    }
}

fn guard(times: u64) {
    let mut request = Request::builder().uri("/catalogue/shoes/42?colour=red&size=9");
    *request.headers_mut().expect("nothing is wrong yet") = typical::headers();
    let parts = request.body(()).expect("it is a request").into_parts().0;
    let limits = guards::Limits { max_uri_bytes: 8 * 1024, max_header_bytes: 32 * 1024 };
    for _ in 0..times {
        let _ = black_box(guards::check(black_box(&parts), &limits).expect("it passes"));
    }
}

fn routing(times: u64) {
    let routes: String = (0..10).map(|n| format!("[[site.route]]\npath = \"/section{n}/*\"\n")).collect();
    let text = format!(
        "[upstream.php.set.blue]\nendpoints = [\"127.0.0.1:9000\"]\n[[site]]\nhosts = [\"www.example.com\"]\nphp_root = \"/app\"\nupstream = \"php\"\n{routes}"
    );
    let file = std::env::temp_dir().join(format!("slackwater-instructions-{}.toml", std::process::id()));
    std::fs::write(&file, text).expect("it is written");
    let config = config::load(&file, &|_| None);
    let _ = std::fs::remove_file(&file);
    let sites = config.unwrap_or_else(|problems| panic!("{problems:?}")).sites;
    let headers = typical::headers();
    for _ in 0..times {
        let site = route::site(&sites, black_box("www.example.com:8080")).expect("it is there");
        let path = route::normalize(black_box("/section9/shoes/42")).expect("it is a path");
        let asked = route::Asked {
            method: &Method::GET,
            headers: &headers,
            preflight: None,
            query: Some("colour=red&size=9"),
            from: std::net::Ipv4Addr::LOCALHOST.into(),
            https: true,
        };
        black_box(route::route(site, &asked, &path));
    }
}

/// What callgrind counts in a run of so many.
fn counted(case: usize, times: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().expect("its own path"))
        .args(["work", &case.to_string(), &times.to_string()])
        // The same addresses and hashes each time.
        .env_clear()
        .output()
        .expect("valgrind is there: apt-get install valgrind");
    let said = String::from_utf8_lossy(&output.stderr);
    let line = said.lines().find_map(|line| line.split_once("Collected :"));
    line.and_then(|(_, number)| number.trim().parse().ok()).unwrap_or_else(|| panic!("callgrind has counted nothing: {said}"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, case, times] = &arguments[..]
        && word == "work"
    {
        let (case, times) = (case.parse::<usize>().expect("ours"), times.parse().expect("ours"));
        CASES[case].2(times);
        return ExitCode::SUCCESS;
    }
    let mut within = true;
    println!("| | instructions | budget |\n|---|---|---|");
    for (nth, (name, budget, _)) in CASES.iter().enumerate() {
        // What a start costs falls out; it differs a little from run to run (hashes are seeded at random).
        let each = (counted(nth, 50_000) - counted(nth, 10_000)) / 40_000;
        let word = if each * 10 > budget * 11 { " **more than its budget**" } else { "" };
        within &= word.is_empty();
        println!("| {name} | {each} | {budget}{word} |");
    }
    if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
