//! What the tests stand on. Each test binary says `mod support;` and uses what it needs.
//!
//! Pretending to be FPM: [`scripted_fpm`] (misbehaves by name), [`real_fpm`] (the real one), [`fastcgi`] (the
//! wire by hand, apart from the crate's own codec so that both cannot be wrong in the same way).
//! Pretending to be the client: [`http`] (raw HTTP/1.1), [`h2wire`] (HTTP/2 by the frame), [`ledger`] (never retries, checks every byte),
//! [`load_balancer`] (reuses connections, checks health, notices late), [`relay`] (a network in between).
//! Around it: [`apiserver`] (Kubernetes, as far as it is asked), [`cluster`] (that one or a real one), [`netns`] (where pods have addresses of
//! their own). The proxy itself: [`process`], [`clock`] (its wall clock), [`hung`] (a thread of it that does not come back),
//! [`usage`] and [`cgroup`] (what it has taken, and what it may take). The rest: [`pattern`] and [`sha1`] (bytes that can be checked), [`ports`], [`markdown`] (pages),
//! [`children`] (processes that do not outlive the test), [`gate`] (waiting without sleeping), [`snapshot`] (the data plane without a process).

#![allow(dead_code, reason = "every test binary compiles all of this and uses its part")]

pub mod apiserver;
pub mod cgroup;
pub mod children;
pub mod clock;
pub mod cluster;
pub mod fastcgi;
pub mod gate;
pub mod h2wire;
pub mod http;
pub mod hung;
pub mod ledger;
pub mod load_balancer;
pub mod markdown;
pub mod netns;
pub mod pattern;
pub mod ports;
pub mod process;
pub mod real_fpm;
pub mod relay;
pub mod scripted_fpm;
pub mod sha1;
pub mod snapshot;
pub mod usage;
