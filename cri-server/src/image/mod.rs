//! Images: names, registries, and the store that makes one disk of each image.
//!
//! [`ImageStore`] is the entry. An image is hostile input: its bytes are verified by digest,
//! its layers are laid on top of each other in memory, and nothing in it chooses a
//! path, a device or an option of a virtual machine.

mod archive;
mod auth;
mod bodies;
mod catalogue;
mod digest;
mod disk;
mod error;
mod index;
mod layer;
mod manifest;
mod progress;
mod pull;
mod reference;
mod registry;
mod source;
mod store;
#[cfg(test)]
pub(crate) mod tests;
mod tree;

pub use auth::Credentials;
pub use digest::Digest;
pub use error::ImageError;
pub use progress::{Progress, ProgressSender};
pub use registry::Registries;
pub use store::{Image, ImageDisk, ImageFsUsage, ImageId, ImageStore, ImageUser, Lease};
