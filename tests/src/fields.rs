//! `guest-agent/FIELDS.md` says what becomes of each field that a container or a pod can be asked
//! with; this holds it to the interfaces, the tests and the messages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Fields of config.md and config-linux.md of the OCI runtime specification 1.3, in its order.
const OCI: [(&str, &str); 6] = [
    ("the specification itself", "hostname domainname hooks"),
    (
        "process",
        "terminal consoleSize cwd env args commandLine user capabilities rlimits apparmorProfile \
         oomScoreAdj scheduler selinuxLabel noNewPrivileges ioPriority execCPUAffinity",
    ),
    ("root", "path readonly"),
    (
        "mounts",
        "destination source type options uidMappings gidMappings",
    ),
    (
        "linux",
        "namespaces uidMappings gidMappings timeOffsets devices cgroupsPath resources sysctl \
         seccomp rootfsPropagation maskedPaths readonlyPaths mountLabel intelRdt personality \
         netDevices memoryPolicy",
    ),
    (
        "linux.resources",
        "devices memory cpu pids blockIO hugepageLimits network rdma unified",
    ),
];

/// Messages of the CRI that have a table.
const CRI: [&str; 7] = [
    "ContainerConfig",
    "Mount",
    "LinuxContainerConfig",
    "LinuxContainerResources",
    "LinuxContainerSecurityContext",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
];

/// A line of a table.
#[derive(Debug)]
struct Row {
    field: String,
    state: String,
    shown_by: String,
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The tables by their headings.
fn tables() -> BTreeMap<String, Vec<Row>> {
    let text = fs::read_to_string(workspace().join("guest-agent/FIELDS.md")).unwrap();
    let mut tables: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    let mut heading = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            name.clone_into(&mut heading);
        } else if line.starts_with("| `") {
            let cells: Vec<_> = line.trim_matches('|').splitn(3, '|').collect();
            let [field, state, shown_by] = cells.as_slice() else {
                panic!("not three cells: {line}");
            };
            tables.entry(heading.clone()).or_default().push(Row {
                field: field.trim().trim_matches('`').to_owned(),
                state: state.trim().to_owned(),
                shown_by: shown_by.trim().to_owned(),
            });
        }
    }
    tables
}

/// The fields of each message in the interface's own files.
fn messages() -> BTreeMap<String, Vec<String>> {
    let mut messages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in fs::read_dir(workspace().join("cri-server/api/proto")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let mut message = String::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("message ") {
                name.trim_end_matches([' ', '{', '}'])
                    .clone_into(&mut message);
            }
            let code = line.split("//").next().unwrap_or_default();
            if let Some((left, _)) = code.split_once(" = ") {
                let name = left.split_whitespace().last().unwrap_or_default();
                messages
                    .entry(message.clone())
                    .or_default()
                    .push(name.to_owned());
            }
        }
    }
    messages
}

/// Every Rust file of the workspace below `folders`, in one.
fn sources(folders: &[&str]) -> String {
    fn read(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                all.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut all = String::new();
    for folder in folders {
        read(&workspace().join(folder), &mut all);
    }
    all
}

#[test]
fn every_field_has_a_row_and_every_row_a_field() {
    let (tables, messages) = (tables(), messages());
    let cri = CRI.map(|name| (name, messages[name].clone()));
    let oci = OCI.map(|(name, fields)| {
        let fields = fields.split_whitespace().map(str::to_owned);
        (name, fields.collect::<Vec<_>>())
    });
    let expected: BTreeMap<_, BTreeSet<_>> = cri
        .into_iter()
        .chain(oci)
        .map(|(name, fields)| (name.to_owned(), fields.into_iter().collect()))
        .collect();
    let rows = |rows: &Vec<Row>| rows.iter().map(|row| row.field.clone()).collect();
    let found: BTreeMap<String, BTreeSet<String>> = tables
        .iter()
        .map(|(name, table)| (name.clone(), rows(table)))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn what_works_has_tests_that_are_there() {
    let tests = sources(&["guest-agent/src", "cri-server/src", "tests/tests"]);
    for row in tables().into_values().flatten() {
        let named: Vec<_> = row.shown_by.split('`').skip(1).step_by(2).collect();
        if row.state == "works" {
            assert!(!named.is_empty(), "{row:?}");
            for name in named {
                assert!(tests.contains(&format!("fn {name}(")), "{row:?}: {name}");
            }
        } else {
            assert_eq!(row.state, "refused", "{row:?}");
        }
    }
}

#[test]
fn what_is_refused_is_said_in_these_words() {
    let sources = sources(&["guest-agent/src", "cri-server/src"]);
    for row in tables().into_values().flatten() {
        if row.state == "refused" {
            let words = row.shown_by.split('"').nth(1);
            assert!(
                words.is_some_and(|words| sources.contains(words)),
                "{row:?}"
            );
        }
    }
}
