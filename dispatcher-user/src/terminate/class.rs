//! Which class a request belongs to.

use dispatcher_common::session::Session;
use hyper::http::request::Parts;

use super::{Site, connection::Client};

/// The class of the session, or else the default one.
pub(super) fn class(_client: &Client, _site: &Site, _head: &Parts, session: Option<&Session>) -> u16 {
    session.map_or(0, |session| session.class)
}
