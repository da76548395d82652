//! How the API server is reached, and with whose credentials.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher,
};
use tokio::time::Instant;

use super::{Asked, Contacts};
use crate::model::settings::Kubernetes;

/// A watch on which not even its end comes is half open.
const SILENCE: Duration = Duration::from_secs(70);
const CONNECT: Duration = Duration::from_secs(5);

/// Whether this process runs in a pod of the cluster, where it reaches other pods by their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Inside,
    Outside,
}

/// An error of the API in words: what it answers and with which code, or why it does not.
pub fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => said_of_status(status),
        other => chain(other),
    }
}

pub(super) fn said_of_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(e) | watcher::Error::WatchStartFailed(e) | watcher::Error::WatchFailed(e) => said(e),
        watcher::Error::WatchError(status) => said_of_status(status),
        other => chain(other),
    }
}

fn said_of_status(status: &kube::core::Status) -> String {
    let hint = match status.code {
        401 => "; is the token the right one?",
        403 => "; does the Role have it (docs/install.md, Kubernetes)?",
        _ => "",
    };
    format!("{} ({}){hint}", status.message, status.code)
}

/// An error with what it comes from.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text.trim_start_matches("ServiceError: ").to_owned()
}

/// By the file that is named, else the pod's service account, else $KUBECONFIG.
async fn config(settings: &Kubernetes) -> Result<(Config, Place), String> {
    let options = KubeConfigOptions::default();
    // The kubelet sets it in every pod (Kubernetes, "Accessing the API from a Pod").
    let place = if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() { Place::Inside } else { Place::Outside };
    let mut config = match &settings.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|e| format!("kubeconfig {}: {}", path.display(), chain(&e)))?;
            let config = Config::from_custom_kubeconfig(file, &options).await;
            config.map_err(|e| format!("kubeconfig {}: {}", path.display(), chain(&e)))?
        }
        None => match Config::incluster() {
            Ok(config) => config,
            Err(incluster) => match Kubeconfig::from_env() {
                Ok(Some(file)) => {
                    let config = Config::from_custom_kubeconfig(file, &options).await;
                    config.map_err(|e| format!("$KUBECONFIG: {}", chain(&e)))?
                }
                Ok(None) => {
                    return Err(format!(
                        "no service account ({}), and neither kubernetes.kubeconfig nor $KUBECONFIG",
                        chain(&incluster)
                    ));
                }
                Err(error) => return Err(format!("$KUBECONFIG: {}", chain(&error))),
            },
        },
    };
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    // kube's own retry of 429, 503 and 504 backs off to 1000 s without a word; ours says what is wrong and stays below 5 s.
    config.default_retry = false;
    Ok((config, place))
}

fn server(config: &Config) -> String {
    config.cluster_url.to_string().trim_end_matches('/').to_owned()
}

/// A client for orders and Events; where it goes.
///
/// # Errors
/// In words, with where the credentials were looked for.
pub async fn plain(settings: &Kubernetes) -> Result<(Client, Place, String), String> {
    let (config, place) = config(settings).await?;
    let server = server(&config);
    Ok((ClientBuilder::try_from(config).map_err(|e| chain(&e))?.build(), place, server))
}

/// A client whose good answers are noted.
pub(super) async fn heard(
    settings: &Kubernetes,
    service: &Arc<str>,
    asked: Asked,
    contacts: &Arc<Contacts>,
) -> Result<(Client, String), String> {
    let (config, _) = config(settings).await?;
    let server = server(&config);
    let heard = Heard { service: service.clone(), asked, contacts: contacts.clone() };
    let builder = ClientBuilder::try_from(config).map_err(|e| chain(&e))?;
    Ok((builder.with_layer(&tower::layer::layer_fn(|inner| Hearing { inner, heard: heard.clone() })).build(), server))
}

#[derive(Clone)]
struct Heard {
    service: Arc<str>,
    asked: Asked,
    contacts: Arc<Contacts>,
}

/// Notes each good answer: a watch that goes on quietly gives no event that would show it.
struct Hearing<S> {
    inner: S,
    heard: Heard,
}

impl<S, A, B> tower::Service<Request<A>> for Hearing<S>
where
    S: tower::Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (answer, heard) = (self.inner.call(request), self.heard.clone());
        Box::pin(async move {
            let answer = answer.await?;
            if answer.status().is_success() {
                heard.contacts.change(&heard.service, heard.asked, |contact| contact.answered = Some(Instant::now()));
            }
            Ok(answer)
        })
    }
}
