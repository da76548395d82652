//! Who may, by address. Pure.

use std::net::IpAddr;

use crate::{
    error::{Error, Kind},
    model::{peer::is_within, rules::Access},
};

/// `deny` first; then, where `allow` names anybody, all others are refused.
///
/// # Errors
/// 403.
pub fn check(access: &Access, address: IpAddr) -> Result<(), Error> {
    if is_within(address, &access.deny) || !access.allow.is_empty() && !is_within(address, &access.allow) {
        return Err(Error::new(Kind::Forbidden, format!("{} may not", address.to_canonical())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_denied_is_denied_and_who_is_not_allowed_where_anybody_is() {
        let nets = |all: &[&str]| all.iter().map(|net| net.parse().unwrap()).collect();
        let may = |allow: &[&str], deny: &[&str], ip: &str| {
            check(&Access { allow: nets(allow), deny: nets(deny) }, ip.parse().unwrap()).is_ok()
        };
        assert!(may(&[], &[], "192.0.2.1"));
        assert!(may(&["10.0.0.0/8"], &[], "10.1.2.3") && !may(&["10.0.0.0/8"], &[], "192.0.2.1"));
        assert!(may(&["10.0.0.0/8"], &[], "::ffff:10.1.2.3"));
        assert!(!may(&["10.0.0.0/8"], &["10.1.0.0/16"], "10.1.2.3") && may(&["10.0.0.0/8"], &["10.1.0.0/16"], "10.2.2.3"));
        assert!(!may(&[], &["2001:db8::/32"], "2001:db8::1") && may(&[], &["2001:db8::/32"], "2001:db9::1"));
    }
}
