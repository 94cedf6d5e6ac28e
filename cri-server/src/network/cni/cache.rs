//! What was asked of plugins, kept until they have taken it back: a server that starts anew, with
//! another configuration perhaps, undoes exactly what was done.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::arguments::Arguments;
use super::list::NetworkList;
use crate::network::NetworkError;
use crate::replace::replace;

/// A pod's attachment to its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network as it was configured.
    pub list: NetworkList,
    /// What plugins were told of the pod.
    pub arguments: Arguments,
    /// Where the pod's namespace is mounted.
    pub netns: PathBuf,
    /// What the last plugin answered to ADD; `Null` until then.
    pub result: Value,
    /// Since when plugins fail to take it back, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing_since: Option<u64>,
    /// Why the pod no longer has it, when that was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// The files of all attachments.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// In a directory that need not exist.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The attachment of a sandbox, if there is one. Blocks.
    pub fn load(&self, sandbox: &str) -> Result<Option<Attachment>, NetworkError> {
        let path = self.path(sandbox);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(NetworkError::state(&path, error)),
        };
        let read = serde_json::from_slice(&text);
        read.map(Some)
            .map_err(|error| NetworkError::state(&path, error.into()))
    }

    /// Writes the attachment of a sandbox down, whole or not at all. Blocks.
    pub fn save(&self, sandbox: &str, attachment: &Attachment) -> Result<(), NetworkError> {
        let path = self.path(sandbox);
        let fail = |error| NetworkError::state(&path, error);
        let mut directory = fs::DirBuilder::new();
        directory
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(fail)?;
        let text = serde_json::to_vec(attachment).map_err(|error| fail(error.into()))?;
        replace(&path, &text).map_err(fail)
    }

    /// Forgets the attachment of a sandbox. Blocks.
    pub fn remove(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.path(sandbox);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(NetworkError::state(&path, error))
            }
            _ => Ok(()),
        }
    }

    /// The sandboxes that have one. Blocks.
    pub fn sandboxes(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let names = entries.flatten().map(|entry| entry.file_name());
        names
            .filter_map(|name| Some(name.to_str()?.strip_suffix(".json")?.to_owned()))
            .collect()
    }

    fn path(&self, sandbox: &str) -> PathBuf {
        self.directory.join(format!("{sandbox}.json"))
    }
}
