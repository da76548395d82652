//! One request by the byte, and what may become of it.

use std::time::Duration;

use crate::support::{
    gate::{eventually, within},
    http::{self, Connection, HttpError},
    process::Slackwater,
    scripted_fpm::ScriptedFpm,
};

/// What the client sees.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    Status(u16),
    /// And the connection ends behind it: what follows is never a request.
    StatusAndClose(u16),
    /// RFCs leave it open.
    OneOf(&'static [u16]),
}

/// What PHP has received by then.
#[derive(Clone, Copy, Debug)]
pub enum Php {
    Nothing,
    /// One request with this body.
    One(&'static [u8]),
    /// So many.
    Count(usize),
    /// Refused, or one with this body: in no case something else.
    NothingOr(&'static [u8]),
}

pub struct Case {
    pub name: &'static str,
    /// Where that is written.
    pub source: &'static str,
    pub send: Vec<u8>,
    pub expect: Expect,
    pub php: Php,
}

impl Case {
    pub fn new(name: &'static str, source: &'static str, send: impl Into<Vec<u8>>, expect: Expect, php: Php) -> Case {
        Case { name, source, send: send.into(), expect, php }
    }
}

/// How long a client waits for an answer, and a connection for its end.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn toml(endpoint: &str, listen: &str, upstream: &str) -> String {
    format!(
        "workers = 1\n[listen]\nhttp = [\"{{HTTP}}\"]\nops = \"{{OPS}}\"\nadmin = \"{{ADMIN}}\"\n{listen}\n\
         [upstream.php]\n{upstream}\n[upstream.php.set.blue]\nendpoints = [\"{endpoint}\"]\n\
         [[site]]\nphp_root = \"/app\"\nscripts = [\"/*.php\"]\nupstream = \"php\"\n"
    )
}

/// Each on a connection of its own; then, on a new one, a request that must be answered. Gives how many there were.
pub async fn run(proxy: &Slackwater, fpm: &ScriptedFpm, cases: &[Case]) -> usize {
    let mut wrong = Vec::new();
    for case in cases {
        let before = fpm.requests().len();
        if let Err(why) = one(proxy, fpm, case, before).await {
            wrong.push(format!("{} ({}): {why}", case.name, case.source));
        }
        let after = within(PATIENCE, "a request after the case", http::get(proxy.http(), "/after.php")).await;
        if after.as_ref().map(|answer| answer.status).ok() != Some(200) {
            wrong.push(format!("{}: the next client got {after:?}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}\n", wrong.len(), cases.len(), wrong.join("\n"));
    cases.len()
}

async fn one(proxy: &Slackwater, fpm: &ScriptedFpm, case: &Case, before: usize) -> Result<(), String> {
    let mut client = Connection::open(proxy.http()).await.map_err(|error| error.to_string())?;
    let sent = client.send(&case.send).await;
    let answer = within(PATIENCE, case.name, client.read_response("GET")).await;
    let status = match (&answer, sent) {
        (Ok(answer), _) => answer.status,
        (Err(error), sent) => return Err(format!("no answer: {error}; sent: {sent:?}")),
    };
    let (fits, closes) = match case.expect {
        Expect::Status(wanted) => (status == wanted, false),
        Expect::StatusAndClose(wanted) => (status == wanted, true),
        Expect::OneOf(statuses) => (statuses.contains(&status), false),
    };
    if !fits {
        return Err(format!("{status} instead of {:?}", case.expect));
    }
    if closes {
        match within(PATIENCE, "the end of the connection", client.read_response("GET")).await {
            Err(HttpError::EndedEarly { got }) if got.is_empty() => {}
            other => return Err(format!("behind the answer came {other:?}")),
        }
    }
    if let Php::Count(count) = case.php {
        // Those behind the first are not waited for by its answer.
        eventually(case.name, async || match fpm.requests().len() - before {
            seen if seen >= count => Ok(()),
            seen => Err(format!("{seen} of {count}")),
        })
        .await;
    }
    let received = fpm.requests().split_off(before);
    let bodies: Vec<&[u8]> = received.iter().map(|request| &request.body[..]).collect();
    let fits = match case.php {
        Php::Nothing => bodies.is_empty(),
        Php::One(body) => bodies == [body],
        Php::Count(count) => bodies.len() == count,
        Php::NothingOr(body) => bodies.is_empty() && status >= 400 || bodies == [body],
    };
    if fits {
        Ok(())
    } else {
        Err(format!("PHP has received {:?}", received.iter().map(|r| (r.uri(), r.body.clone())).collect::<Vec<_>>()))
    }
}
