//! A cluster as a test sees it, through its API alone: the fake one, or the real one that SLACKWATER_TEST_KUBECONFIG names. The test needs
//! nothing there but a namespace, Services without selectors and EndpointSlices, all of which it creates and removes.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Event, Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::apiserver::{ApiServer, Pod, slice};
use super::netns;

pub const REAL: &str = "SLACKWATER_TEST_KUBECONFIG";

pub struct Cluster {
    pub namespace: String,
    pub kubeconfig: PathBuf,
    client: Client,
    /// `None`: a real one.
    pub fake: Option<ApiServer>,
    _folder: tempfile::TempDir,
}

impl Cluster {
    pub async fn fake() -> Cluster {
        let folder = tempfile::tempdir().expect("a folder");
        let server = ApiServer::start().await;
        let kubeconfig = server.kubeconfig(folder.path());
        let client = client(&kubeconfig).await;
        Cluster { namespace: "learning".to_owned(), kubeconfig, client, fake: Some(server), _folder: folder }
    }

    /// `None`: no kubeconfig is named. From inside a namespace of [`netns`].
    pub async fn real() -> Option<Cluster> {
        match std::env::var_os(REAL) {
            Some(named) => Some(Cluster::named(Path::new(&named)).await),
            None => None,
        }
    }

    pub async fn named(named: &Path) -> Cluster {
        let folder = tempfile::tempdir().expect("a folder");
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, through_a_door(named).await).expect("the kubeconfig is written");
        let client = client(&kubeconfig).await;
        let namespace = format!("slackwater-test-{}", std::process::id());
        let object: Namespace = from(json!({ "metadata": { "name": namespace } }));
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces.create(&PostParams::default(), &object).await.expect("a namespace for this test");
        Cluster { namespace, kubeconfig, client, fake: None, _folder: folder }
    }

    /// Removes what it has created.
    pub async fn remove(self) {
        if self.fake.is_none() {
            let namespaces: Api<Namespace> = Api::all(self.client.clone());
            namespaces.delete(&self.namespace, &DeleteParams::default()).await.expect("the namespace is removed");
        }
    }

    /// Creates or replaces a slice of a Service; the port is called "fpm".
    pub async fn slice(&self, name: &str, service: &str, port: u16, pods: &[Pod]) {
        self.put_slice(name, slice(name, service, port, "IPv4", pods)).await;
    }

    pub async fn put_slice(&self, name: &str, object: Value) {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut object: EndpointSlice = from(object);
        let known = api.get_opt(name).await.expect("the slice can be asked for");
        match known {
            None => drop(api.create(&PostParams::default(), &object).await.expect("the slice is created")),
            Some(known) => {
                object.metadata.resource_version = known.metadata.resource_version;
                drop(api.replace(name, &PostParams::default(), &object).await.expect("the slice is replaced"));
            }
        }
    }

    pub async fn delete_slice(&self, name: &str) {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &self.namespace);
        api.delete(name, &DeleteParams::default()).await.expect("the slice is deleted");
    }

    /// Creates a Service without a selector, or sets its annotations, as `kubectl annotate --overwrite` does.
    pub async fn annotate(&self, name: &str, annotations: &[(&str, &str)]) {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let annotations: serde_json::Map<String, Value> =
            annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        let metadata = json!({ "name": name, "annotations": annotations });
        if api.get_opt(name).await.expect("the Service can be asked for").is_some() {
            let patch = Patch::Merge(json!({ "metadata": { "annotations": annotations } }));
            api.patch(name, &PatchParams::default(), &patch).await.expect("the Service is patched");
        } else {
            let spec = json!({ "ports": [{ "name": "fpm", "port": 9000 }] });
            let object: Service = from(json!({ "metadata": metadata, "spec": spec }));
            api.create(&PostParams::default(), &object).await.expect("the Service is created");
        }
    }

    pub async fn annotation(&self, service: &str, name: &str) -> Option<String> {
        let api: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        api.get(service).await.expect("the Service is there").metadata.annotations?.get(name).cloned()
    }

    /// Reason and message of each.
    pub async fn events(&self) -> Vec<(String, String)> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let all = api.list(&ListParams::default()).await.expect("Events can be listed").items;
        all.into_iter().map(|event| (event.reason.unwrap_or_default(), event.message.unwrap_or_default())).collect()
    }
}

fn from<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).expect("a well-formed object")
}

async fn client(kubeconfig: &Path) -> Client {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let file = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a kubeconfig");
    Client::try_from(config).expect("a client")
}

/// The kubeconfig with a server that can be reached from here; certificates are checked against the name that it had.
async fn through_a_door(kubeconfig: &Path) -> String {
    let file = Kubeconfig::read_from(kubeconfig).unwrap_or_else(|error| panic!("{REAL}: {error}"));
    let mut file = serde_json::to_value(&file).expect("a kubeconfig is JSON");
    for cluster in file["clusters"].as_array_mut().into_iter().flatten() {
        let server = cluster["cluster"]["server"].as_str().expect("a server").to_owned();
        let uri: http::Uri = server.parse().expect("the server is a URI");
        let (scheme, host) = (uri.scheme_str().unwrap_or("https"), uri.host().expect("a host").to_owned());
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        let address = tokio::net::lookup_host((host.trim_matches(['[', ']']), port)).await.ok().and_then(|mut all| all.next());
        let door = netns::door(address.unwrap_or_else(|| panic!("{REAL}: {host} has no address here; name one"))).await;
        if scheme == "https" && cluster["cluster"]["tls-server-name"].is_null() {
            cluster["cluster"]["tls-server-name"] = host.trim_matches(['[', ']']).into();
        }
        cluster["cluster"]["server"] = format!("{scheme}://{door}").into();
    }
    file.to_string()
}
