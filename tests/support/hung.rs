//! One thread of a process that does not come back from a call: strace(1) holds it in the one it waits with.

use std::fs;
use std::process::Stdio;

use super::gate::eventually;

pub struct HungThread {
    strace: tokio::process::Child,
}

impl HungThread {
    /// Returns once the thread of this name is held.
    pub async fn of(pid: u32, name: &str) -> HungThread {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").filter_map(Result::ok);
        let mut named = tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
        let thread = named.next().unwrap_or_else(|| panic!("no thread {name}")).file_name().into_string().expect("a number");
        let mut strace = tokio::process::Command::new("strace");
        strace.args(["-q", "-o", "/dev/null", "-e", "trace=epoll_wait,epoll_pwait", "-e"]);
        strace.args(["inject=epoll_wait,epoll_pwait:delay_enter=600000000", "-p", &thread]);
        strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let strace = strace.spawn().expect("strace (tests/run installs it)");
        let status = format!("/proc/{pid}/task/{thread}/status");
        eventually("strace holds the thread", async || match fs::read_to_string(&status) {
            Ok(status) if status.contains("State:\tt") => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        HungThread { strace }
    }

    /// It goes on where it was.
    pub async fn let_go(&mut self) {
        self.strace.kill().await.expect("it ends");
    }
}
