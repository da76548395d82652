//! Child processes that do not outlive the test, however it ends.
//!
//! All are started by one thread that lives as long as the process: PR_SET_PDEATHSIG fires when the *thread* that
//! forked ends, and a test's own thread may end before the handle is dropped.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{SyncSender, sync_channel};

type Order = (Command, SyncSender<io::Result<Child>>);

/// Starts `command`; the child gets the signal `at_our_death` if this process dies without having ended it.
pub fn spawn(mut command: Command, at_our_death: libc::c_int) -> io::Result<Child> {
    static STARTER: OnceLock<SyncSender<Order>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (orders, received) = sync_channel::<Order>(16);
        std::thread::spawn(move || {
            for (mut command, reply) in received {
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let parent = std::process::id();
    // SAFETY: prctl and getppid are async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, at_our_death);
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::Error::other("the test has already died"));
            }
            Ok(())
        });
    }
    let (reply, child) = sync_channel(1);
    starter.send((command, reply)).expect("the starter thread lives on");
    child.recv().expect("the starter thread answers")
}

/// Sends a signal to a process that this test started; false if it is gone.
pub fn signal(pid: u32, signal: libc::c_int) -> bool {
    // SAFETY: kill has no memory effects.
    unsafe { libc::kill(pid.cast_signed(), signal) == 0 }
}

/// The living children of `parent`, from /proc; zombies are not counted.
pub fn children_of(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // pid (name) state ppid ...: the name may hold blanks and brackets.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let mut fields = rest.split_whitespace();
        let (state, ppid) = (fields.next(), fields.next());
        if ppid == Some(parent.to_string().as_str()) && state != Some("Z") {
            found.push(pid);
        }
    }
    found.sort_unstable();
    found
}
