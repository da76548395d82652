//! One request: from its head to the end of its answer's body.

pub mod accel;
pub mod actions;
pub mod answer;
pub mod body;
pub mod files;
pub mod forward;
pub mod inflight;
pub mod layers;
pub mod pace;
pub mod pieces;
pub mod pipe;
pub mod preflight;
pub mod route;
pub mod spill;
pub mod stack;
pub mod unread;
pub mod variables;
