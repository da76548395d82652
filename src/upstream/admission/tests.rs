use super::{super::lanes::Work, *};
use crate::model::upstream::LanePolicy;

const MAX: usize = 99;

/// A queue whose set has `slots` workers, with the lanes named.
fn queue(slots: u32, named: &[(&str, u8, u32, u8)]) -> (Arc<Queue>, Arc<Lanes>) {
    let queue = Arc::new(Queue::default());
    let policies: Vec<_> = named
        .iter()
        .map(|(name, reserve, priority, limit)| LanePolicy {
            name: Arc::from(*name),
            reserve: *reserve,
            priority: *priority,
            limit: *limit,
        })
        .collect();
    let lanes = Lanes::new(&policies, &queue, None);
    lanes.tell_capacity(Some(slots));
    (queue, lanes)
}

fn plain() -> (Arc<Queue>, Arc<Lanes>) {
    queue(1, &[])
}

fn arrival(worker: usize) -> Arrival {
    Arrival { worker, max: MAX, deadline: Instant::now() + Duration::from_secs(10) }
}

fn join(queue: &Arc<Queue>, lanes: &Arc<Lanes>, lane: &str) -> Waiter {
    queue.join(lanes, lanes.find(Some(lane)), arrival(0)).unwrap()
}

/// What it has been told already.
async fn told(waiter: &Waiter) -> Wake {
    tokio::time::timeout(Duration::from_millis(1), waiter.told()).await.expect("it was told nothing")
}

fn is_woken(waiter: &Waiter) -> bool {
    waiter.entry.state.load(Ordering::Relaxed) == GRANTED
}

fn woken(waiters: &[&Waiter]) -> Vec<bool> {
    waiters.iter().map(|waiter| is_woken(waiter)).collect()
}

async fn pass(seconds: f64) {
    tokio::time::advance(Duration::from_secs_f64(seconds)).await;
}

/// So many requests of the lane, each of which held a worker for so long.
async fn have_run(lanes: &Arc<Lanes>, count: usize, seconds: f64) {
    for _ in 0..count {
        let work = lanes.enter(0).unwrap();
        pass(seconds).await;
        drop(work);
    }
}

#[tokio::test(start_paused = true)]
async fn wakes_in_order_of_arrival() {
    let (queue, lanes) = plain();
    let first = join(&queue, &lanes, "");
    let second = queue.join(&lanes, 0, arrival(1)).unwrap();
    assert!(first.is_next() && !second.is_next());
    queue.wake_one();
    assert_eq!(woken(&[&first, &second]), [true, false]);
    assert!(second.is_next());
}

