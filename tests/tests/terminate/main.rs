//! Services that end TLS: sessions by cookie, through tunnels that are established already.

mod clear;
mod reload;
mod requests;
mod scene;
mod sessions;
mod tunnels;
