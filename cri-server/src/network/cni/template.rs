//! A network that is written when the kubelet has told which addresses are this node's.
//!
//! The template is a network configuration list in which these strings, as whole values, stand for
//! what is known only then:
//!
//! - `"$podCIDR"`: the first network, as a string;
//! - `"$podCIDRRanges"`: every network as host-local's `ranges` has it, `[[{"subnet": …}], …]`;
//! - `"$routes"`: a default route for each family, `[{"dst": …}, …]`.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use serde_json::{Value, json};

use super::CniError;
use super::list::NetworkList;
use crate::network::subnets::Pair;
use crate::replace::replace;

/// The file that is written.
const FILE: &str = "10-bulkhead.conflist";
/// The largest template, in bytes.
const BYTES: u64 = 1 << 20;

/// Writes the network into `directory`, unless it has one that can be used; whether it did. Blocks.
pub fn write(template: &Path, directory: &Path, networks: Pair) -> Result<bool, CniError> {
    if NetworkList::of_directory(directory).is_ok() {
        return Ok(false);
    }
    let fail = |source| CniError::file(template, source);
    if fs::metadata(template).map_err(fail)?.len() > BYTES {
        return Err(fail(std::io::ErrorKind::FileTooLarge.into()));
    }
    let text = fs::read(template).map_err(fail)?;
    let wrong = |why: String| CniError::Configuration {
        file: template.to_owned(),
        why,
    };
    let mut list: Value =
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    fill(&mut list, networks);
    let text = list.to_string();
    let path = directory.join(FILE);
    NetworkList::parse(&path, text.as_bytes()).map_err(wrong)?;
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o755).create(directory);
    made.and_then(|()| replace(&path, text.as_bytes()))
        .map_err(|source| CniError::file(&path, source))?;
    Ok(true)
}

fn fill(value: &mut Value, networks: Pair) {
    let four = networks.v4.map(|four| (four.to_string(), "0.0.0.0/0"));
    let six = networks.v6.map(|six| (six.to_string(), "::/0"));
    let all = || four.iter().chain(&six);
    match value {
        Value::Object(object) => object.values_mut().for_each(|value| fill(value, networks)),
        Value::Array(values) => values.iter_mut().for_each(|value| fill(value, networks)),
        Value::String(text) => match text.as_str() {
            "$podCIDR" => *value = all().next().map(|(cidr, _)| cidr.clone()).into(),
            "$podCIDRRanges" => *value = networks.ranges(),
            "$routes" => *value = all().map(|(_, to)| json!({"dst": to})).collect(),
            _ => {}
        },
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks() -> Pair {
        Pair {
            v4: Some("10.7.0.0/24".parse().unwrap()),
            v6: Some("fd07::/64".parse().unwrap()),
        }
    }

    #[test]
    fn what_the_kubelet_tells_is_filled_in_and_nothing_else() {
        let mut list = json!({"name": "n", "ipam": {"subnet": "$podCIDR",
            "ranges": "$podCIDRRanges", "routes": "$routes"}, "text": "no $podCIDR"});
        fill(&mut list, networks());
        let expected = json!({"name": "n", "ipam": {"subnet": "10.7.0.0/24",
            "ranges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd07::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}, "text": "no $podCIDR"});
        assert_eq!(list, expected);
    }

    #[test]
    fn a_network_that_can_be_used_is_kept() {
        let home = tempfile::tempdir().unwrap();
        let (template, directory) = (home.path().join("template"), home.path().join("net.d"));
        let write = || write(&template, &directory, networks());
        assert!(matches!(write(), Err(CniError::File { .. })));
        fs::write(&template, r#"{"cniVersion": "1.0.0", "name": "n"}"#).unwrap();
        assert!(write().unwrap_err().to_string().contains("template"));
        let text = r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [
            {"type": "ptp", "ipam": {"type": "host-local", "ranges": "$podCIDRRanges"}}]}"#;
        fs::write(&template, text).unwrap();
        assert!(write().unwrap());
        let list = NetworkList::of_directory(&directory).unwrap();
        let ranges = &list.plugins[0].config["ipam"]["ranges"];
        assert_eq!(ranges[1][0]["subnet"], "fd07::/64");
        assert!(!write().unwrap());
    }
}
