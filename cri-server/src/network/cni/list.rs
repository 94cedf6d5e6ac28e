//! Network configurations as they lie in a directory (CNI specification, section 1).

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;

/// The versions of the specification that are spoken here, the newest last.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The largest configuration file, in bytes.
const FILE_BYTES: u64 = 1 << 20;
/// The most plugins of a chain.
const PLUGINS: usize = 32;

/// A network: plugins that are called one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkList {
    /// The file it was read from, for messages.
    pub file: PathBuf,
    /// One of [`VERSIONS`].
    pub version: String,
    /// Its name: letters, digits, `_`, `.` and `-`.
    pub name: String,
    /// Whether GC must not be called.
    pub disable_gc: bool,
    /// Whether CHECK must not be called.
    #[serde(default)]
    pub disable_check: bool,
    /// The plugins, one at least.
    pub plugins: Vec<Plugin>,
}

/// One plugin of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// The name of its program, no path.
    pub program: String,
    /// The capabilities it asks for.
    pub capabilities: Vec<String>,
    /// Its configuration as written.
    pub config: Map<String, Value>,
}

impl NetworkList {
    /// The network of a directory: that of the first file in the order of names which ends in
    /// `.conflist`, `.conf` or `.json`. No other file is taken where that one is wrong. Blocks.
    pub fn of_directory(directory: &Path) -> Result<Self, CniError> {
        let fail = |source| CniError::file(directory, source);
        let mut files = Vec::new();
        let entries = match fs::read_dir(directory) {
            // With a template, it is made when the kubelet has told the node's networks.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(CniError::NoNetwork(directory.to_owned()));
            }
            other => other.map_err(fail)?,
        };
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let kind = path.extension().and_then(|extension| extension.to_str());
            if matches!(kind, Some("conflist" | "conf" | "json")) {
                files.push(path);
            }
        }
        files.sort();
        match files.first() {
            Some(path) => Self::of_file(path),
            None => Err(CniError::NoNetwork(directory.to_owned())),
        }
    }

    fn of_file(path: &Path) -> Result<Self, CniError> {
        let fail = |source| CniError::file(path, source);
        let mut text = Vec::new();
        let file = File::open(path).map_err(fail)?;
        file.take(FILE_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(fail)?;
        if text.len() as u64 > FILE_BYTES {
            return Err(fail(ErrorKind::FileTooLarge.into()));
        }
        Self::parse(path, &text).map_err(|why| CniError::Configuration {
            file: path.to_owned(),
            why,
        })
    }

    /// A list, or one plugin outside a list, which is a list of one. Says what is wrong with it.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, String> {
        let whole: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let name = word(&whole, "name")?.ok_or("it has no \"name\"")?;
        if !is_plain(&name) {
            return Err(format!(
                "its name {name:?} has to be letters, digits, `_`, `.` and `-`"
            ));
        }
        let is_list = whole.contains_key("plugins");
        let plugins = match whole.get("plugins") {
            None => vec![Plugin::parse(whole.clone())?],
            Some(Value::Array(plugins)) => plugins
                .iter()
                .map(|plugin| match plugin {
                    Value::Object(plugin) => Plugin::parse(plugin.clone()),
                    _ => Err("an entry of \"plugins\" is no object".to_owned()),
                })
                .collect::<Result<_, _>>()?,
            Some(_) => return Err("\"plugins\" is no list".to_owned()),
        };
        if plugins.is_empty() || plugins.len() > PLUGINS {
            return Err(format!(
                "it has {} plugins; 1 to {PLUGINS} are possible",
                plugins.len()
            ));
        }
        let flag = |name| whole.get(name).and_then(Value::as_bool);
        Ok(Self {
            file: path.to_owned(),
            version: version(&whole)?,
            name,
            disable_gc: is_list && flag("disableGC").unwrap_or_default(),
            disable_check: is_list && flag("disableCheck").unwrap_or_default(),
            plugins,
        })
    }

    /// The sysctls of the network that plugins are configured to set, as `tuning` has them: by the
    /// key `sysctl`, with dots, and `IFNAME` for the pod's interface.
    pub fn sysctls(&self, interface: &str) -> Vec<String> {
        let plugins = self.plugins.iter();
        let wanted = plugins.filter_map(|plugin| plugin.config.get("sysctl")?.as_object());
        let names = wanted.flat_map(|wanted| wanted.keys());
        let names = names.map(|name| name.replace("IFNAME", interface).replace('/', "."));
        names.filter(|name| name.starts_with("net.")).collect()
    }

    /// Whether plugins may be asked for STATUS and GC, which version 1.1.0 brought.
    pub fn has_status(&self) -> bool {
        self.version == "1.1.0"
    }

    /// Whether CHECK may be called, and DEL gets the result of ADD: as from version 0.4.0 on.
    pub fn has_check(&self) -> bool {
        !self.version.starts_with("0.3.")
    }
}

