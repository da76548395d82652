//! The proxy before peers that mean harm: each case says where its expected answer comes from, and is judged also by what PHP has received.
//!
//! [`framing`] and [`http2`] are clients by the byte, [`paths`] and [`parameters`] what they would have PHP believe, [`slow`] clients that take their time, [`fpm`] an FPM that lies, [`machine`] a machine that has
//! run out of things; [`pool`] looks whether a real pool of four workers is free after all of that.

#[path = "../support/mod.rs"]
mod support;

mod case;
mod fpm;
mod framing;
mod http2;
mod machine;
mod parameters;
mod paths;
mod pool;
mod privilege;
mod slow;
