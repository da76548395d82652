//! Everything that asks FPM by itself: ping and status, on the control plane's thread.
//!
//! A probe takes a slot, as a user's request does. "No free slot" is never a failure, and busy is not dead: any well-formed answer
//! means alive. A ping is skipped while the endpoint answers users; a status question is not.

use std::{collections::BTreeMap, rc::Rc, sync::Arc, time::Duration};

use bytes::BytesMut;
use http::{HeaderMap, Method, Version};
use tokio::task::AbortHandle;

use super::{
    admission::Queue,
    dispatch::now_ms,
    endpoint::Endpoint,
    snapshot::{Set, Snapshot},
};
use crate::{
    fastcgi::{
        exchange::{Conn, Event, Exchange, Stdin},
        params, record, response,
    },
    model::{Address, upstream::SetConfig},
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

/// Told when a probe has changed something.
pub type Report = Rc<dyn Fn()>;

/// The probes that run now, by endpoint and set.
pub struct Probes {
    report: Report,
    running: BTreeMap<(u64, Arc<str>), (SetConfig, AbortHandle)>,
}

impl Probes {
    pub fn new(report: Report) -> Self {
        Probes { report, running: BTreeMap::new() }
    }

    /// Exactly the probes of this snapshot from now on.
    pub fn follow(&mut self, snapshot: &Snapshot) {
        let mut wanted = BTreeMap::new();
        for upstream in snapshot.upstreams.values().filter(|u| !u.retired) {
            for set in upstream.sets.values().filter(|s| s.config.ping.is_some() || s.config.status_path.is_some()) {
                for endpoint in &set.endpoints {
                    wanted.insert((endpoint.id, set.name().clone()), (endpoint.clone(), set.clone(), upstream.clone()));
                }
            }
        }
        self.running.retain(|key, (config, task)| {
            let stays = wanted.get(key).is_some_and(|(_, set, _)| set.config == *config);
            if !stays {
                task.abort();
            }
            stays
        });
        for (key, (endpoint, set, upstream)) in wanted {
            if !self.running.contains_key(&key) {
                let target = Target {
                    endpoint,
                    queue: upstream.queue.clone(),
                    connect_timeout: upstream.policy.connect_timeout,
                    learns_capacity: upstream.policy.workers_per_endpoint.is_none(),
                    report: self.report.clone(),
                };
                let task = tokio::task::spawn_local(probe(target, set.clone())).abort_handle();
                self.running.insert(key, (set.config.clone(), task));
            }
        }
    }
}

struct Target {
    endpoint: Arc<Endpoint>,
    queue: Arc<Queue>,
    connect_timeout: Duration,
    learns_capacity: bool,
    report: Report,
}

/// Asks one endpoint as its set says, as long as it is there.
async fn probe(target: Target, set: Arc<Set>) {
    let status = async {
        let Some(path) = &set.config.status_path else { return };
        let mut told = false;
        let mut settling = SETTLE_ASKS;
        loop {
            let known = target.status(path, set.config.status_listen.as_ref(), set.config.ping.is_none(), &mut told).await;
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
            if !answers_users && let Some(slot) = target.endpoint.try_take(&target.queue) {
                let result = target.ask(&target.endpoint.address, &ping.path, "").await;
                drop(slot);
                if matches!(&result, Ok((code, _)) if [403, 404].contains(code)) && !std::mem::replace(&mut told, true) {
                    tracing::warn!(endpoint = %target.endpoint.address, path = ping.path, "ping.path is not configured in FPM");
                }
                target.probed(result.map(|_| ()), ping.fall, ping.rise);
            }
            tokio::time::sleep(ping.every).await;
        }
    };
    tokio::join!(status, ping);
}

impl Target {
    fn probed(&self, result: Result<(), String>, fall: u32, rise: u32) {
        let now = now_ms();
        let before = self.endpoint.is_usable(now);
        self.endpoint.update_health(now, |health| health.probed(result.is_ok(), fall, rise));
        let after = self.endpoint.is_usable(now);
        if before != after {
            let reason = result.err().unwrap_or_default();
            tracing::info!(endpoint = %self.endpoint.address, usable = after, reason, "a probe has changed an endpoint");
            (self.report)();
        }
    }

    /// Whether the question was answered. Where the set has no ping, the answer also says whether the endpoint is alive.
    async fn status(&self, path: &str, listen: Option<&Address>, decides: bool, told: &mut bool) -> bool {
        let result = match listen {
            // A listener of its own: no worker answers, no slot is needed.
            Some(address) => self.ask(address, path, "json&full").await,
            None => {
                let slot = self.endpoint.take_for_probe(&self.queue).await;
                let result = self.ask(&self.endpoint.address, path, "json&full").await;
                drop(slot);
                result
            }
        };
        let answered = result.is_ok();
        if let Ok((code, body)) = &result {
            let capacity = static_workers(body);
            if *code != 200 && !std::mem::replace(told, true) {
                tracing::warn!(endpoint = %self.endpoint.address, path, code, "status_path is not configured in FPM; its capacity stays unknown");
            }
            if self.learns_capacity && *code == 200 && self.endpoint.capacity() != capacity {
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

    /// Status code and body of FPM's answer to `path`.
    async fn ask(&self, address: &Address, path: &str, query: &str) -> Result<(u16, Vec<u8>), String> {
        let asking = async {
            let mut conn = Conn::connect(address, self.connect_timeout).await.map_err(|e| e.to_string())?;
            encode(&mut conn.output, path, query).map_err(|e| e.to_string())?;
            let mut exchange = Exchange::start(conn, Stdin::Done, true);
            let mut answer = BytesMut::new();
            loop {
                match exchange.event().await.map_err(|e| e.to_string())? {
                    Event::Stdout(bytes) if answer.len() + bytes.len() <= MAX_ANSWER => answer.extend_from_slice(&bytes),
                    Event::Stdout(_) => return Err("the answer is larger than 1 MiB".to_owned()),
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
        let limit = self.connect_timeout + ANSWER_GRACE;
        tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
    }
}

fn encode(out: &mut BytesMut, path: &str, query: &str) -> Result<(), params::ParamsError> {
    let uri = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
    record::put_begin_request(out, false);
    let nobody = std::net::Ipv4Addr::LOCALHOST;
    params::write(
        out,
        &params::Input {
            method: &Method::GET,
            request_uri: &uri,
            query,
            version: Version::HTTP_11,
            headers: &HeaderMap::new(),
            host: "",
            content_length: None,
            remote_addr: nobody.into(),
            remote_port: 0,
            server_addr: (nobody, 0).into(),
            server_port: 0,
            https: false,
            request_id: "probe",
            extra: &[],
            script: params::Script { script_name: path, path_info: "", document_root: "", script_filename: path },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_static_pool_tells_its_capacity() {
        let of = |pm: &str| format!(r#"{{"process manager":"{pm}","total processes":472,"processes":[{{}},{{}}]}}"#);
        assert_eq!(static_workers(of("static").as_bytes()), Some(2));
        assert_eq!(static_workers(of("dynamic").as_bytes()), None);
        assert_eq!(static_workers(b"File not found.\n"), None);
    }
}
