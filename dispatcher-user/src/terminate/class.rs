//! Which class a request belongs to.

use dispatcher_common::session::Session;
use hyper::http::request::Parts;

use super::{Site, connection::Client};
use crate::config::class_id;

/// The class of the session, or else the client's.
pub(super) fn class(client: &Client, site: &Site, _head: &Parts, session: Option<&Session>) -> u16 {
    match session.map_or(0, |session| session.class) {
        0 => class_id(site.service.class_of(client.address.ip())),
        class => class,
    }
}
