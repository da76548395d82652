//! The FastCGI wire: codec, parameters, answers, one exchange on one stream, and the connections kept between them.

pub mod exchange;
pub mod params;
pub mod pool;
pub mod reaper;
pub mod record;
pub mod responder;
pub mod response;
