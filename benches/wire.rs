//! What the wire costs: a typical GET as PARAMS, an answer of 1 KiB, and its headers.

use std::{hint::black_box, net::Ipv4Addr};

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use slackwater::fastcgi::{
    params::{self, Input, Script},
    record::{self, Decoder, Frame},
    responder,
    response::{self, Limits},
};

/// What a browser behind a load balancer sends.
const HEADERS: [(&str, &str); 15] = [
    ("host", "www.example.com"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"),
    ("accept-language", "en-US,en;q=0.5"),
    ("accept-encoding", "gzip, deflate, br, zstd"),
    ("referer", "https://www.example.com/catalogue/shoes?page=2"),
    ("cookie", "PHPSESSID=b2f6c1d4e8a94c0fb7d35e21a6c8f094; XSRF-TOKEN=eyJpdiI6Ik1rVm1hR0psYzNRPSJ9"),
    ("upgrade-insecure-requests", "1"),
    ("sec-fetch-dest", "document"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-site", "same-origin"),
    ("priority", "u=0, i"),
    ("cache-control", "max-age=0"),
    ("x-forwarded-for", "203.0.113.7"),
    ("x-forwarded-proto", "https"),
];

const HEAD: &[u8] = b"X-Powered-By: PHP/8.2.36\r\nSet-Cookie: PHPSESSID=b2f6c1d4e8a94c0fb7d35e21a6c8f094; path=/; HttpOnly\r\n\
    Expires: Thu, 19 Nov 1981 08:52:00 GMT\r\nCache-Control: no-store, no-cache, must-revalidate\r\nPragma: no-cache\r\n\
    Content-type: text/html; charset=UTF-8\r\n\r\n";

fn request(c: &mut Criterion) {
    let headers: HeaderMap =
        HEADERS.map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).into_iter().collect();
    let input = Input {
        method: &Method::GET,
        request_uri: "/catalogue/shoes/42?colour=red&size=9",
        query: "colour=red&size=9",
        version: Version::HTTP_11,
        headers: &headers,
        host: "www.example.com",
        content_length: None,
        remote_addr: Ipv4Addr::new(203, 0, 113, 7).into(),
        remote_port: 50_123,
        server_addr: (Ipv4Addr::new(10, 0, 0, 5), 8080).into(),
        server_port: 443,
        https: true,
        remote_user: "",
        request_id: "0190163d8694739b",
        extra: &[],
        script: Script { script_name: "/index.php", path_info: "", document_root: "/var/www/html/public" },
    };
    let mut out = BytesMut::with_capacity(4096);
    c.bench_function("request: GET with 15 headers", |b| {
        b.iter(|| {
            out.clear();
            record::put_begin_request(&mut out, true);
            params::write(&mut out, black_box(&input)).expect("it fits");
            record::put_stdin_end(&mut out);
            black_box(&out);
        });
    });
}

fn answer(c: &mut Criterion) {
    let mut group = c.benchmark_group("answer");
    for (name, size) in [("1 KiB", 1024), ("1 MiB", 1024 * 1024)] {
        let mut wire = BytesMut::new();
        responder::put_answer(&mut wire, record::REQUEST_ID, &[HEAD, &vec![b'x'; size][..]].concat());
        group.throughput(Throughput::Bytes(size.try_into().expect("a small number")));
        group.bench_function(name, |b| {
            let decode = |mut buf: BytesMut| {
                let mut decoder = Decoder::default();
                while let Some(frame) = decoder.decode(&mut buf).expect("it is well-formed") {
                    if let Frame::End { protocol_status, .. } = black_box(frame) {
                        return protocol_status;
                    }
                }
                unreachable!("END_REQUEST is there")
            };
            b.iter_batched(|| wire.clone(), decode, BatchSize::SmallInput);
        });
    }
    group.finish();
    c.bench_function("answer: head of 6 headers", |b| {
        b.iter(|| response::parse_head(black_box(HEAD), &Limits::default()).expect("it is well-formed"));
    });
}

criterion_group!(wire, request, answer);
criterion_main!(wire);
