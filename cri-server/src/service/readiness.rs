//! What `Status` says of the runtime.

use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_cri_api::v1 as cri;

use crate::sandbox::{HANDLER, Sandboxes};

/// Whether pods can be run, and what they can have; `verbose` adds the configuration.
pub async fn of(sandboxes: &Sandboxes, verbose: bool) -> cri::StatusResponse {
    let host = Arc::clone(sandboxes.host());
    let [runtime, network] = super::obstacles(&host).await;
    let conditions = vec![
        condition("RuntimeReady", "CannotRunPods", &runtime),
        condition("NetworkReady", "NetworkNotReady", &network),
    ];
    let handler = |name: &str| cri::RuntimeHandler {
        name: name.to_owned(),
        features: Some(cri::RuntimeHandlerFeatures {
            user_namespaces: true,
            ..Default::default()
        }),
    };
    let mut info = HashMap::new();
    if verbose {
        let config = &host.config;
        let details = serde_json::json!({
            "root": config.root,
            "run": config.run,
            "network": host.network.kind(),
            "vm": {
                "memoryMiB": config.vm.memory_mib,
                "vcpus": config.vm.vcpus,
                "scratchMiB": config.vm.scratch_mib,
            },
            "pods": sandboxes.list().len(),
        });
        info.insert("config".to_owned(), details.to_string());
    }
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        info,
        runtime_handlers: vec![handler(""), handler(HANDLER)],
        features: Some(cri::RuntimeFeatures::default()),
    }
}

fn condition(kind: &str, reason: &str, holds: &Result<(), String>) -> cri::RuntimeCondition {
    let (reason, message) = match holds {
        Ok(()) => (String::new(), String::new()),
        Err(why) => (reason.to_owned(), why.clone()),
    };
    cri::RuntimeCondition {
        r#type: kind.to_owned(),
        status: holds.is_ok(),
        reason,
        message,
    }
}
