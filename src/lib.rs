//! Slackwater: an edge proxy for PHP-FPM. The way of a request through the files:
//!
//! A connection is accepted by [`edge::listener`], which hands it to the worker that has the fewest. A PROXY header ([`edge::proxy_protocol`]) and
//! TLS (whose files [`control::tls`] has read) come first where they are asked for; ALPN or [`edge::sniff`], by the first bytes, tells HTTP/1 from
//! HTTP/2, [`edge::connection`] drives hyper under the deadlines that [`edge::io`] and [`edge::stall`] keep (HTTP/2
//! streams each under its own: [`edge::streams`]; what they bring forth in one turn is sent together: [`edge::batch`]), and calls the service.
//!
//! [`http::stack`] is that service and reads from top to bottom: request id, guards, real client, site, path, route
//! ([`http::route`], over [`model::ordered`]), what the route says besides ([`model::rules`], [`http::layers`]), then a plain answer, a file ([`http::files`]) or a script. A script goes to [`http::forward`]: its body is read whole ([`http::body`],
//! beyond memory to [`http::spill`]), then it is dispatched.
//!
//! [`upstream::dispatch`] looks at the current [`upstream::snapshot`] in [`upstream::store`] and takes, in one step, a lease, a slot or a
//! place in the queue ([`upstream::admission`]), as far as its lane has room ([`upstream::lanes`]) and other replicas leave it
//! ([`upstream::shares`]). [`fastcgi::exchange`] speaks with FPM in records ([`fastcgi::record`]), parameters
//! ([`fastcgi::params`]) and heads ([`fastcgi::response`]). A small answer goes back at once; a larger one through [`http::pipe`]. Either is kept in [`http::pieces`].
//! The connection is parked ([`fastcgi::pool`]) or closed; if the client has left, [`fastcgi::reaper`] reads on until FPM has
//! finished. [`http::inflight`] notes the end, and what it tells goes to [`telemetry`]: metrics, the access log, a trace.
//!
//! What the snapshot should be is decided on another thread: [`control::reconcile`] takes each change (of the file, an operator, a probe, or
//! [`control::kubernetes`], whose [`control::slices`] name the pods), [`control::build`] makes the next snapshot, the store swaps it. Which set is
//! active [`control::switch`] says; what of it must survive a restart is in [`control::state`]; the other replicas are asked by
//! [`control::replicas`]. [`control::terminate`] is the way out. What people and machines are told stands in [`control::status`], on the ops port and the admin socket
//! ([`control::api`]) and on the status page, to systemd in [`control::systemd`], and what nobody has asked for in
//! [`control::alarm`]. [`app`] wires both planes together and is
//! the only module that knows both.
#![deny(unsafe_code)]

pub mod app;
pub mod cli;
pub mod control;
pub mod edge;
pub mod error;
pub mod fastcgi;
pub mod http;
pub mod lifecycle;
pub mod model;
pub mod telemetry;
pub mod upstream;
