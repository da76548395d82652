//! `slackwater swap` where replicas share an annotation: all are asked, then the annotation is patched, then all are waited for.
//!
//! The annotation is desired state and stays the only truth: this command never speaks an order to a replica, and where somebody else
//! changes the annotation meanwhile it lets go.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use super::fail;
use crate::{
    control::{
        api::SwapRequest,
        config::Config,
        kubernetes::{
            ACTIVE,
            client::{self, Place, said},
        },
        reconcile::no_such,
        replicas::{self, Answer, Answers, Replica, Way},
    },
    model::settings::Kubernetes,
};

const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Where the replicas are, and the Service whose annotation they follow.
pub struct Fleet {
    pub kubernetes: Kubernetes,
    pub self_service: Arc<str>,
    pub active_from: Arc<str>,
    /// The upstream's, as the configuration here has them.
    pub sets: Vec<Arc<str>>,
    pub ops_port: u16,
}

impl Fleet {
    /// `None`: the replicas do not share an annotation for this upstream, as far as this configuration says.
    pub fn of(config: &Config, upstream: &str) -> Option<Fleet> {
        let kubernetes = config.settings.kubernetes.clone()?;
        let upstream = config.upstreams.get(upstream)?;
        Some(Fleet {
            self_service: kubernetes.self_service.clone()?,
            active_from: upstream.active_from.clone()?,
            sets: upstream.sets.iter().map(|set| set.name.clone()).collect(),
            ops_port: config.settings.listen.ops?.port(),
            kubernetes,
        })
    }
}

pub fn run(fleet: &Fleet, order: &SwapRequest) -> ExitCode {
    if !fleet.sets.iter().any(|set| **set == *order.set) {
        return fail(&no_such("set", &format!("{} of upstream {}", order.set, order.upstream), fleet.sets.iter()));
    }
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match super::block_on(async { Turn::new(fleet, order).await?.swap().await }) {
        Ok((message, receipt)) => {
            println!("{message}");
            if let Some(receipt) = receipt {
                println!("{receipt}");
            }
            ExitCode::SUCCESS
        }
        Err(reason) => fail(&reason),
    }
}

struct Turn<'a> {
    fleet: &'a Fleet,
    order: &'a SwapRequest,
    slices: Api<EndpointSlice>,
    services: Api<Service>,
    server: String,
    way: Way,
}

impl<'a> Turn<'a> {
    async fn new(fleet: &'a Fleet, order: &'a SwapRequest) -> Result<Self, String> {
        let namespace = &fleet.kubernetes.namespace;
        let (client, place, server) = client::plain(&fleet.kubernetes).await?;
        let slices = Api::namespaced(client.clone(), namespace);
        let services = Api::namespaced(client.clone(), namespace);
        let way = match place {
            Place::Inside => Way::Direct,
            Place::Outside => Way::Proxy(client, namespace.clone()),
        };
        Ok(Turn { fleet, order, slices, services, server, way })
    }

    async fn swap(&self) -> Result<(String, Option<Value>), String> {
        let SwapRequest { upstream, set, dry_run, force, wait, timeout_seconds } = self.order;
        if *force {
            return Err(format!(
                "--force cannot be passed on: each replica decides by itself whether it follows {ACTIVE} (min_ready of the set says how many pods it needs)"
            ));
        }
        let budget = Duration::try_from_secs_f64(*timeout_seconds).map_err(|e| e.to_string())?;
        let replicas = self.replicas().await?;
        let all = replicas.len();
        let (before, _) = self.annotation().await?;
        let votes = self.way.get_all(&replicas, &format!("/vote?upstream={upstream}&set={set}")).await;
        let noes = noes(&votes);
        if !noes.is_empty() {
            let list = noes.iter().map(|(replica, why)| format!("\n  {}: {why}", replica.name)).collect::<String>();
            return Err(format!(
                "{} of {all} replicas would not take set {set} of upstream {upstream}, or did not answer; nothing was changed:{list}",
                noes.len()
            ));
        }
        let first = self.way.get_all(&replicas, "/status").await;
        let hashes: BTreeMap<&str, Vec<&str>> = first.iter().fold(BTreeMap::new(), |mut all, (replica, answer)| {
            let hash = answer.as_ref().map_or("no answer", |(_, status)| status["config_hash"].as_str().unwrap_or("none"));
            all.entry(hash).or_default().push(&replica.name);
            all
        });
        if hashes.len() > 1 {
            let list = hashes.iter().map(|(hash, names)| format!("\n  {hash}: {}", names.join(", "))).collect::<String>();
            super::say(&format!(
                "warning: the replicas have different configurations (config_hash); has the ConfigMap reached all?{list}"
            ));
        }
        if *dry_run {
            return Ok((format!("set {set} of upstream {upstream} would be taken by all {all} replicas"), None));
        }
        if before.as_deref() == Some(&**set) && first.values().all(|answer| serves(answer, upstream, set)) {
            return Ok((format!("set {set} of upstream {upstream} is active on all {all} replicas already"), None));
        }
        let began = Instant::now();
        self.patch(Some(set), None).await?;
        let done = self.wait_for_all(budget, began, before.as_deref()).await?;
        let turned = format!("upstream {upstream} has turned to set {set} on all {} replicas", done.len());
        if !*wait {
            return Ok((turned, None));
        }
        Ok((format!("{turned}; the old set has drained"), Some(self.receipt(&first, &done, budget))))
    }

