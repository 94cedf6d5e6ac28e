//! What a pod is, on disk: one file per pod, replaced as a whole.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bulkhead_agent_api::Secret;
use bulkhead_cri_api::v1 as cri;
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use super::state::{ContainerState, PodState};
use super::undo::UndoList;
use super::{SandboxError, host};
use crate::container::file::Copied;
use crate::replace::replace;

/// Version of [`Record`]; no other has been written yet, and none is read.
pub const VERSION: u32 = 1;
/// The largest record that is read, in bytes.
const LARGEST: u64 = 64 << 20;
const NAME: &str = "record.json";

/// One pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// The pod's id: 64 hexadecimal digits.
    pub id: String,
    /// The boot of the host in which the pod was made.
    pub boot: String,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// As the kubelet gave it, its limits as they were updated.
    #[serde(with = "message")]
    pub config: cri::PodSandboxConfig,
    /// The handler asked for.
    pub runtime_handler: String,
    /// The hostname in effect.
    pub hostname: String,
    /// What the guest's streams show.
    #[serde(with = "secret")]
    pub secret: Secret,
    /// What its VM was booted with, in MiB; absent before that, and in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Where it is in its life.
    pub state: PodState,
    /// What has to be undone.
    pub steps: UndoList,
    /// Disks of images in the VM, by image id.
    pub disks: BTreeMap<String, Disk>,
    /// By id.
    pub containers: BTreeMap<String, Container>,
}

/// A disk in a window of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// By which the guest knows it.
    pub serial: String,
    /// The virtio-mmio window.
    pub window: u8,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Nanoseconds since 1970.
    pub created_at: i64,
    /// As the kubelet gave it, its limits as they were updated.
    #[serde(with = "message")]
    pub config: cri::ContainerConfig,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// Digest of the image in its repository, or its id.
    pub image_ref: String,
    /// What its process is, for further processes in it.
    pub process: Process,
    /// The signal that asks it to stop.
    pub stop_signal: u32,
    /// Ids in effect; none before the guest has made it.
    pub user: Option<User>,
    /// Where its log goes; dropped if nowhere.
    pub log_path: Option<PathBuf>,
    /// Files of the host that it may write.
    #[serde(default)]
    pub copies: Vec<Copied>,
    /// Where it is in its life.
    pub state: ContainerState,
}

/// Ids of a container's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Record {
    /// A pod of which nothing exists yet.
    pub fn new(
        id: String,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
        boot: &str,
    ) -> Result<Self, SandboxError> {
        let secret = host::random()?;
        let hostname = match config.hostname.as_str() {
            "" => id.chars().take(12).collect(),
            name => name.to_owned(),
        };
        Ok(Self {
            version: VERSION,
            id,
            boot: boot.to_owned(),
            created_at: host::now(),
            config,
            runtime_handler,
            hostname,
            secret: Secret(secret),
            memory_mib: None,
            state: PodState::Starting,
            steps: UndoList::default(),
            disks: BTreeMap::new(),
            containers: BTreeMap::new(),
        })
    }
}

impl Container {
    /// Whether it was reported to anybody.
    pub fn is_known(&self) -> bool {
        self.state != ContainerState::Creating
    }

    /// One to test with.
    #[cfg(test)]
    pub fn sample(id: &str, config: cri::ContainerConfig, state: ContainerState) -> Self {
        Self {
            id: id.to_owned(),
            created_at: 1,
            config,
            image_id: "sha256:1".into(),
            image_ref: "r@sha256:2".into(),
            process: Process::default(),
            stop_signal: 15,
            user: None,
            log_path: Some("/log/0.log".into()),
            copies: Vec::new(),
            state,
        }
    }
}

/// Why a record cannot be kept or read.
#[derive(Debug, thiserror::Error)]
#[error("The pod's record {path} cannot be {what}: {source}", path = path.display())]
pub struct RecordError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried.
    pub what: &'static str,
    /// Why it failed.
    pub source: std::io::Error,
}

impl RecordError {
    fn new(path: &Path, what: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self {
            path: path.to_owned(),
            what,
            source: source.into(),
        }
    }
}

/// The directory of all pods' records.
#[derive(Debug, Clone)]
pub struct Records(PathBuf);

impl Records {
    /// Below `root`; made when the first pod is.
    pub fn under(root: &Path) -> Self {
        Self(root.join("sandboxes"))
    }

