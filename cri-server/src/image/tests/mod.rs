//! Tests of the image store against layers made on the spot and a real registry.

pub(crate) mod bed;
mod faults;
mod pulls;
mod removal;
mod store;
mod trees;