    /// The replicas' last answers, when all serve the set and, with `--wait`, the old set has drained on all.
    async fn wait_for_all(&self, budget: Duration, began: Instant, before: Option<&str>) -> Result<Answers, String> {
        let SwapRequest { upstream, set, wait, .. } = self.order;
        loop {
            // Pods come and go meanwhile: who is ready now counts.
            let replicas = self.replicas().await?;
            let (now, version) = self.annotation().await?;
            if now.as_deref() != Some(&**set) {
                let now = now.as_deref().unwrap_or("nothing");
                return Err(format!(
                    "somebody else has set {ACTIVE} of service {} to {now} meanwhile; it is left so",
                    self.fleet.active_from
                ));
            }
            let answers = self.way.get_all(&replicas, "/status").await;
            let refusing = answers.iter().find_map(|(replica, answer)| Some((replica, refusal(answer, upstream, set)?)));
            if let Some((replica, why)) = refusing {
                return Err(self.put_back(before, version, &format!("{} does not take set {set}: {why}", replica.name)).await);
            }
            let late: Vec<String> = answers
                .iter()
                .filter(|(_, answer)| !serves(answer, upstream, set))
                .map(|(replica, answer)| match answer {
                    Ok((_, status)) => {
                        let active = status["upstreams"][upstream]["active"].as_str().unwrap_or("nothing");
                        format!("{} serves {active}", replica.name)
                    }
                    Err(why) => format!("{}: {why}", replica.name),
                })
                .collect();
            let draining: Vec<String> = answers
                .iter()
                .filter_map(|(replica, answer)| {
                    let turns = answer.as_ref().ok()?.1["upstreams"][upstream]["draining"].as_array()?;
                    let turn = turns.first()?;
                    Some(format!("{} drains {} since {:.1} s", replica.name, turn["from"].as_str()?, turn["seconds"].as_f64()?))
                })
                .collect();
            if late.is_empty() && (!wait || draining.is_empty()) {
                return Ok(answers);
            }
            if began.elapsed() >= budget {
                if late.is_empty() {
                    return Err(format!(
                        "all replicas serve set {set} of upstream {upstream}, which stands; after {budget:?} the old set has not drained: {}",
                        draining.join("; ")
                    ));
                }
                return Err(self.put_back(before, version, &format!("after {budget:?} {}", late.join("; "))).await);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn replicas(&self) -> Result<Vec<Replica>, String> {
        let service = &self.fleet.self_service;
        let params = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        let slices = self.slices.list(&params).await.map_err(|e| self.unasked(&format!("the slices of service {service}"), &e))?;
        let ready = replicas::ready(&slices.items, self.fleet.ops_port);
        if ready.is_empty() {
            return Err(format!(
                "service {service} (kubernetes.self_service) has no ready pods in namespace {}",
                self.fleet.kubernetes.namespace
            ));
        }
        Ok(ready)
    }

    fn unasked(&self, what: &str, error: &kube::Error) -> String {
        format!("{what} in namespace {}: the Kubernetes API at {}: {}", self.fleet.kubernetes.namespace, self.server, said(error))
    }

    /// The annotation, and the version of the Service that had it.
    async fn annotation(&self) -> Result<(Option<String>, Option<String>), String> {
        let name = &self.fleet.active_from;
        let service = self.services.get(name).await.map_err(|e| self.unasked(&format!("service {name} (active_from)"), &e))?;
        Ok((service.annotations().get(ACTIVE).map(|set| set.trim().to_owned()), service.resource_version()))
    }

    /// With a `version` only where nobody has changed the Service since.
    async fn patch(&self, set: Option<&str>, version: Option<String>) -> Result<(), String> {
        let name = &self.fleet.active_from;
        let mut patch = json!({ "metadata": { "annotations": { ACTIVE: set } } });
        if let Some(version) = version {
            patch["metadata"]["resourceVersion"] = version.into();
        }
        match self.services.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 403 => Err(format!(
                "all replicas would turn, but these credentials may not patch service {name} ({}); run this with those of CI, or: kubectl annotate --overwrite service {name} {ACTIVE}={}",
                status.message,
                set.unwrap_or_default()
            )),
            Err(error) => Err(format!("service {name} cannot be patched: {}", said(&error))),
        }
    }

    /// What becomes of a turn that not all take: the annotation as it was, and why.
    async fn put_back(&self, before: Option<&str>, version: Option<String>, why: &str) -> String {
        let was = before.map_or_else(|| "none".to_owned(), |set| format!("{ACTIVE}={set}"));
        match self.patch(before, version).await {
            Ok(()) => format!("{why}; the annotation is what it was: {was}"),
            Err(error) => format!("{why}; and the annotation could not be put back to {was}: {error}"),
        }
    }

    /// One receipt for all: what each replica counted since it was asked first.
    fn receipt(&self, first: &Answers, last: &Answers, budget: Duration) -> Value {
        let SwapRequest { upstream, set, .. } = self.order;
        let receipts = |answers: &Answers, replica: &Replica| -> Vec<Value> {
            let status = answers.get(replica).and_then(|answer| answer.as_ref().ok());
            status.and_then(|(_, status)| status["drains"].as_array().cloned()).unwrap_or_default()
        };
        let mut each = Vec::new();
        for replica in last.keys() {
            let known = receipts(first, replica);
            for mut receipt in receipts(last, replica).into_iter().filter(|r| !known.contains(r)) {
                if receipt["kind"] == "swap" && receipt["upstream"] == **upstream && receipt["to"] == **set {
                    receipt["replica"] = replica.name.as_str().into();
                    each.push(receipt);
                }
            }
        }
        let sum = |key: &str| each.iter().filter_map(|r| r[key].as_u64()).sum::<u64>();
        let started = each.iter().filter_map(|r| r["started"].as_str()).min();
        let seconds = each.iter().filter_map(|r| r["seconds"].as_f64()).fold(0.0, f64::max);
        let cut: Vec<&Value> = each.iter().filter_map(|r| r["cut"].as_array()).flatten().collect();
        json!({
            "kind": "swap", "upstream": upstream, "from": each.first().map(|r| &r["from"]), "to": set,
            "started": started, "seconds": seconds, "budget_seconds": budget.as_secs_f64(),
            "in_flight": sum("in_flight"), "completed": sum("completed"), "retried": sum("retried"),
            "client_left": sum("client_left"), "failed": sum("failed"), "cut": cut, "by": "annotation", "replicas": each,
        })
    }
}

/// Who would not take it, and why.
fn noes(answers: &Answers) -> Vec<(&Replica, String)> {
    let reason = |answer: &Answer| match answer {
        Ok((_, vote)) if vote["vote"] == "yes" => None,
        Ok((code, vote)) => Some(vote["reason"].as_str().map_or_else(|| format!("answers {code}"), str::to_owned)),
        Err(why) => Some(why.clone()),
    };
    answers.iter().filter_map(|(replica, answer)| Some((replica, reason(answer)?))).collect()
}

fn serves(answer: &Answer, upstream: &str, set: &str) -> bool {
    answer.as_ref().is_ok_and(|(_, status)| status["upstreams"][upstream]["active"] == *set)
}

/// Why a replica that has seen the annotation does not follow it.
fn refusal(answer: &Answer, upstream: &str, set: &str) -> Option<String> {
    let of = &answer.as_ref().ok()?.1["upstreams"][upstream];
    (of["annotation"] == *set).then(|| of["refused"].as_str().map(str::to_owned))?
}
