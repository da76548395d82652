//! Everything that asks FPM by itself: ping, status and preflight, on the control plane's thread.
//!
//! A probe takes a slot, as a user's request does. "No free slot" is never a failure, and busy is not dead: any well-formed answer
//! means alive. A ping is skipped while the endpoint answers users; a status question is not.

use std::{collections::BTreeMap, rc::Rc, sync::Arc, time::Duration};

use bytes::BytesMut;
use http::{HeaderMap, HeaderValue, Method, Version, header};
use tokio::{sync::Semaphore, task::AbortHandle, time::Instant};

use super::{
    admission::Queue,
    dispatch::now_ms,
    endpoint::Endpoint,
    health,
    shares::{Borrowing, Seen},
    snapshot::{Set, Snapshot},
};
use crate::{
    error::Kind,
    fastcgi::{
        exchange::{Conn, Event, Exchange, Stdin},
        params, record, response,
    },
    model::{
        Address,
        upstream::{Preflight, SetConfig},
    },
};

const STATUS_EVERY: Duration = Duration::from_secs(10);
/// As long as the status question has not been answered.
const STATUS_RETRY: Duration = Duration::from_secs(1);
/// Right after its start FPM tells fewer processes than there will be (seen: 2 of 4 for up to 17 ms), so the first answers are asked for
/// again soon.
const SETTLE_ASKS: u32 = 4;
const SETTLE_EVERY: Duration = Duration::from_millis(250);
/// Beyond connect_timeout.
const ANSWER_GRACE: Duration = Duration::from_secs(1);
/// Some 400 bytes for each process.
const MAX_ANSWER: usize = 1024 * 1024;

/// How often FPM is asked who works there, by a replica that needs more than its share. What it borrows it gives back within four answers.
const BORROW_EVERY: Duration = Duration::from_millis(100);
/// How often an endpoint that is not shared is looked at again.
const SHARED_EVERY: Duration = Duration::from_secs(1);

/// Questions under way at once.
const AT_ONCE: usize = 64;
/// Between two requests of a preflight that did not go well.
const PREFLIGHT_RETRY: Duration = Duration::from_millis(500);

/// Told when a probe has changed something.
pub type Report = Rc<dyn Fn()>;

/// Makes the request of a preflight, as the site of its host would send it.
pub type Warm = Rc<dyn Fn(&Snapshot, &str, &SetConfig, &Preflight) -> Result<Question, String>>;

/// One GET to FPM.
#[derive(Clone, Debug, Default)]
pub struct Question {
    pub uri: String,
    pub query: String,
    pub host: String,
    pub https: bool,
    pub params: Vec<(String, String)>,
    pub script_name: String,
    pub path_info: String,
    pub document_root: String,
}

impl Question {
    /// Of ping and status, which FPM answers itself.
    fn of_fpm(path: &str, query: &str) -> Self {
        let uri = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        Question { uri, query: query.to_owned(), script_name: path.to_owned(), ..Question::default() }
    }
}

/// The probes that run now, by endpoint and set.
pub struct Probes {
    report: Report,
    warm: Warm,
    /// At most so many questions at once, however many pods come.
    permits: Rc<Semaphore>,
    /// By endpoint, upstream and set.
    running: BTreeMap<(u64, Arc<str>, Arc<str>), Running>,
}

struct Running {
    config: SetConfig,
    /// Of those that have had the address, the one that it asks.
    pod: u32,
    task: AbortHandle,
}

impl Probes {
    pub fn new(report: Report, warm: Warm) -> Self {
        Probes { report, warm, permits: Rc::new(Semaphore::new(AT_ONCE)), running: BTreeMap::new() }
    }

