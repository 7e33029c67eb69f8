//! Services that end TLS: sessions by cookie, through tunnels that are established already.

mod access;
mod bodies;
mod clear;
mod conformance;
mod floods;
mod frames;
mod headers;
mod life;
mod mirror;
mod peers;
mod qos;
mod refused;
mod reload;
mod requests;
mod scene;
mod sessions;
mod tunnels;
