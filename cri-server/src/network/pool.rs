//! Which pod has which address, kept on disk.
//!
//! An address in use is a symbolic link `<root>/network/leases/<address>` whose target is the
//! sandbox id: one system call claims the address and says for whom, so a kill at any instant
//! leaves either the whole lease or none.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use super::error::NetworkError;
use super::prefix::Ipv4Prefix;

/// The leases of one server.
#[derive(Debug)]
pub struct Pool {
    directory: PathBuf,
    leases: BTreeMap<Ipv4Addr, String>,
    /// Where the search starts: addresses are reused as late as possible, since neighbours
    /// remember the hardware address of the former holder.
    next: u32,
}

impl Pool {
    /// Reads the leases under `root`. Entries that are no lease are left alone.
    pub fn open(root: &Path) -> Result<Self, NetworkError> {
        let directory = root.join("network/leases");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|source| NetworkError::state(&directory, source))?;
        let mut leases = BTreeMap::new();
        let entries =
            fs::read_dir(&directory).map_err(|source| NetworkError::state(&directory, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| NetworkError::state(&directory, source))?;
            let address = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let sandbox = fs::read_link(entry.path()).ok();
            if let (Some(address), Some(sandbox)) = (address, sandbox) {
                leases.insert(address, sandbox.to_string_lossy().into_owned());
            }
        }
        Ok(Self {
            directory,
            leases,
            next: 0,
        })
    }

    /// The sandbox's address in `prefix`; the same one when it has one already.
    pub fn claim(&mut self, prefix: Ipv4Prefix, sandbox: &str) -> Result<Ipv4Addr, NetworkError> {
        let held = self
            .leases
            .iter()
            .find(|(address, holder)| holder.as_str() == sandbox && prefix.contains(**address));
        if let Some((address, _)) = held {
            return Ok(*address);
        }
        let count = prefix.pod_count();
        for step in 0..count {
            let index = self.next.wrapping_add(step) % count;
            let Some(address) = prefix.pod(index) else {
                continue;
            };
            if self.leases.contains_key(&address) {
                continue;
            }
            let path = self.path(address);
            match symlink(sandbox, &path) {
                Ok(()) => {}
                // Not in the map, yet there: somebody's file. It is not ours to hand out.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(source) => return Err(NetworkError::state(&path, source)),
            }
            self.leases.insert(address, sandbox.to_owned());
            self.next = index.wrapping_add(1);
            return Ok(address);
        }
        Err(NetworkError::Exhausted {
            pool: prefix,
            leases: self.directory.clone(),
        })
    }

    /// The sandbox's address, if it has one.
    pub fn of(&self, sandbox: &str) -> Option<Ipv4Addr> {
        let mut leases = self.leases.iter();
        let held = leases.find(|(_, holder)| holder.as_str() == sandbox);
        held.map(|(address, _)| *address)
    }

    /// Whether nobody but the sandbox holds an address.
    pub fn is_only(&self, sandbox: &str) -> bool {
        self.leases.values().all(|holder| holder == sandbox)
    }

    /// Gives back what the sandbox holds; nothing when it holds nothing.
    pub fn release(&mut self, sandbox: &str) -> Result<(), NetworkError> {
        let held: Vec<Ipv4Addr> = self
            .leases
            .iter()
            .filter(|(_, holder)| holder.as_str() == sandbox)
            .map(|(address, _)| *address)
            .collect();
        for address in held {
            let path = self.path(address);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(NetworkError::state(&path, source)),
            }
            self.leases.remove(&address);
        }
        Ok(())
    }

    /// Whether no sandbox holds an address.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    fn path(&self, address: Ipv4Addr) -> PathBuf {
        self.directory.join(address.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Ipv4Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn a_sandbox_keeps_its_address_across_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let net = prefix("10.9.0.0/24");
        let mut pool = Pool::open(root.path()).unwrap();
        let first = pool.claim(net, "a").unwrap();
        let second = pool.claim(net, "b").unwrap();
        assert_ne!(first, second);
        drop(pool);
        let mut pool = Pool::open(root.path()).unwrap();
        assert_eq!(pool.claim(net, "b").unwrap(), second);
        assert_ne!(pool.claim(net, "c").unwrap(), first);
    }

    #[test]
    fn a_full_pool_says_so_and_serves_again_after_a_release() {
        let root = tempfile::tempdir().unwrap();
        let net = prefix("10.9.0.0/30");
        let mut pool = Pool::open(root.path()).unwrap();
        let only = pool.claim(net, "a").unwrap();
        let refusal = pool.claim(net, "b").unwrap_err();
        assert!(matches!(refusal, NetworkError::Exhausted { .. }));
        assert!(refusal.to_string().contains("10.9.0.0/30"));
        pool.release("a").unwrap();
        pool.release("a").unwrap();
        assert!(pool.is_empty());
        assert_eq!(pool.claim(net, "b").unwrap(), only);
    }

    #[test]
    fn a_released_address_is_not_handed_out_next() {
        let root = tempfile::tempdir().unwrap();
        let net = prefix("10.9.0.0/24");
        let mut pool = Pool::open(root.path()).unwrap();
        let first = pool.claim(net, "a").unwrap();
        pool.release("a").unwrap();
        assert_ne!(pool.claim(net, "b").unwrap(), first);
    }

    #[test]
    fn foreign_files_are_neither_leases_nor_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let net = prefix("10.9.0.0/30");
        let mut pool = Pool::open(root.path()).unwrap();
        let foreign = root.path().join("network/leases/10.9.0.2");
        fs::write(&foreign, "x").unwrap();
        assert!(pool.claim(net, "a").is_err());
        assert_eq!(fs::read(&foreign).unwrap(), b"x");
    }
}