    /// Exactly the probes of this snapshot from now on.
    pub fn follow(&mut self, snapshot: &Snapshot) {
        let mut wanted = BTreeMap::new();
        for upstream in snapshot.upstreams.values().filter(|u| !u.retired) {
            for set in upstream.sets.values() {
                let config = &set.config;
                for endpoint in &set.endpoints {
                    // A reload that drops the preflight lets everybody in.
                    if config.preflight.is_none()
                        && endpoint.health().preflight != health::Preflight::Done
                        && !asks(snapshot, endpoint)
                    {
                        endpoint.set_preflight(now_ms(), health::Preflight::Done, String::new());
                    }
                    // Nor does one that drops its probes leave behind what they have said last.
                    if endpoint.health().probe != health::Probe::None && !is_probed(snapshot, endpoint) {
                        endpoint.update_health(now_ms(), health::Health::not_probed);
                    }
                    if config.ping.is_none() && config.status_path.is_none() && config.preflight.is_none() {
                        continue;
                    }
                    let key = (endpoint.id, upstream.name.clone(), set.name().clone());
                    wanted.insert(key, (endpoint.clone(), set.clone(), upstream.clone()));
                }
            }
        }
        self.running.retain(|key, running| {
            let stays =
                wanted.get(key).is_some_and(|(endpoint, set, _)| set.config == running.config && endpoint.pods() == running.pod);
            if !stays {
                running.task.abort();
            }
            stays
        });
        for (key, (endpoint, set, upstream)) in wanted {
            if !self.running.contains_key(&key) {
                let pod = endpoint.pods();
                let target = Target {
                    permits: self.permits.clone(),
                    upstream: upstream.name.clone(),
                    set: set.name().clone(),
                    endpoint,
                    queue: upstream.queue.clone(),
                    connect_timeout: upstream.policy.connect_timeout,
                    learns_capacity: upstream.policy.workers_per_endpoint.is_none(),
                    report: self.report.clone(),
                };
                let question = set.config.preflight.as_ref().map(|p| (self.warm)(snapshot, &upstream.name, &set.config, p));
                let task = tokio::task::spawn_local(probe(target, set.clone(), question)).abort_handle();
                self.running.insert(key, Running { config: set.config.clone(), pod, task });
            }
        }
    }
}