impl Plugin {
    fn parse(config: Map<String, Value>) -> Result<Self, String> {
        let program = word(&config, "type")?.ok_or("a plugin has no \"type\"")?;
        if !is_plain(&program) {
            return Err(format!(
                "the type {program:?} has to be the name of a program, without a path"
            ));
        }
        let capabilities = match config.get("capabilities") {
            Some(Value::Object(wanted)) => wanted
                .iter()
                .filter(|(_, wanted)| wanted.as_bool() == Some(true))
                .map(|(name, _)| name.clone())
                .collect(),
            _ => Vec::new(),
        };
        Ok(Self {
            program,
            capabilities,
            config,
        })
    }
}

/// What the file was written for: `cniVersion`, or the newest we know of `cniVersions`.
fn version(whole: &Map<String, Value>) -> Result<String, String> {
    let one = word(whole, "cniVersion")?;
    let mut offered: Vec<String> = one.into_iter().collect();
    if let Some(Value::Array(more)) = whole.get("cniVersions") {
        offered.extend(more.iter().filter_map(Value::as_str).map(str::to_owned));
    }
    let known = VERSIONS
        .iter()
        .rev()
        .find(|known| offered.iter().any(|offered| offered.as_str() == **known));
    known.map(|known| (*known).to_owned()).ok_or_else(|| {
        format!(
            "it is of version {}; {} to {} are spoken here",
            if offered.is_empty() {
                "0.1.0 (it has no \"cniVersion\")".to_owned()
            } else {
                offered.join(", ")
            },
            VERSIONS[0],
            VERSIONS[VERSIONS.len() - 1],
        )
    })
}

fn word(object: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.get(key) {
        None => Ok(None),
        Some(Value::String(word)) => Ok(Some(word.clone())),
        Some(other) => Err(format!("{key:?} is {other}, no string")),
    }
}

/// What the specification allows for names: it becomes part of paths.
fn is_plain(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NetworkList, String> {
        NetworkList::parse(Path::new("x.conflist"), text.as_bytes())
    }

    #[test]
    fn a_list_is_read_with_its_capabilities() {
        let list = parse(
            r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [
                {"type": "bridge", "mtu": 1400},
                {"type": "portmap", "capabilities": {"portMappings": true, "dns": false}}]}"#,
        )
        .unwrap();
        assert_eq!(list.version, "1.0.0");
        assert_eq!(list.plugins[0].config["mtu"], 1400);
        assert_eq!(list.plugins[1].capabilities, ["portMappings"]);
    }

    #[test]
    fn sysctls_of_plugins_are_named_with_dots_and_the_pods_interface() {
        let list = parse(
            r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"},
                {"type": "tuning", "sysctl": {"net.core.somaxconn": "500",
                    "net/ipv4/conf/IFNAME/arp_filter": "1", "kernel.msgmax": "9"}}]}"#,
        );
        assert_eq!(
            list.unwrap().sysctls("eth0"),
            ["net.core.somaxconn", "net.ipv4.conf.eth0.arp_filter"]
        );
    }

    #[test]
    fn a_plugin_alone_is_a_list_of_one() {
        let list = parse(r#"{"cniVersion": "0.3.1", "name": "net", "type": "ptp"}"#).unwrap();
        assert_eq!(list.plugins.len(), 1);
        assert_eq!(list.plugins[0].program, "ptp");
        assert!(!list.has_check());
    }

    #[test]
    fn the_newest_version_that_is_known_counts() {
        let list = parse(
            r#"{"cniVersion": "0.4.0", "cniVersions": ["1.1.0", "9.0.0"], "name": "n",
                "plugins": [{"type": "x"}]}"#,
        );
        assert_eq!(list.unwrap().version, "1.1.0");
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        for (text, why) in [
            ("{", "EOF"),
            (r#"{"cniVersion": "1.0.0", "type": "x"}"#, "no \"name\""),
            (
                r#"{"cniVersion": "1.0.0", "name": "../x", "type": "x"}"#,
                "../x",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "type": "../bin/sh"}"#,
                "without a path",
            ),
            (
                r#"{"cniVersion": "1.0.0", "name": "n", "plugins": []}"#,
                "0 plugins",
            ),
            (
                r#"{"cniVersion": "2.0.0", "name": "n", "type": "x"}"#,
                "2.0.0",
            ),
            (r#"{"name": "n", "type": "x"}"#, "0.1.0"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_file_by_name_counts() {
        let directory = tempfile::tempdir().unwrap();
        let error = NetworkList::of_directory(directory.path()).unwrap_err();
        assert!(matches!(error, CniError::NoNetwork(_)), "{error}");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("00-notes.txt", "not a network");
        write(
            "20-b.conf",
            r#"{"cniVersion": "1.0.0", "name": "b", "type": "x"}"#,
        );
        assert_eq!(
            NetworkList::of_directory(directory.path()).unwrap().name,
            "b"
        );
        write("10-a.conflist", "{");
        let error = NetworkList::of_directory(directory.path()).unwrap_err();
        assert!(error.to_string().contains("10-a.conflist"), "{error}");
    }
}
