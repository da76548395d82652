//! What every request passes before it is routed, one concern a file.

pub mod deadline;
pub mod guards;
pub mod real_ip;
pub mod request_id;
