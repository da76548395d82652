//! Which endpoint a request gets, who waits, and who is woken: the dispatcher on a snapshot built from a file, with no I/O.

use std::{pin::Pin, rc::Rc, sync::Arc};

use slackwater::{
    control::{
        build::{self, Before},
        config,
        switch::Switch,
    },
    error::Kind,
    upstream::{Dispatcher, Store, Want, store::Workers},
};
use tokio::time::Instant;

/// A dispatcher before one upstream whose endpoints, numbered from 1, have one worker each.
fn dispatcher(endpoints: u16) -> Rc<Dispatcher> {
    let addresses: Vec<String> = (0..endpoints).map(|n| format!("127.0.0.1:{}", 9000 + n)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slackwater.toml");
    let toml = format!(
        "[upstream.php]\nworkers_per_endpoint = 1\n[upstream.php.set.blue]\nendpoints = {addresses:?}\n[[site]]\nphp_root = \"/app\"\nupstream = \"php\"\n"
    );
    std::fs::write(&path, toml).unwrap();
    let config = config::load(&path, &|_| None).unwrap();
    let before = Before {
        snapshot: None,
        switch: &Switch::default(),
        workers: 1,
        retired: &Default::default(),
        found: &Default::default(),
        alive: &[],
    };
    let snapshot = build::build(&config, &before).unwrap();
    for endpoint in &snapshot.upstreams["php"].active.endpoints {
        endpoint.set_capacity(Some(1));
    }
    Rc::new(Dispatcher::new(0, Arc::new(Store::new(snapshot)), Workers::new(Vec::new())))
}

fn want<'a>(tried: &'a [u64], refused: &'a [u64]) -> Want<'a> {
    Want { upstream: "php", once: true, key: b"", tried, refused, since: Instant::now() }
}

async fn poll_once<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> Option<T> {
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match future.as_mut().poll(cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_may_not_have_the_free_slot_lets_the_next_one_have_it() {
    let dispatcher = dispatcher(2);
    let first = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    let second = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    let id = first.endpoint().id;
    let refused = [id];
    let mut picky = Box::pin(async { dispatcher.acquire(&want(&refused, &refused)).await });
    assert!(poll_once(&mut picky).await.is_none());
    let mut behind = Box::pin(async { dispatcher.acquire(&want(&[], &[])).await });
    assert!(poll_once(&mut behind).await.is_none());
    drop(first);
    assert!(poll_once(&mut picky).await.is_none());
    let got = poll_once(&mut behind).await.expect("the slot stays free while one waits for it").unwrap();
    assert_eq!(got.endpoint().id, id);
    drop(second);
    assert_ne!(picky.await.unwrap().endpoint().id, id);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_failed_is_tried_last_and_one_that_refused_not_again() {
    let dispatcher = dispatcher(2);
    for id in [1, 2] {
        let other = dispatcher.acquire(&want(&[id], &[])).await.unwrap();
        assert_ne!(other.endpoint().id, id);
    }
    assert!(dispatcher.acquire(&want(&[1, 2], &[])).await.is_ok(), "both failed, neither refused");
    let none = dispatcher.acquire(&want(&[1, 2], &[1, 2])).await.unwrap_err();
    assert_eq!(none.kind, Kind::NoEndpoint);
}

#[tokio::test(start_paused = true)]
async fn one_that_everybody_has_refused_does_not_join_a_queue() {
    let dispatcher = dispatcher(1);
    let busy = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    let mut waiting = Box::pin(async { dispatcher.acquire(&want(&[], &[])).await });
    assert!(poll_once(&mut waiting).await.is_none());
    let mut refused = Box::pin(async { dispatcher.acquire(&want(&[1], &[1])).await });
    assert_eq!(poll_once(&mut refused).await.expect("an answer at once").unwrap_err().kind, Kind::NoEndpoint);
    drop(busy);
    assert!(waiting.await.is_ok());
}
