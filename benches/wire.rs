//! What the wire costs: a typical GET as PARAMS, an answer of 1 KiB, and its headers.

#[path = "typical/mod.rs"]
mod typical;

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use slackwater::fastcgi::{
    params,
    record::{self, Decoder, Frame},
    responder,
    response::{self, Limits},
};

fn request(c: &mut Criterion) {
    let headers = typical::headers();
    let input = typical::input(&headers);
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
        responder::put_answer(&mut wire, record::REQUEST_ID, &[typical::HEAD, &vec![b'x'; size][..]].concat());
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
        b.iter(|| response::parse_head(black_box(typical::HEAD), &Limits::default()).expect("it is well-formed"));
    });
}

criterion_group!(wire, request, answer);
criterion_main!(wire);
