//! What plugins are told of a pod: the arguments that Kubernetes' runtimes give, and what plugins
//! may ask for as capabilities (CNI conventions, "Dynamic plugin specific fields").

use bulkhead_cri_api::v1 as cri;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::network::subnets::Pair;

/// The least and the most bits per second of a pod, as the kubelet has them.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// What one pod's plugins are told, kept for its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arguments {
    /// CNI_ARGS.
    pub line: String,
    /// What there is for each capability.
    pub capabilities: Map<String, Value>,
}

impl Arguments {
    /// Those of a pod on a node whose networks are `told`. Says what of its configuration cannot be
    /// told to plugins.
    pub fn of(sandbox: &str, pod: &cri::PodSandboxConfig, told: Pair) -> Result<Self, String> {
        let metadata = pod.metadata.clone().unwrap_or_default();
        let mut line = "IgnoreUnknown=1".to_owned();
        for (name, value) in [
            ("K8S_POD_NAMESPACE", metadata.namespace.as_str()),
            ("K8S_POD_NAME", &metadata.name),
            ("K8S_POD_INFRA_CONTAINER_ID", sandbox),
            ("K8S_POD_UID", &metadata.uid),
        ] {
            // These two part the pairs: a name with them could add a pair of its own.
            if value.contains([';', '=']) {
                return Err(format!("{name} {value:?} has a `;` or a `=`"));
            }
            line.push_str(&format!(";{name}={value}"));
        }
        Ok(Self {
            line,
            capabilities: capabilities(pod, told)?,
        })
    }

    /// `runtimeConfig` for a plugin that asks for `wanted`; what the pod does not have is left out.
    pub fn runtime_config(&self, wanted: &[String]) -> Map<String, Value> {
        let known = wanted.iter().filter_map(|name| {
            let value = self.capabilities.get(name)?;
            Some((name.clone(), value.clone()))
        });
        known.collect()
    }
}

fn capabilities(pod: &cri::PodSandboxConfig, told: Pair) -> Result<Map<String, Value>, String> {
    let mut all = Map::new();
    if told != Pair::default() {
        all.insert("ipRanges".to_owned(), told.ranges());
    }
    let ports: Vec<Value> = pod
        .port_mappings
        .iter()
        .filter(|port| port.host_port > 0)
        .map(|port| {
            json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol().as_str_name().to_lowercase(),
                "hostIP": port.host_ip,
            })
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".to_owned(), ports.into());
    }
    if let Some(bandwidth) = bandwidth(pod)? {
        all.insert("bandwidth".to_owned(), bandwidth);
    }
    if let Some(dns) = &pod.dns_config {
        let dns = json!({
            "servers": dns.servers, "searches": dns.searches, "options": dns.options,
        });
        all.insert("dns".to_owned(), dns);
    }
    let parent = pod.linux.as_ref().map(|linux| &linux.cgroup_parent);
    if let Some(parent) = parent.filter(|parent| !parent.is_empty()) {
        all.insert("cgroupPath".to_owned(), parent.clone().into());
    }
    let annotations: Map<String, Value> = pod
        .annotations
        .iter()
        .map(|(name, value)| (name.clone(), value.clone().into()))
        .collect();
    // Under this name containerd and CRI-O have them.
    all.insert(
        "io.kubernetes.cri.pod-annotations".to_owned(),
        annotations.into(),
    );
    Ok(all)
}

/// The limits that the kubelet's annotations ask for, in bits per second.
fn bandwidth(pod: &cri::PodSandboxConfig) -> Result<Option<Value>, String> {
    let mut limits = Map::new();
    for (annotation, rate, burst) in [
        (
            "kubernetes.io/ingress-bandwidth",
            "ingressRate",
            "ingressBurst",
        ),
        (
            "kubernetes.io/egress-bandwidth",
            "egressRate",
            "egressBurst",
        ),
    ] {
        let Some(text) = pod.annotations.get(annotation) else {
            continue;
        };
        let bits = quantity(text).filter(|bits| RATES.contains(bits));
        let bits = bits.ok_or_else(|| {
            format!("the annotation {annotation} is {text:?}; it has to be from 1k to 1P")
        })?;
        limits.insert(rate.to_owned(), bits.into());
        limits.insert(burst.to_owned(), u32::MAX.into());
    }
    Ok((!limits.is_empty()).then(|| limits.into()))
}

/// A quantity as Kubernetes writes it: a number, perhaps with a fraction, and perhaps a suffix. What
/// is less than one is cut off.
fn quantity(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let unit: u64 = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    let whole = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    // So many digits that no number overflows: the largest unit is below 10^16.
    let fraction = fraction.get(..fraction.len().min(20))?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = fraction.parse::<u128>().ok()?.checked_mul(unit.into())? / scale;
    whole.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                namespace: "shop".into(),
                uid: "u-1".into(),
                attempt: 0,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn plugins_are_told_what_kubernetes_tells_them() {
        let arguments = Arguments::of("abc", &pod(), Pair::default()).unwrap();
        assert_eq!(
            arguments.line,
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u-1"
        );
        let mut pod = pod();
        pod.metadata.as_mut().unwrap().name = "web;K8S_POD_NAMESPACE=kube-system".into();
        assert!(Arguments::of("abc", &pod, Pair::default()).is_err());
    }

    #[test]
    fn only_capabilities_that_are_asked_for_are_given() {
        let mut pod = pod();
        pod.port_mappings = vec![
            cri::PortMapping {
                container_port: 80,
                host_port: 8080,
                ..Default::default()
            },
            cri::PortMapping {
                container_port: 81,
                ..Default::default()
            },
        ];
        let arguments = Arguments::of("abc", &pod, Pair::default()).unwrap();
        let given = arguments.runtime_config(&["portMappings".into(), "ipRanges".into()]);
        assert_eq!(
            Value::from(given),
            json!({"portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}]})
        );
        let told = Pair::read("10.7.0.0/24,fd07::/64").unwrap();
        let arguments = Arguments::of("abc", &pod, told).unwrap();
        let given = arguments.runtime_config(&["ipRanges".into()]);
        assert_eq!(
            Value::from(given),
            json!({"ipRanges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd07::/64"}]]})
        );
    }

    #[test]
    fn bandwidths_are_quantities_in_bounds() {
        let mut pod = pod();
        let mut with = |text: &str| {
            let name = "kubernetes.io/egress-bandwidth".to_owned();
            pod.annotations = [(name, text.to_owned())].into();
            bandwidth(&pod)
        };
        let given = with("10M").unwrap().unwrap();
        assert_eq!(given["egressRate"], 10_000_000);
        assert_eq!(given["egressBurst"], u32::MAX);
        assert!(with("1Ki").is_ok());
        assert_eq!(with("1.5M").unwrap().unwrap()["egressRate"], 1_500_000);
        for wrong in [
            "",
            "10",
            "fast",
            "2P",
            "99999999999999999999",
            "1.5.5M",
            "M",
        ] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
    }
}
