//! The Kubernetes Container Runtime Interface, `runtime.v1`, at the level of Kubernetes 1.36.
//!
//! Messages, field names and numbers are those of the interface; comments are this project's.
//! [`v1::runtime_service_server::RuntimeService`] and [`v1::image_service_server::ImageService`]
//! are what a runtime implements, [`v1::runtime_service_client`] and
//! [`v1::image_service_client`] what its clients use, over any channel.

/// The generated services and messages.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// How pulls come along: a service of this project's own beside the interface's.
pub mod pulls {
    /// The generated service and messages.
    #[allow(missing_docs, clippy::all)]
    pub mod v1 {
        tonic::include_proto!("bulkhead.pulls.v1");
    }
}