/// The sets whose endpoints are asked at all.
fn followed(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Set>> {
    snapshot.upstreams.values().filter(|u| !u.retired).flat_map(|u| u.sets.values())
}

/// Whether any set with a preflight has this endpoint.
fn asks(snapshot: &Snapshot, endpoint: &Endpoint) -> bool {
    let mut sets = followed(snapshot);
    sets.any(|set| set.config.preflight.is_some() && set.endpoint(endpoint.id).is_some())
}

/// Whether any set that has this endpoint asks whether it is alive.
fn is_probed(snapshot: &Snapshot, endpoint: &Endpoint) -> bool {
    let mut sets = followed(snapshot);
    sets.any(|set| (set.config.ping.is_some() || set.config.status_path.is_some()) && set.endpoint(endpoint.id).is_some())
}

struct Target {
    permits: Rc<Semaphore>,
    upstream: Arc<str>,
    set: Arc<str>,
    endpoint: Arc<Endpoint>,
    queue: Arc<Queue>,
    connect_timeout: Duration,
    learns_capacity: bool,
    report: Report,
}

/// Asks one endpoint as its set says, as long as it is there.
async fn probe(target: Target, set: Arc<Set>, question: Option<Result<Question, String>>) {
    let listen = set.config.status_listen.as_ref().map(|listen| listen.at(&target.endpoint.address));
    let status = async {
        let Some(path) = &set.config.status_path else { return };
        let mut settling = SETTLE_ASKS;
        loop {
            let known = target.status(path, listen.as_ref(), set.config.ping.is_none()).await;
            settling = if known { settling.saturating_sub(1) } else { SETTLE_ASKS };
            tokio::time::sleep(match (known, settling) {
                (false, _) => STATUS_RETRY,
                (true, 0) => STATUS_EVERY,
                (true, _) => SETTLE_EVERY,
            })
            .await;
        }
    };
    let ping = async {
        let Some(ping) = &set.config.ping else { return };
        let mut told = false;
        loop {
            let quiet_ms = now_ms().saturating_sub(target.endpoint.last_answer_ms.load(std::sync::atomic::Ordering::Relaxed));
            let answers_users =
                target.endpoint.is_usable(now_ms()) && quiet_ms < ping.every.as_millis().try_into().unwrap_or(u64::MAX);
            if !answers_users && let Some(slot) = target.endpoint.try_take_for_probe(&target.queue) {
                let result = target.ask_fpm(&target.endpoint.address, &ping.path, "").await;
                drop(slot);
                if matches!(&result, Ok((code, _)) if [403, 404].contains(code)) && !std::mem::replace(&mut told, true) {
                    tracing::warn!(endpoint = %target.endpoint.address, path = ping.path, "ping.path is not configured in FPM");
                }
                target.probed(result.map(|_| ()), ping.fall, ping.rise);
            }
            tokio::time::sleep(ping.every).await;
        }
    };
    let preflight = async {
        let (Some(preflight), Some(question)) = (&set.config.preflight, question) else { return };
        if target.endpoint.health().preflight != health::Preflight::Done {
            target.preflight(preflight, question).await;
        }
    };
    let borrow = async {
        let Some(path) = &set.config.status_path else { return };
        let mut borrowing = Borrowing::default();
        loop {
            target.borrow(path, listen.as_ref(), &set, &mut borrowing).await;
            let shared = target.endpoint.is_shared_by_replicas();
            tokio::time::sleep(if shared { BORROW_EVERY } else { SHARED_EVERY }).await;
        }
    };
    tokio::join!(status, ping, preflight, borrow);
}

impl Target {
    fn probed(&self, result: Result<(), String>, fall: u32, rise: u32) {
        // Where this machine had nothing to ask with, that says nothing of the pod.
        if result.as_ref().is_err_and(|why| why.starts_with(Kind::LocalLimit.cause())) {
            return;
        }
        let now = now_ms();
        let is_down = || matches!(self.endpoint.health().probe, health::Probe::Down { .. });
        let (was_usable, was_down) = (self.endpoint.is_usable(now), is_down());
        let reason = result.as_ref().err().cloned().unwrap_or_default();
        self.endpoint.set_probe_problem(&reason);
        self.endpoint.update_health(now, |health| health.probed(result.is_ok(), fall, rise));
        let usable = self.endpoint.is_usable(now);
        if (usable, is_down()) != (was_usable, was_down) {
            let (endpoint, upstream, set) = (&self.endpoint.address, &*self.upstream, &*self.set);
            match is_down() {
                false => tracing::info!(%endpoint, upstream, set, usable, "a probe has changed an endpoint"),
                true => tracing::warn!(%endpoint, upstream, set, usable, reason, "a probe has changed an endpoint"),
            }
        }
        if usable != was_usable {
            (self.report)();
        }
    }

    /// Whether the question was answered. Where the set has no ping, the answer also says whether the endpoint is alive.
    async fn status(&self, path: &str, listen: Option<&Address>, decides: bool) -> bool {
        let result = match listen {
            // A listener of its own: no worker answers, no slot is needed.
            Some(address) => self.ask_fpm(address, path, "json&full").await,
            None => {
                let slot = self.endpoint.take_for_probe(&self.queue).await;
                let result = self.ask_fpm(&self.endpoint.address, path, "json&full").await;
                drop(slot);
                result
            }
        };
        let answered = result.is_ok();
        let problem = match &result {
            Ok((200, _)) => String::new(),
            Ok((code, _)) => format!("{path} answers {code}: is pm.status_path configured in FPM?"),
            Err(why) => why.clone(),
        };
        // With every retry the same would be said again.
        if self.endpoint.set_status_problem(&problem) {
            let asked = listen.unwrap_or(&self.endpoint.address);
            if problem.is_empty() {
                tracing::info!(endpoint = %self.endpoint.address, %asked, "FPM's status answers again");
            } else {
                let lost = "its workers cannot be learned, nor borrowed from other replicas";
                tracing::warn!(endpoint = %self.endpoint.address, %asked, path, why = problem, lost, "FPM's status cannot be asked");
            }
        }
        if let Ok((code, body)) = &result {
            let capacity = static_workers(body);
            if self.learns_capacity && !self.endpoint.is_told_capacity() && *code == 200 && self.endpoint.capacity() != capacity {
                tracing::info!(endpoint = %self.endpoint.address, ?capacity, "capacity from FPM's status (pm = static)");
                self.endpoint.set_capacity(capacity);
                (self.report)();
            }
        }
        if decides {
            self.probed(result.map(|_| ()), 1, 1);
        }
        answered
    }

    /// Asks FPM what nobody uses, where that is needed, and borrows it; gives back what is not needed any more.
    async fn borrow(&self, path: &str, listen: Option<&Address>, set: &Set, borrowing: &mut Borrowing) {
        let endpoint = &self.endpoint;
        let needed = endpoint.is_shared_by_replicas()
            && endpoint.used() >= endpoint.share()
            && (self.queue.waiting() > 0 || endpoint.borrowed() > 0 && endpoint.used() > endpoint.share());
        let seen = match (needed, endpoint.capacity()) {
            (true, Some(capacity)) => self.seen(path, listen, capacity).await,
            _ => None,
        };
        let borrowed = match seen {
            Some(seen) => borrowing.seen(endpoint.share(), seen),
            None => {
                borrowing.forget();
                0
            }
        };
        let before = endpoint.borrowed();
        if borrowed != before {
            tracing::debug!(endpoint = %endpoint.address, share = endpoint.share(), borrowed, ?seen, "workers of other replicas");
            endpoint.set_borrowed(borrowed);
            self.queue.tell_capacity(set.share(now_ms()));
            for _ in before..borrowed {
                self.queue.wake_one();
            }
        }
    }

    async fn seen(&self, path: &str, listen: Option<&Address>, capacity: u32) -> Option<Seen> {
        let mut own = self.endpoint.used();
        let question = Question::of_fpm(path, "json&full");
        let answer = match listen {
            Some(address) => self.ask(address, &question, BORROW_EVERY * 4).await,
            None => {
                // Where none of ours is free the question would take the place of a request.
                let slot = self.endpoint.take_for_probe(&self.queue).await;
                let answer = self.ask(&self.endpoint.address, &question, BORROW_EVERY * 2).await;
                // The worker that answers is at work as well, on a slot of ours.
                own = own.max(self.endpoint.used());
                drop(slot);
                answer
            }
        };
        let (active, listen_queue) = workers_at_work(&answer.ok().filter(|(code, _)| *code == 200)?.1)?;
        // Requests begin and end while FPM answers.
        let own = own.max(self.endpoint.used());
        Some(Seen { capacity, active, listen_queue, own })
    }

    /// Until so many good answers in a row, or until it is given up. A slot is waited for as long as it takes.
    async fn preflight(&self, preflight: &Preflight, question: Result<Question, String>) {
        let (mut good, mut spent) = (0, Duration::ZERO);
        let mut last = String::new();
        let question = match question {
            Ok(question) => question,
            Err(why) => return self.warmed(preflight, health::Preflight::GaveUp, why),
        };
        while good < preflight.requests {
            if spent >= preflight.give_up {
                let why =
                    format!("{good} of {} good answers after {:?}; the last was {last}", preflight.requests, preflight.give_up);
                return self.warmed(preflight, health::Preflight::GaveUp, why);
            }
            let so_far = if last.is_empty() { String::new() } else { format!("; the last was {last}") };
            let until = preflight.give_up;
            let standing = format!("{good} of {} good answers{so_far}; asked for at most {until:?}", preflight.requests);
            self.endpoint.set_preflight(now_ms(), health::Preflight::Asking, standing);
            let slot = self.endpoint.take_for_probe(&self.queue).await;
            let asked = Instant::now();
            let limit = preflight.timeout.min(preflight.give_up.saturating_sub(spent));
            let result = self.ask(&self.endpoint.address, &question, limit).await;
            drop(slot);
            let (from, to) = preflight.expect;
            let is_good = matches!(&result, Ok((code, _)) if (from..=to).contains(code));
            last = result.map_or_else(|why| why, |(code, _)| code.to_string());
            if is_good {
                good += 1;
            } else {
                good = 0;
                tokio::time::sleep(PREFLIGHT_RETRY).await;
            }
            spent += asked.elapsed();
        }
        self.warmed(preflight, health::Preflight::Done, String::new());
    }

    fn warmed(&self, preflight: &Preflight, outcome: health::Preflight, why: String) {
        let (endpoint, upstream, set) = (&self.endpoint.address, &*self.upstream, &*self.set);
        if outcome == health::Preflight::Done {
            tracing::info!(%endpoint, upstream, set, "preflight done");
        } else {
            tracing::error!(
                %endpoint,
                upstream,
                set,
                path = preflight.path,
                why,
                "preflight gave up: no requests there unless nothing else is usable; to let it in: slackwater endpoint enable {upstream} {endpoint}"
            );
        }
        self.endpoint.set_preflight(now_ms(), outcome, why);
        (self.report)();
    }

    async fn ask_fpm(&self, address: &Address, path: &str, query: &str) -> Result<(u16, Vec<u8>), String> {
        self.ask(address, &Question::of_fpm(path, query), self.connect_timeout + ANSWER_GRACE).await
    }

    /// Status code and body of the answer, which may take as long as `limit`, connecting included.
    async fn ask(&self, address: &Address, question: &Question, limit: Duration) -> Result<(u16, Vec<u8>), String> {
        // Waiting for the others' answers is not the pod's fault.
        let _permit = self.permits.acquire().await;
        let asking = async {
            let mut conn = Conn::connect(address, self.connect_timeout).await.map_err(|e| e.to_string())?;
            encode(&mut conn.output, question).map_err(|e| e.to_string())?;
            let mut exchange = Exchange::start(conn, Stdin::Done, true);
            let mut answer = BytesMut::new();
            let mut size = 0;
            loop {
                match exchange.event().await.map_err(|e| e.to_string())? {
                    Event::Stdout(bytes) => {
                        size += bytes.len();
                        if size <= MAX_ANSWER {
                            answer.extend_from_slice(&bytes);
                        }
                    }
                    Event::Stderr(_) => {}
                    Event::End => break,
                }
            }
            match response::parse_head(&answer, &response::Limits::default()) {
                Ok(Some((head, used))) => Ok((head.status.as_u16(), answer.split_off(used).to_vec())),
                Ok(None) => Err("END_REQUEST before the end of the headers".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        };
        tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
    }
}

fn encode(out: &mut BytesMut, question: &Question) -> Result<(), params::ParamsError> {
    let mut headers = HeaderMap::new();
    if !question.host.is_empty() {
        headers.insert(header::USER_AGENT, HeaderValue::from_static("Slackwater preflight"));
    }
    record::put_begin_request(out, false);
    let nobody = std::net::Ipv4Addr::LOCALHOST;
    params::write(
        out,
        &params::Input {
            method: &Method::GET,
            request_uri: &question.uri,
            query: &question.query,
            version: Version::HTTP_11,
            headers: &headers,
            host: &question.host,
            content_length: None,
            remote_addr: nobody.into(),
            remote_port: 0,
            server_addr: (nobody, 0).into(),
            server_port: match (question.host.is_empty(), question.https) {
                (true, _) => 0,
                (false, true) => 443,
                (false, false) => 80,
            },
            https: question.https,
            remote_user: "",
            request_id: "probe",
            extra: &question.params,
            script: params::Script {
                script_name: &question.script_name,
                path_info: &question.path_info,
                document_root: &question.document_root,
            },
        },
    )?;
    record::put_stdin_end(out);
    Ok(())
}

/// The number of workers that FPM's status page (`?json&full`) lists: with `pm = static` it is all there will ever be; otherwise it is
/// only how many there are now (php-src#16221). Counted from the list: on kept connections FPM counts a worker as active once for each
/// request and as idle once for each connection, so its `total processes` grows without end (seen: 472 of 8).
fn static_workers(body: &[u8]) -> Option<u32> {
    let status: serde_json::Value = serde_json::from_slice(body).ok()?;
    (status.get("process manager")?.as_str()? == "static").then_some(())?;
    u32::try_from(status.get("processes")?.as_array()?.len()).ok().filter(|n| *n > 0)
}

/// How many of the processes that FPM's status page (`?json&full`) lists are not idle, and how many connections wait for one.
fn workers_at_work(body: &[u8]) -> Option<(u32, u32)> {
    let status: serde_json::Value = serde_json::from_slice(body).ok()?;
    let processes = status.get("processes")?.as_array()?;
    let active = processes.iter().filter(|process| process.get("state").is_none_or(|state| state != "Idle")).count();
    let listen_queue = status.get("listen queue").and_then(serde_json::Value::as_u64).unwrap_or(0);
    Some((u32::try_from(active).ok()?, u32::try_from(listen_queue).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target whose endpoint nobody answers for, and its only slot.
    fn nobody() -> (Target, super::super::endpoint::Slot) {
        let endpoint = Arc::new(Endpoint::new(1, "unix:/nobody/listens/here".parse().unwrap(), 1));
        endpoint.set_capacity(Some(1));
        let queue = Arc::new(Queue::default());
        let slot = endpoint.try_take(&queue).unwrap();
        let connect_timeout = Duration::from_secs(1);
        let (upstream, set) = ("php".into(), "blue".into());
        let permits = Rc::new(Semaphore::new(1));
        (Target { permits, upstream, set, endpoint, queue, connect_timeout, learns_capacity: false, report: Rc::new(|| ()) }, slot)
    }

    #[tokio::test(start_paused = true)]
    async fn a_preflight_waits_for_a_slot_and_only_its_own_time_counts() {
        let (target, slot) = nobody();
        let preflight = Preflight {
            path: "/".to_owned(),
            host: None,
            https: false,
            requests: 3,
            expect: (200, 200),
            timeout: Duration::from_secs(5),
            give_up: Duration::from_secs(10),
        };
        let mut asking = Box::pin(target.preflight(&preflight, Ok(Question::default())));
        assert!(tokio::time::timeout(Duration::from_secs(3_600), &mut asking).await.is_err(), "gave up for want of a slot");
        assert_eq!(target.endpoint.health().preflight, health::Preflight::Asking);
        drop(slot);
        let began = Instant::now();
        asking.await;
        assert_eq!(began.elapsed(), preflight.give_up);
        assert_eq!(target.endpoint.health().preflight, health::Preflight::GaveUp);
        let reason = target.endpoint.reason(now_ms());
        assert!(reason.starts_with("preflight gave up: 0 of 3 good answers after 10s; the last was "), "{reason}");
    }

    #[test]
    fn only_a_static_pool_tells_its_capacity() {
        let of = |pm: &str| format!(r#"{{"process manager":"{pm}","total processes":472,"processes":[{{}},{{}}]}}"#);
        assert_eq!(static_workers(of("static").as_bytes()), Some(2));
        assert_eq!(static_workers(of("dynamic").as_bytes()), None);
        assert_eq!(static_workers(b"File not found.\n"), None);
    }

    #[test]
    fn who_is_not_idle_is_at_work() {
        let status = br#"{"listen queue":3,"active processes":77,"processes":[{"state":"Idle"},{"state":"Running"},{"state":"Reading headers"}]}"#;
        assert_eq!(workers_at_work(status), Some((2, 3)));
        assert_eq!(workers_at_work(b"File not found.\n"), None);
    }
}
