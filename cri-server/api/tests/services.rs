//! The services offer exactly the calls of the interface.

const RUNTIME: &[&str] = &[
    "Version",
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "PodSandboxStatus",
    "ListPodSandbox",
    "StreamPodSandboxes",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "ListContainers",
    "StreamContainers",
    "ContainerStatus",
    "UpdateContainerResources",
    "UpdatePodSandboxResources",
    "ReopenContainerLog",
    "ExecSync",
    "Exec",
    "Attach",
    "PortForward",
    "ContainerStats",
    "ListContainerStats",
    "StreamContainerStats",
    "PodSandboxStats",
    "ListPodSandboxStats",
    "StreamPodSandboxStats",
    "UpdateRuntimeConfig",
    "Status",
    "CheckpointContainer",
    "GetContainerEvents",
    "ListMetricDescriptors",
    "ListPodSandboxMetrics",
    "StreamPodSandboxMetrics",
    "RuntimeConfig",
];
const IMAGE: &[&str] = &[
    "ListImages",
    "StreamImages",
    "ImageStatus",
    "PullImage",
    "RemoveImage",
    "ImageFsInfo",
];

#[test]
fn services_list_every_call_by_name() {
    let proto = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
    let set = protox::compile(["runtime.proto", "image.proto"], [proto]).unwrap();
    let calls = |service: &str| -> Vec<String> {
        let found = set
            .file
            .iter()
            .flat_map(|file| &file.service)
            .find(|candidate| candidate.name() == service)
            .unwrap();
        let mut names: Vec<_> = found.method.iter().map(|m| m.name().to_owned()).collect();
        names.sort();
        names
    };
    let sorted = |names: &[&str]| -> Vec<String> {
        let mut names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(calls("RuntimeService"), sorted(RUNTIME));
    assert_eq!(calls("ImageService"), sorted(IMAGE));
}

#[test]
fn lists_are_streamed_by_the_server_alone() {
    let proto = concat!(env!("CARGO_MANIFEST_DIR"), "/proto");
    let set = protox::compile(["runtime.proto", "image.proto"], [proto]).unwrap();
    for method in set
        .file
        .iter()
        .flat_map(|file| &file.service)
        .flat_map(|service| &service.method)
    {
        let streamed = method.name().starts_with("Stream") || method.name() == "GetContainerEvents";
        assert_eq!(method.server_streaming(), streamed, "{}", method.name());
        assert!(!method.client_streaming(), "{}", method.name());
    }
}

#[test]
fn requests_travel_to_the_paths_of_the_interface() {
    use bulkhead_cri_api::v1::{image_service_server, runtime_service_server};
    assert_eq!(
        runtime_service_server::SERVICE_NAME,
        "runtime.v1.RuntimeService"
    );
    assert_eq!(
        image_service_server::SERVICE_NAME,
        "runtime.v1.ImageService"
    );
}
