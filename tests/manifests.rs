//! `config/kubernetes`, rendered: every document is the Kubernetes object it says it is, nobody may do more than he must, and the time-outs
//! obey the formula of `docs/elb.md`.

use std::{collections::BTreeMap, path::Path, process::Command};

use k8s_openapi::api::{
    apps::v1::Deployment,
    autoscaling::v2::HorizontalPodAutoscaler,
    core::v1::{ConfigMap, Namespace, PersistentVolumeClaim, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{Role, RoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use slackwater::control::config;

/// Between the slice that says "terminating" and every kube-proxy and load-balancer controller that has acted on it (docs/elb.md).
const PROPAGATION: u64 = 10;
/// The kubelet signals when the slice changes; FPM gets QUIT so much later.
const PRE_STOP: u64 = 5;

const REQUIRED: &[(&str, &str)] = &[
    ("NAMESPACE", "learning"),
    ("IMAGE", "registry.example/slackwater:1"),
    ("PHP_IMAGE_BLUE", "registry.example/site:41"),
    ("PHP_IMAGE_GREEN", "registry.example/site:42"),
    ("PHP_IMAGE_WORKER", "registry.example/site:42"),
    ("RELEASE_BLUE", "41"),
    ("RELEASE_GREEN", "42"),
    ("OPS_ALLOW", "10.0.0.0/16,192.168.7.0/24"),
    ("TRUSTED_PROXIES", "10.0.0.0/16"),
    ("POD_CIDR", "10.0.0.0/16"),
    ("API_SERVER_CIDR", "192.168.7.0/24"),
    ("CERTIFICATE_ARN", "arn:aws:acm:eu-west-1:1:certificate/1"),
    ("ASSETS_STORAGE_CLASS", "efs"),
    ("REDIS", "redis:6379"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn render(env: &[(&str, &str)]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_slackwater"));
    command.env_clear().envs(env.iter().copied()).args(["render", "config/kubernetes"]).current_dir(root()).output().unwrap()
}

/// The documents with the required names and these.
fn objects(env: &[(&str, &str)]) -> Vec<Value> {
    let output = render(&[REQUIRED, env].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("{{"), "a placeholder is left");
    serde_saphyr::from_multiple::<Value>(&text).unwrap()
}

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// The object as its type has it again: a key that the type does not know is lost on the way, and found by `missing`.
fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
    let parsed: T = serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    serde_json::to_value(parsed).unwrap()
}

fn missing(written: &Value, known: &Value, path: &str, lost: &mut Vec<String>) {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            for (key, value) in written {
                match known.get(key) {
                    Some(known) => missing(value, known, &format!("{path}.{key}"), lost),
                    None => lost.push(format!("{path}.{key}")),
                }
            }
        }
        (Value::Array(written), Value::Array(known)) if written.len() == known.len() => {
            for (n, (written, known)) in written.iter().zip(known).enumerate() {
                missing(written, known, &format!("{path}[{n}]"), lost);
            }
        }
        _ if written == known => {}
        _ => lost.push(format!("{path}: {written} is {known}")),
    }
}

#[test]
fn every_document_is_the_object_it_says_it_is() {
    let objects = objects(&[]);
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for object in &objects {
        let kind = format!("{}/{}", object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let known = match &*kind {
            "v1/Namespace" => typed::<Namespace>(object),
            "v1/ServiceAccount" => typed::<ServiceAccount>(object),
            "v1/ConfigMap" => typed::<ConfigMap>(object),
            "v1/Service" => typed::<Service>(object),
            "v1/PersistentVolumeClaim" => typed::<PersistentVolumeClaim>(object),
            "apps/v1/Deployment" => typed::<Deployment>(object),
            "autoscaling/v2/HorizontalPodAutoscaler" => typed::<HorizontalPodAutoscaler>(object),
            "networking.k8s.io/v1/NetworkPolicy" => typed::<NetworkPolicy>(object),
            "policy/v1/PodDisruptionBudget" => typed::<PodDisruptionBudget>(object),
            "rbac.authorization.k8s.io/v1/Role" => typed::<Role>(object),
            "rbac.authorization.k8s.io/v1/RoleBinding" => typed::<RoleBinding>(object),
            other => panic!("{other} is not expected here"),
        };
        let mut lost = Vec::new();
        missing(object, &known, &format!("{kind} {}", object["metadata"]["name"]), &mut lost);
        assert!(lost.is_empty(), "keys that this kind does not have: {lost:#?}");
        let namespace = &object["metadata"]["namespace"];
        assert!(object["kind"] == "Namespace" || *namespace == "learning", "{kind} in {namespace}");
        *kinds.entry(kind).or_default() += 1;
    }
    println!("{kinds:#?}");
    assert_eq!(kinds["apps/v1/Deployment"], 4);
}

#[test]
fn a_name_that_is_not_set_is_told_and_all_that_must_be_set_are_documented() {
    let output = render(&[]);
    assert!(!output.status.success() && output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    let names: std::collections::BTreeSet<&str> =
        said.lines().filter_map(|line| line.split(": ").nth(1)?.split(' ').next()).collect();
    assert_eq!(names, REQUIRED.iter().map(|(name, _)| *name).collect());
    let example = std::fs::read_to_string(root().join("config/kubernetes/example.env")).unwrap();
    for name in &names {
        assert!(example.lines().any(|line| line.starts_with(&format!("{name}="))), "example.env has no {name}");
    }
    let docs = std::fs::read_to_string(root().join("docs/install.md")).unwrap();
    for name in names {
        assert!(docs.contains(&format!("`{name}`")), "docs/install.md does not say what {name} is");
    }
}

#[test]
fn the_edge_may_watch_and_say_and_ci_may_turn_one_service() {
    let objects = objects(&[]);
    let rules = |name: &str| find(&objects, "Role", name)["rules"].as_array().unwrap().clone();
    assert_eq!(
        rules("slackwater"),
        [
            json!({ "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] }),
            json!({ "apiGroups": [""], "resources": ["services"], "resourceNames": ["php", "php-blue", "php-green"], "verbs": ["get", "list", "watch"] }),
            json!({ "apiGroups": [""], "resources": ["events"], "verbs": ["create"] }),
        ]
    );
    assert_eq!(
        rules("slackwater-ci"),
        [
            json!({ "apiGroups": [""], "resources": ["services"], "resourceNames": ["php"], "verbs": ["get", "patch"] }),
            json!({ "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list"] }),
            json!({ "apiGroups": [""], "resources": ["pods"], "verbs": ["list"] }),
            json!({ "apiGroups": [""], "resources": ["pods/proxy"], "verbs": ["get"] }),
        ]
    );
    // The Services of the configuration are those of the Role.
    let config = configuration(&objects);
    let php = &config.upstreams["php"];
    let mut named: Vec<String> = php.sets.iter().map(|set| set.kubernetes.as_ref().unwrap().service.to_string()).collect();
    named.push(php.active_from.as_ref().unwrap().to_string());
    named.sort();
    assert_eq!(json!(named), rules("slackwater")[1]["resourceNames"]);
    assert_eq!(config.settings.kubernetes.as_ref().unwrap().self_service.as_deref(), Some("slackwater"));
}

#[test]
fn what_ci_has_names_the_same_services() {
    let ours = configuration(&objects(&[]));
    let ci = config::load(&root().join("config/kubernetes/ci.toml"), &|name| (name == "NAMESPACE").then(|| "learning".to_owned()))
        .unwrap();
    assert_eq!(ci.settings.kubernetes, ours.settings.kubernetes);
    assert_eq!(ci.settings.listen.ops.map(|ops| ops.port()), ours.settings.listen.ops.map(|ops| ops.port()));
    let (ci, ours) = (&ci.upstreams["php"], &ours.upstreams["php"]);
    assert_eq!(ci.active_from, ours.active_from);
    let services =
        |u: &config::UpstreamConfig| u.sets.iter().map(|set| (set.name.clone(), set.kubernetes.clone())).collect::<Vec<_>>();
    assert_eq!(services(ci), services(ours));
}

#[test]
fn behind_an_nlb_nobody_is_trusted() {
    let objects = objects(&[("TRUSTED_PROXIES", "")]);
    assert!(configuration(&objects).settings.listen.trusted_proxies.is_empty());
    let attributes = annotation(find(&objects, "Service", "slackwater-nlb"), "target-group-attributes");
    assert!(attributes.contains("preserve_client_ip.enabled=true"), "{attributes}");
    assert!(attributes.contains("proxy_protocol_v2.enabled=false") && !configuration(&objects).settings.listen.proxy_protocol);
}

/// Both sides turn together, and probes, which send no header, go to the ops port.
#[test]
fn an_nlb_may_tell_the_address_in_a_proxy_header() {
    let objects = objects(&[("PROXY_PROTOCOL", "required"), ("NLB_PROXY_PROTOCOL", "true")]);
    assert!(configuration(&objects).settings.listen.proxy_protocol);
    let attributes = annotation(find(&objects, "Service", "slackwater-nlb"), "target-group-attributes");
    assert!(attributes.contains("proxy_protocol_v2.enabled=true"), "{attributes}");
    let edge = &find(&objects, "Deployment", "slackwater")["spec"]["template"]["spec"]["containers"][0];
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        assert!(edge[probe].is_null() || edge[probe]["httpGet"]["port"] == "ops", "{probe}: {}", edge[probe]);
    }
    assert!(!edge["readinessProbe"].is_null());
}

/// The ConfigMap's file, as the process reads it.
fn configuration(objects: &[Value]) -> config::Config {
    let text = find(objects, "ConfigMap", "slackwater")["data"]["slackwater.toml"].as_str().unwrap().to_owned();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slackwater.toml");
    std::fs::write(&path, text).unwrap();
    config::load(&path, &|_| None).unwrap_or_else(|all| panic!("{all:?}"))
}

fn annotation(service: &Value, name: &str) -> String {
    let name = format!("service.beta.kubernetes.io/aws-load-balancer-{name}");
    service["metadata"]["annotations"][&name].as_str().unwrap_or_else(|| panic!("no {name}")).to_owned()
}

#[test]
fn lame_duck_and_grace_obey_the_formula() {
    // The defaults, and what somebody else may set.
    for env in [&[][..], &[("HEALTH_INTERVAL", "10"), ("LAME_DUCK", "35"), ("GRACE", "100"), ("READ_TIMEOUT", "60")]] {
        let objects = objects(env);
        let config = configuration(&objects);
        let drain = &config.settings.drain;
        let (grace, lame_duck, margin) = (drain.grace.as_secs(), drain.lame_duck.as_secs(), drain.margin.as_secs());
        let longest = config.upstreams["php"].policy.read_timeout.as_secs();
        for name in ["slackwater-elb", "slackwater-nlb"] {
            let service = find(&objects, "Service", name);
            let number = |what: &str| annotation(service, what).parse::<u64>().unwrap();
            let noticed =
                number("healthcheck-interval") * number("healthcheck-unhealthy-threshold") + number("healthcheck-timeout");
            println!(
                "{name}: noticed after {noticed} s, {PROPAGATION} s for everybody to act; lame_duck {lame_duck} s, grace {grace} s"
            );
            assert!(lame_duck >= noticed + PROPAGATION, "{name}");
            assert!(number("healthcheck-timeout") < number("healthcheck-interval"), "a classic ELB wants it shorter");
        }
        assert!(
            grace >= lame_duck + longest + margin,
            "a request of {longest} s that comes in the last moment of lame_duck is cut"
        );
        assert_eq!(config.warnings.iter().filter(|w| w.contains("read_timeout")).count(), 0, "{:?}", config.warnings);

        // One number in four places.
        let pod = &find(&objects, "Deployment", "slackwater")["spec"]["template"]["spec"];
        assert_eq!(pod["terminationGracePeriodSeconds"], grace);
        let env = pod["containers"][0]["env"].as_array().unwrap().iter().find(|e| e["name"] == "GRACE").unwrap();
        assert_eq!(env["value"], grace.to_string());
        assert_eq!(annotation(find(&objects, "Service", "slackwater-elb"), "connection-draining-timeout"), grace.to_string());
        let attributes = annotation(find(&objects, "Service", "slackwater-nlb"), "target-group-attributes");
        assert!(attributes.contains(&format!("deregistration_delay.timeout_seconds={grace}")), "{attributes}");
        assert!(attributes.contains("target_health_state.unhealthy.connection_termination.enabled=false"), "{attributes}");
        // The load balancer closes idle connections first.
        let idle: u64 = annotation(find(&objects, "Service", "slackwater-elb"), "connection-idle-timeout").parse().unwrap();
        assert!(config.settings.listen.idle_timeout.as_secs() > idle);
    }
}

#[test]
fn the_edge_pod_is_locked_down_and_nothing_holds_it_up() {
    let objects = objects(&[]);
    let deployment = &find(&objects, "Deployment", "slackwater")["spec"];
    assert_eq!(deployment["strategy"]["rollingUpdate"], json!({ "maxUnavailable": 0, "maxSurge": 1 }));
    let template = &deployment["template"];
    assert_eq!(template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"], "true");
    let (pod, container) = (&template["spec"], &template["spec"]["containers"][0]);
    assert!(container["lifecycle"].is_null(), "a preStop would shorten grace");
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let own = &container["securityContext"];
    assert_eq!((&own["readOnlyRootFilesystem"], &own["allowPrivilegeEscalation"]), (&json!(true), &json!(false)));
    assert_eq!(own["capabilities"]["drop"], json!(["ALL"]));
    assert_eq!(
        (&container["readinessProbe"]["httpGet"]["path"], &container["livenessProbe"]["httpGet"]["path"]),
        (&json!("/readyz"), &json!("/livez"))
    );
    // Everything that is written to has a volume, and every mount one.
    let config = configuration(&objects);
    let mounts: Vec<&str> =
        container["volumeMounts"].as_array().unwrap().iter().map(|m| m["mountPath"].as_str().unwrap()).collect();
    for written in [config.settings.state.as_deref().unwrap(), &config.settings.listen.admin, &config.settings.buffer.dir] {
        assert!(mounts.iter().any(|mount| written.starts_with(mount)), "{} lies on the read-only root", written.display());
    }
    for set in &config.upstreams["php"].sets {
        assert!(set.root.as_ref().unwrap().starts_with("/assets"));
    }
    assert!(config.settings.listen.ops_allow.len() == 4, "both networks of OPS_ALLOW count");
    let policy = &find(&objects, "NetworkPolicy", "slackwater")["spec"]["ingress"];
    let open: Vec<&Value> = policy.as_array().unwrap().iter().filter(|rule| rule["from"].is_null()).collect();
    assert_eq!(open.len(), 1);
    assert_eq!(open[0]["ports"], json!([{ "protocol": "TCP", "port": 8080 }]), "only the traffic port is for everybody");
}

#[test]
fn php_pods_end_after_their_requests_and_are_selected_by_their_services() {
    let objects = objects(&[]);
    let config = configuration(&objects);
    let fpm = find(&objects, "ConfigMap", "php-fpm")["data"]["zzz-slackwater.conf"].as_str().unwrap();
    let number = |key: &str| {
        let line =
            fpm.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix('=')).unwrap_or_else(|| panic!("no {key}"));
        line.trim().trim_end_matches('s').parse::<u64>().unwrap()
    };
    let longest = config.upstreams["php"].policy.read_timeout.as_secs();
    for colour in ["blue", "green"] {
        let deployment = &find(&objects, "Deployment", &format!("php-{colour}"))["spec"];
        let pod = &deployment["template"]["spec"];
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        let control = number("process_control_timeout");
        let terminate = number("request_terminate_timeout");
        assert!(terminate > longest && control > terminate, "a request may take {longest} s, then {terminate} s, then {control} s");
        assert!(PRE_STOP + control < grace && PRE_STOP + control + 5 >= grace, "just under grace: {PRE_STOP} + {control}, {grace}");
        assert_eq!(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"], json!(["sleep", PRE_STOP.to_string()]));
        let service = find(&objects, "Service", &format!("php-{colour}"));
        assert_eq!(service["spec"]["selector"], deployment["template"]["metadata"]["labels"]);
        assert_eq!(service["metadata"]["annotations"]["slackwater.dev/fpm-workers"], number("pm.max_children").to_string());
        assert_eq!(service["spec"]["ports"][0]["name"], "fpm");
        // It scales by what waits and runs, and applying the file again does not undo that.
        assert!(deployment["replicas"].is_null());
        let scaler = &find(&objects, "HorizontalPodAutoscaler", &format!("php-{colour}"))["spec"];
        assert_eq!(scaler["scaleTargetRef"]["name"], format!("php-{colour}"));
        let metric = &scaler["metrics"][0]["external"]["metric"];
        assert_eq!(metric["name"], "slackwater_upstream_saturation_if_active");
        assert_eq!(metric["selector"]["matchLabels"], json!({ "upstream": "php", "set": colour }));
        let rules = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/install.md")).unwrap();
        assert!(rules.contains("- record: slackwater_upstream_saturation_if_active"), "the metric comes from nowhere");
        // Asked on the port that FPM listens on, and that the edge may reach.
        let set = config.upstreams["php"].sets.iter().find(|set| &*set.name == colour).unwrap();
        assert_eq!(set.status_listen.as_ref().unwrap().to_string(), format!("0.0.0.0:{}", number("pm.status_listen")));
    }
    let open = &find(&objects, "NetworkPolicy", "php")["spec"]["ingress"][0]["ports"];
    for port in [number("listen"), number("pm.status_listen")] {
        assert!(open.as_array().unwrap().iter().any(|rule| rule["port"] == port), "port {port} is closed");
    }
    let php = find(&objects, "Service", "php");
    assert!(php["spec"]["selector"].is_null() && php["metadata"]["annotations"].is_null(), "applying it again must turn nothing");
    let worker = &find(&objects, "Deployment", "worker")["spec"]["template"]["spec"];
    assert!(worker["containers"][0]["lifecycle"]["preStop"].to_string().contains("kill -QUIT 1"));
    for (selected, kind) in [("slackwater", "Service"), ("slackwater", "PodDisruptionBudget")] {
        let labels = &find(&objects, "Deployment", selected)["spec"]["template"]["metadata"]["labels"];
        let spec = &find(&objects, kind, selected)["spec"]["selector"];
        assert!(spec == labels || &spec["matchLabels"] == labels);
    }
}

/// The init container's script with real folders: twice at once, and again, it gives one whole release.
#[test]
fn assets_are_copied_whole_and_once() {
    let objects = objects(&[]);
    let init = &find(&objects, "Deployment", "php-green")["spec"]["template"]["spec"]["initContainers"][0];
    let folder = tempfile::tempdir().unwrap();
    let (assets, public) = (folder.path().join("assets"), folder.path().join("public"));
    for path in [&assets, &public.join("build")] {
        std::fs::create_dir_all(path).unwrap();
    }
    std::fs::write(public.join("build/app-9a0b.css"), "new").unwrap();
    let command = init["command"].as_array().unwrap();
    let script = command[2]
        .as_str()
        .unwrap()
        .replace("/assets", assets.to_str().unwrap())
        .replace("/var/www/html/public", public.to_str().unwrap());
    let run = || Command::new("sh").args([command[1].as_str().unwrap(), &script]).spawn().unwrap();
    for mut child in [run(), run(), run()] {
        assert!(child.wait().unwrap().success());
    }
    assert!(run().wait().unwrap().success());
    let there: Vec<String> = std::fs::read_dir(&assets).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(there, ["42"]);
    assert_eq!(std::fs::read_to_string(assets.join("42/build/app-9a0b.css")).unwrap(), "new");
}
