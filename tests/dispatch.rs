//! Which endpoint a request gets, who waits, and who is woken: the dispatcher on a snapshot built from a file, with no I/O.

mod support;

use std::{pin::Pin, rc::Rc, sync::Arc, time::Duration};

use slackwater::{
    error::Kind,
    upstream::{Dispatcher, Store, Want, dispatch::now_ms, store::Workers},
};
use support::snapshot;
use tokio::time::Instant;

/// A dispatcher before one upstream whose endpoints, numbered from 1, have one worker each.
fn dispatcher(endpoints: u16) -> Rc<Dispatcher> {
    let addresses: Vec<String> = (0..endpoints).map(|n| format!("127.0.0.1:{}", 9000 + n)).collect();
    let toml = format!(
        "[upstream.php]\nworkers_per_endpoint = 1\n[upstream.php.set.blue]\nendpoints = {addresses:?}\n[[site]]\nphp_root = \"/app\"\nupstream = \"php\"\n"
    );
    Rc::new(Dispatcher::new(0, Arc::new(Store::new(snapshot::of(&toml, 1))), Workers::new(Vec::new())))
}

fn want<'a>(tried: &'a [u64], refused: &'a [u64]) -> Want<'a> {
    Want { upstream: "php", once: true, again: false, key: b"", tried, refused, since: Instant::now(), deadline: None, lane: None }
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

/// A pod that has just come is not given its full part at once; with `slow_start = "off"` it is.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_has_just_come_gets_less_at_first() {
    for (slow_start, expected) in [("10s", [[5, 1], [4, 2], [3, 3]]), ("off", [[3, 3], [3, 3], [3, 3]])] {
        let toml = format!(
            "[upstream.php]\nworkers_per_endpoint = 8\nslow_start = \"{slow_start}\"\n[upstream.php.set.blue]\nendpoints = [\"127.0.0.1:9000\", \"127.0.0.1:9001\"]\n[[site]]\nphp_root = \"/app\"\nupstream = \"php\"\n"
        );
        let store = Arc::new(Store::new(snapshot::of(&toml, 1)));
        let pods = store.load().upstreams["php"].active.endpoints.clone();
        let dispatcher = Dispatcher::new(0, store, Workers::new(Vec::new()));
        tokio::time::advance(Duration::from_secs(60)).await;
        pods[1].came(now_ms());
        // At once, after half of its time, after all of it.
        for (seconds, expected) in [0, 5, 5].into_iter().zip(expected) {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            let mut tickets = Vec::new();
            for _ in 0..6 {
                tickets.push(dispatcher.acquire(&want(&[], &[])).await.unwrap());
            }
            assert_eq!([pods[0].used(), pods[1].used()], expected, "{slow_start}, {seconds} s later");
        }
    }
}

/// A pod that is leaving has slots that nobody may use: they wake nobody, however many wait.
#[tokio::test(start_paused = true)]
async fn free_slots_of_a_pod_that_leaves_wake_nobody() {
    let dispatcher = dispatcher(2);
    let upstream = dispatcher.store.load().upstreams["php"].clone();
    upstream.active.endpoints[1].set_leaving(true);
    let busy = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    assert_eq!(busy.endpoint().id, 1);
    assert!(!upstream.has_free_slot());
    let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(async { dispatcher.acquire(&want(&[], &[])).await })).collect();
    for one in &mut waiting {
        assert!(poll_once(one).await.is_none());
    }
    upstream.wake_for_free_slots();
    // Where it alone is left it is used.
    upstream.active.endpoints[0].set_disabled(true);
    upstream.wake_for_free_slots();
    assert_eq!(poll_once(&mut waiting[0]).await.expect("it is woken").unwrap().endpoint().id, 2);
}

/// One that gives up hands its wake-up to the next.
#[tokio::test(start_paused = true)]
async fn who_finds_that_everybody_has_refused_it_passes_its_wake_up_on() {
    let dispatcher = dispatcher(2);
    let upstream = dispatcher.store.load().upstreams["php"].clone();
    let first = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    let _second = dispatcher.acquire(&want(&[], &[])).await.unwrap();
    let refused = [first.endpoint().id];
    let mut picky = Box::pin(async { dispatcher.acquire(&want(&refused, &refused)).await });
    let mut behind = Box::pin(async { dispatcher.acquire(&want(&[], &[])).await });
    assert!(poll_once(&mut picky).await.is_none() && poll_once(&mut behind).await.is_none());
    let other = upstream.active.endpoints.iter().find(|e| e.id != refused[0]).unwrap();
    other.set_disabled(true);
    drop(first);
    assert_eq!(poll_once(&mut picky).await.expect("nobody is left for it").unwrap_err().kind, Kind::NoEndpoint);
    assert!(poll_once(&mut behind).await.expect("the slot stays free").is_ok());
}

/// Every key reaches the other pod where its own is not usable.
#[tokio::test(start_paused = true)]
async fn a_hash_goes_on_to_the_other_pod_for_every_key() {
    let toml = "[upstream.php]\nworkers_per_endpoint = 1000\nbalance = \"hash:$remote_addr\"\n[upstream.php.set.blue]\nendpoints = [\"127.0.0.1:9000\", \"127.0.0.1:9001\"]\n[[site]]\nphp_root = \"/app\"\nupstream = \"php\"\n";
    let store = Arc::new(Store::new(snapshot::of(toml, 1)));
    store.load().upstreams["php"].active.endpoints[0].set_disabled(true);
    let dispatcher = Dispatcher::new(0, store, Workers::new(Vec::new()));
    for n in 0..2_000_u32 {
        let key = n.to_string();
        let mut asked = Box::pin(async { dispatcher.acquire(&Want { key: key.as_bytes(), ..want(&[], &[]) }).await });
        assert_eq!(poll_once(&mut asked).await.expect("it waits beside an idle pod").unwrap().endpoint().id, 2);
    }
}