    /// The directory that belongs to one pod.
    pub fn directory(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    /// Writes the record durably.
    pub async fn save(&self, record: &Record) -> Result<(), RecordError> {
        let directory = self.directory(&record.id);
        let path = directory.join(NAME);
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(|error| RecordError::new(&path, "encoded", error))?;
        blocking(&directory, "written", move |directory| {
            private().recursive(true).create(directory)?;
            replace(&directory.join(NAME), &bytes)
        })
        .await
    }

    /// Removes everything of the pod; succeeds if there is nothing.
    pub async fn remove(&self, id: &str) -> Result<(), RecordError> {
        blocking(&self.directory(id), "removed", |directory| {
            // The record goes first: without it the rest is known to be rubbish.
            gone(std::fs::remove_file(directory.join(NAME)))?;
            gone(std::fs::remove_dir_all(directory))
        })
        .await
    }

    /// Every pod's record. One that cannot be read is an entry of its own, and its directory is
    /// left alone; a directory without a record is what a removal left, and is cleared away.
    pub async fn load(&self) -> Result<Vec<Result<Record, RecordError>>, RecordError> {
        blocking(&self.0, "listed", |root| {
            let entries = match std::fs::read_dir(root) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                other => other?,
            };
            let mut records = Vec::new();
            for entry in entries {
                let directory = entry?.path();
                let path = directory.join(NAME);
                if path.exists() {
                    records.push(read(&path));
                } else {
                    gone(std::fs::remove_dir_all(&directory))?;
                }
            }
            Ok(records)
        })
        .await
    }
}

fn read(path: &Path) -> Result<Record, RecordError> {
    let failed = |error| RecordError::new(path, "read", error);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(LARGEST).read_to_end(&mut bytes).map_err(failed)?;
    let record: Record = serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?;
    if record.version != VERSION {
        let reason = format!("it has version {}, not {VERSION}", record.version);
        return Err(failed(std::io::Error::other(reason)));
    }
    Ok(record)
}

fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

/// What is not there is as good as removed.
fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

async fn blocking<T: Send + 'static>(
    path: &Path,
    what: &'static str,
    work: impl FnOnce(&Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, RecordError> {
    let place = path.to_owned();
    let done = tokio::task::spawn_blocking(move || work(&place)).await;
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(RecordError::new(path, what, error)),
        Err(error) => Err(RecordError::new(path, what, error)),
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|digit| {
            digit
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        })
        .collect();
    let digits = digits?;
    let pairs = digits.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    Some(
        pairs
            .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
            .collect(),
    )
}

/// A protobuf message as hexadecimal digits: no field the interface knows is lost.
mod message {
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<M: prost::Message, S: Serializer>(
        message: &M,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::hexadecimal(&message.encode_to_vec()))
    }

    pub fn deserialize<'de, M: prost::Message + Default, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<M, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = super::bytes(&text).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
        M::decode(bytes.as_slice()).map_err(D::Error::custom)
    }
}

mod secret {
    use bulkhead_agent_api::Secret;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::hexadecimal(&secret.0))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = super::bytes(&text).and_then(|bytes| bytes.try_into().ok());
        bytes
            .map(Secret)
            .ok_or_else(|| D::Error::custom("not 32 bytes in hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        let config = cri::PodSandboxConfig {
            hostname: "web-0".into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Default::default()
        };
        let container = Container::sample(
            "c",
            cri::ContainerConfig {
                log_path: "0.log".into(),
                ..Default::default()
            },
            ContainerState::Running { started_at: 2 },
        );
        Record {
            version: VERSION,
            id: id.into(),
            boot: "b".into(),
            created_at: 1,
            config,
            runtime_handler: String::new(),
            hostname: "web-0".into(),
            secret: Secret([9; 32]),
            memory_mib: Some(256),
            state: PodState::NotReady {
                reason: "test".into(),
            },
            steps: UndoList::default(),
            disks: BTreeMap::new(),
            containers: [("c".to_owned(), container)].into(),
        }
    }

    #[tokio::test]
    async fn a_record_comes_back_as_it_was_written() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::under(root.path());
        assert!(records.load().await.unwrap().is_empty());
        records.save(&record("p")).await.unwrap();
        let loaded = records.load().await.unwrap().remove(0).unwrap();
        assert_eq!(loaded, record("p"));
        records.remove("p").await.unwrap();
        records.remove("p").await.unwrap();
        assert!(records.load().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn an_unreadable_record_is_reported_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::under(root.path());
        records.save(&record("good")).await.unwrap();
        let bad = records.directory("bad");
        std::fs::create_dir(&bad).unwrap();
        std::fs::write(bad.join(NAME), "{").unwrap();
        let loaded = records.load().await.unwrap();
        assert_eq!(loaded.iter().filter(|record| record.is_ok()).count(), 1);
        assert_eq!(loaded.len(), 2);
        assert!(bad.join(NAME).exists());
    }

    #[tokio::test]
    async fn a_record_of_another_age_is_not_misread() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::under(root.path());
        let mut future = record("p");
        future.version = VERSION + 1;
        records.save(&future).await.unwrap();
        let refusal = records.load().await.unwrap().remove(0).unwrap_err();
        assert!(refusal.to_string().contains("version 2"), "{refusal}");
    }

    #[tokio::test]
    async fn what_a_removal_left_is_cleared_away() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::under(root.path());
        records.save(&record("p")).await.unwrap();
        std::fs::write(records.directory("p").join("scratch"), "x").unwrap();
        std::fs::remove_file(records.directory("p").join(NAME)).unwrap();
        assert!(records.load().await.unwrap().is_empty());
        assert!(!records.directory("p").exists());
    }
}
