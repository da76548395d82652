//! Plain values that every layer may use. No behaviour beyond parsing, display and look-up in itself.

pub mod address;
pub mod clock;
pub mod log_text;
pub mod names;
pub mod ordered;
pub mod peer;
pub mod rules;
pub mod settings;
pub mod site;
pub mod text;
pub mod tls;
pub mod upstream;

pub use address::Address;
pub use peer::Peer;
pub use settings::Settings;
pub use site::{Route, Site, SiteTable};