#[tokio::test(start_paused = true)]
async fn a_woken_waiter_that_leaves_passes_its_wake_up_on_and_a_settled_one_keeps_it() {
    let (queue, lanes) = plain();
    let [first, second, third] = [(); 3].map(|()| join(&queue, &lanes, ""));
    queue.wake_one();
    drop(first);
    assert_eq!(woken(&[&second, &third]), [true, false]);
    second.settle();
    assert_eq!(woken(&[&third]), [false]);
    assert_eq!(queue.waiting(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_wake_up_that_came_to_nothing_keeps_its_place() {
    let (queue, lanes) = plain();
    let [first, second] = [(); 2].map(|()| join(&queue, &lanes, ""));
    queue.wake(2);
    first.again();
    queue.wake_one();
    assert_eq!(woken(&[&first, &second]), [true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_slot_passed_on_goes_round_once_and_the_next_one_is_offered_to_all_again() {
    let (queue, lanes) = plain();
    let [first, second] = [(); 2].map(|()| join(&queue, &lanes, ""));
    queue.wake_one();
    first.again();
    first.pass_on();
    assert_eq!(woken(&[&first, &second]), [false, true]);
    second.again();
    second.pass_on();
    assert_eq!(woken(&[&first, &second]), [false, false]);
    queue.wake_one();
    assert_eq!(woken(&[&first, &second]), [true, false]);
}

#[tokio::test(start_paused = true)]
async fn is_bounded_and_in_ordinary_times_the_newcomer_is_refused() {
    let (queue, lanes) = plain();
    let one = Arrival { max: 1, ..arrival(0) };
    let first = queue.join(&lanes, 0, one).unwrap();
    assert_eq!(queue.join(&lanes, 0, one).unwrap_err(), Refused::Full { waiting: 1 });
    // Under overload it is the one who has waited longest.
    pass(1.0).await;
    let _second = queue.join(&lanes, 0, one).unwrap();
    assert_eq!(told(&first).await, Wake::Evicted);
    assert_eq!(queue.waiting(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lasting_queue_goes_newest_first_and_an_empty_one_is_ordinary_again() {
    let (queue, lanes) = plain();
    let first = join(&queue, &lanes, "");
    pass(0.9).await;
    let second = join(&queue, &lanes, "");
    assert!(first.is_next() && !second.is_next());
    pass(0.1).await;
    let third = join(&queue, &lanes, "");
    assert!(third.is_next() && !first.is_next());
    queue.wake_one();
    assert_eq!(woken(&[&first, &second, &third]), [false, false, true]);
    for waiter in [third, second, first] {
        waiter.settle();
    }
    let [first, second] = [(); 2].map(|()| join(&queue, &lanes, ""));
    assert!(first.is_next() && !second.is_next());
}

/// As many come as are served, and everybody waits for more than a second: whoever comes first goes first, or the first would wait for ever.
#[tokio::test(start_paused = true)]
async fn a_long_queue_of_patient_clients_stays_in_order() {
    let (queue, lanes) = plain();
    let mut waiting: std::collections::VecDeque<_> = (0..20).map(|_| join(&queue, &lanes, "")).collect();
    for _ in 0..100 {
        // Each waits for two seconds.
        pass(0.1).await;
        queue.wake_one();
        let first = waiting.pop_front().unwrap();
        assert!(is_woken(&first));
        first.settle();
        waiting.push_back(join(&queue, &lanes, ""));
    }
    // One leaves, as one may. Two of twelve leave: not everybody waits so long.
    waiting.remove(10);
    queue.wake_one();
    assert!(is_woken(&waiting[0]));
    waiting[0].again();
    waiting.remove(10);
    queue.wake_one();
    assert!(is_woken(&waiting[17]));
    waiting.pop_back().unwrap().settle();
    // A second without another one later it is in order again.
    for _ in 0..15 {
        pass(0.1).await;
        queue.wake_one();
        let at = waiting.iter().position(is_woken).unwrap();
        waiting.remove(at).unwrap().settle();
        waiting.push_back(join(&queue, &lanes, ""));
    }
    queue.wake_one();
    assert!(is_woken(&waiting[0]));
}

/// Workers that take long are not overloaded because somebody has waited for one.
#[tokio::test(start_paused = true)]
async fn what_lasts_depends_on_how_long_requests_take() {
    let (queue, lanes) = queue(4, &[]);
    have_run(&lanes, 8, 1.5).await;
    let first = join(&queue, &lanes, "");
    pass(2.9).await;
    let second = join(&queue, &lanes, "");
    queue.wake_one();
    first.again();
    pass(0.1).await;
    queue.wake_one();
    assert_eq!(woken(&[&first, &second]), [false, true]);
}

#[tokio::test(start_paused = true)]
async fn of_two_that_came_together_the_one_goes_whose_worker_has_the_connection() {
    let (queue, lanes) = plain();
    let first = queue.join(&lanes, 0, arrival(0)).unwrap();
    pass(0.005).await;
    let near = queue.join(&lanes, 0, arrival(1)).unwrap();
    pass(0.006).await;
    let far = queue.join(&lanes, 0, arrival(2)).unwrap();
    assert!(matches!(queue.next_for(2), Next::Elsewhere), "11 ms later is later");
    assert!(matches!(queue.next_for(1), Next::Here(_)));
    assert_eq!(woken(&[&first, &near, &far]), [false, true, false]);
    assert!(matches!(queue.next_for(0), Next::Here(_)));
    assert_eq!(woken(&[&first, &far]), [true, false]);
}

#[tokio::test(start_paused = true)]
async fn who_would_come_too_late_is_told_at_once() {
    let (queue, lanes) = queue(2, &[]);
    let patient = |seconds| Arrival { deadline: Instant::now() + Duration::from_secs(seconds), ..arrival(0) };
    have_run(&lanes, 7, 1.0).await;
    let before: Vec<_> = (0..9).map(|_| queue.join(&lanes, 0, patient(3)).unwrap()).collect();
    drop(before);
    // The eighth makes it evidence: two workers do two requests a second.
    have_run(&lanes, 1, 1.0).await;
    let waiting: Vec<_> = (0..6).map(|_| queue.join(&lanes, 0, patient(3)).unwrap()).collect();
    assert_eq!(queue.join(&lanes, 0, patient(3)).unwrap_err(), Refused::TooLate { wait: Duration::from_millis(3250) });
    assert!(queue.join(&lanes, 0, patient(4)).is_ok(), "one that waits longer comes in time");
    assert_eq!(queue.expected_wait(&Arc::from("")), Some(Duration::from_millis(3250)));
    assert_eq!(waiting.len(), queue.waiting());
}

/// The one who has fallen behind most is told, as soon as it is known, and not at its deadline.
#[tokio::test(start_paused = true)]
async fn under_overload_the_oldest_are_told_that_they_would_come_too_late() {
    let (queue, lanes) = plain();
    have_run(&lanes, 8, 1.0).await;
    let mut waiting = Vec::new();
    for _ in 0..5 {
        waiting.push(join(&queue, &lanes, ""));
        pass(0.5).await;
    }
    // 2.5 s have passed, two service times: the row is overloaded. The first has 7.5 s left, which is seven requests and a half.
    for _ in 0..3 {
        waiting.push(join(&queue, &lanes, ""));
    }
    assert_eq!(queue.waiting(), 8);
    waiting.push(join(&queue, &lanes, ""));
    assert_eq!(told(&waiting[0]).await, Wake::TooLate);
    assert_eq!(queue.waiting(), 8);
    assert!(waiting[8].is_next());
}

/// Clients leave after two seconds: who has waited for nearly one under overload is told, rather than served when it leaves.
#[tokio::test(start_paused = true)]
async fn how_long_clients_wait_is_learned_from_those_that_leave() {
    let (queue, lanes) = plain();
    let mut waiting: Vec<_> = (0..11).map(|_| join(&queue, &lanes, "")).collect();
    pass(2.0).await;
    let newest = join(&queue, &lanes, "");
    // The first alone may be anybody.
    drop(waiting.drain(..8));
    queue.wake_one();
    assert!(is_woken(&newest));
    assert_eq!(queue.waiting(), 4, "seven may be chance");
    waiting.pop();
    queue.wake_one();
    assert_eq!(told(&waiting[0]).await, Wake::Impatient);
    assert!(is_woken(&waiting[1]), "there was a slot for one of them");
    // The next ones have 0.8 s.
    let next = join(&queue, &lanes, "");
    pass(0.7).await;
    let _another = join(&queue, &lanes, "");
    assert_ne!(next.entry.state.load(Ordering::Relaxed), IMPATIENT);
    pass(0.1).await;
    let _last = join(&queue, &lanes, "");
    assert_eq!(told(&next).await, Wake::Impatient);
}

/// A pool that has just begun is slow for a moment: that is not taken for what it will be.
#[tokio::test(start_paused = true)]
async fn what_was_slow_once_is_not_evidence_against_what_is_quick_now() {
    let (queue, lanes) = plain();
    let patient = |ms| Arrival { deadline: Instant::now() + Duration::from_millis(ms), ..arrival(0) };
    drop(queue.join(&lanes, 0, patient(1)).unwrap());
    have_run(&lanes, 8, 0.8).await;
    drop(queue.join(&lanes, 0, patient(500)).unwrap());
    have_run(&lanes, 100, 0.015).await;
    assert!(queue.join(&lanes, 0, patient(20)).is_ok(), "the mean of the last ten seconds is 73 ms, of the last one 15");
}

fn enter(lanes: &Arc<Lanes>, lane: &str, count: usize) -> Vec<Work> {
    (0..count).map_while(|_| lanes.enter(lanes.find(Some(lane)))).collect()
}

#[tokio::test(start_paused = true)]
async fn a_lane_at_its_limit_stops_nobody_else() {
    let (queue, lanes) = queue(4, &[("slow", 0, 0, 50)]);
    let slow = enter(&lanes, "slow", 4);
    assert_eq!(slow.len(), 2);
    let waits = join(&queue, &lanes, "slow");
    assert!(!waits.is_next());
    let (slow_lane, none) = (lanes.find(Some("slow")), 0);
    assert!(lanes.must_wait(slow_lane) && !lanes.must_wait(none));
    queue.wake_one();
    assert!(!is_woken(&waits), "a free slot is not for it");
    let other = join(&queue, &lanes, "");
    assert!(other.is_next());
    drop(slow);
    queue.wake(2);
    assert_eq!(woken(&[&waits, &other]), [true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_reserve_is_lent_until_it_is_used_and_then_kept_for_a_minute() {
    let (_queue, lanes) = queue(4, &[("checkout", 50, 0, 100)]);
    let all = enter(&lanes, "", 9);
    assert_eq!(all.len(), 4, "nobody has used the lane: all is lent");
    drop(all);
    drop(enter(&lanes, "checkout", 1));
    assert_eq!(enter(&lanes, "", 9).len(), 3, "one was used, one is kept");
    drop(enter(&lanes, "checkout", 4));
    assert_eq!(enter(&lanes, "", 9).len(), 2, "no more than the reserve is kept");
    pass(90.0).await;
    assert_eq!(enter(&lanes, "", 9).len(), 4, "lent again");
}

#[tokio::test(start_paused = true)]
async fn reserves_never_leave_nothing() {
    let (_queue, lanes) = queue(2, &[("a", 40, 0, 100), ("b", 40, 0, 100), ("c", 20, 0, 100)]);
    for lane in ["a", "b", "c"] {
        drop(enter(&lanes, lane, 1));
    }
    assert_eq!(enter(&lanes, "", 9).len(), 1);
    // Nor where those with a reserve are at work already.
    let (_queue, lanes) = queue(4, &[("a", 50, 0, 50), ("b", 50, 0, 100)]);
    drop(enter(&lanes, "b", 2));
    assert_eq!(enter(&lanes, "a", 9).len(), 2);
    let _at_work = enter(&lanes, "a", 2);
    assert_eq!(enter(&lanes, "", 9).len(), 1);
    assert_eq!([1, 2].map(|at| lanes.reserve(at, 4)), [2, 1]);
    assert_eq!([1, 2].map(|at| lanes.reserve(at, 1)), [0, 0]);
}

/// While nobody is usable nobody knows how long that takes: who waits is not told that it waits in vain.
#[tokio::test(start_paused = true)]
async fn where_nobody_is_usable_all_wait_in_order() {
    let (queue, lanes) = plain();
    have_run(&lanes, 8, 1.0).await;
    lanes.tell_capacity(Some(0));
    let mut waiting: Vec<_> = (0..MAX).map(|_| join(&queue, &lanes, "")).collect();
    pass(5.0).await;
    lanes.tell_capacity(Some(50));
    queue.wake_one();
    assert!(is_woken(&waiting[0]) || is_woken(&waiting[MAX - 1]));
    waiting.retain(|waiter| waiter.entry.state.load(Ordering::Relaxed) <= GRANTED);
    assert_eq!(waiting.len(), MAX, "some were shed");
}

#[tokio::test(start_paused = true)]
async fn what_is_lent_comes_back_first_then_the_higher_priority_and_equals_take_turns() {
    let (queue, lanes) = queue(8, &[("reserved", 10, 0, 100), ("high", 0, 10, 100), ("low", 0, 0, 100)]);
    let (mut running, mut begun) = (enter(&lanes, "", 8), Vec::new());
    let none = [join(&queue, &lanes, ""), join(&queue, &lanes, "")];
    let low = join(&queue, &lanes, "low");
    let high = join(&queue, &lanes, "high");
    let reserved = join(&queue, &lanes, "reserved");
    let mut order = Vec::new();
    for _ in 0..5 {
        running.pop();
        queue.wake_one();
        let all = [("none", &none[0]), ("none again", &none[1]), ("low", &low), ("high", &high), ("reserved", &reserved)];
        let (name, waiter) = all.into_iter().find(|(name, w)| is_woken(w) && !order.contains(name)).unwrap();
        order.push(name);
        begun.push(lanes.enter(lanes.find(Some(&waiter.lane))).unwrap());
    }
    assert_eq!(order, ["reserved", "high", "none", "low", "none again"]);
}

/// A slow lane that fills the queue does not take the places of the others.
#[tokio::test(start_paused = true)]
async fn a_lane_that_fills_the_queue_makes_room_for_another() {
    let (queue, lanes) = queue(4, &[("slow", 0, 0, 25)]);
    let four = |lane: &str| queue.join(&lanes, lanes.find(Some(lane)), Arrival { max: 4, ..arrival(0) });
    let slow: Vec<_> = (0..4).map(|_| four("slow").unwrap()).collect();
    assert!(four("slow").is_err());
    let _other = four("").unwrap();
    assert_eq!(told(&slow[3]).await, Wake::Evicted, "the last to come, in ordinary times");
    let _another = four("").unwrap();
    assert_eq!(told(&slow[2]).await, Wake::Evicted);
    assert_eq!(four("").unwrap_err(), Refused::Full { waiting: 4 }, "each has its part");
}

/// A reload that drops a lane does not lose who waits in it, nor keep its row for ever.
#[tokio::test(start_paused = true)]
async fn who_waits_in_a_lane_that_is_gone_goes_on_as_one_of_no_lane() {
    let (queue, lanes) = queue(4, &[("old", 0, 0, 25)]);
    let waiter = join(&queue, &lanes, "old");
    let next = Lanes::new(&[], &queue, Some(&lanes));
    drop(lanes);
    queue.follow(&next);
    queue.wake_one();
    assert!(is_woken(&waiter));
    waiter.settle();
    let last = Lanes::new(&[], &queue, Some(&next));
    drop(next);
    queue.follow(&last);
    assert_eq!(queue.lock().rows.len(), 1);
}
