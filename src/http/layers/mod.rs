//! What every request passes before it is routed, one concern a file.

pub mod access;
mod apr1;
pub mod auth;
pub mod compress;
pub mod cors;
pub mod deadline;
pub mod guards;
pub mod headers;
pub mod limits;
pub mod maintenance;
pub mod real_ip;
pub mod request_id;
mod through;
