//! Lays layers on top of each other (OCI image-spec `layer.md`, "Applying Changesets").
//!
//! A layer is hostile. The tree is in memory, so that nothing of it can lead to a file of the host;
//! links are followed from the tree's own root, as a process that has it as its root would, and the
//! last component of a path is never followed. Sizes, counts and depths are bounded by
//! [`TreeLimits`].

mod acl;
mod member;
mod path;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read};
use std::path::PathBuf;

use bulkhead_erofs::{Content, Node, NodeId};

use super::archive::{Archive, ArchiveError, Kind, Member};
use super::bodies::Bodies;
use path::components;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of AUFS's own bookkeeping start so; they are not part of the image.
const AUFS: &[u8] = b".wh..wh.";
/// The tree's own root.
const ROOT: NodeId = 0;

/// How much an image may unpack to.
#[derive(Clone, Copy, Debug)]
pub(super) struct TreeLimits {
    /// Bytes of file contents, all layers together.
    pub bytes: u64,
    /// Members of archives, all layers together.
    pub members: u64,
    /// Directories below each other.
    pub depth: u32,
    /// Bytes of memory that its names, links and attributes may take.
    pub memory: usize,
}

/// Bytes that a file takes in memory beside its names and attributes, all tables of the tree and of
/// the writer together.
const FILE_BYTES: usize = 400;
/// The same for each name and attribute.
const NAME_BYTES: usize = 64;

/// Why a layer was not applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error("{0}")]
    Archive(#[from] ArchiveError),
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    TooLarge(String),
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Where a directory is.
#[derive(Clone, Copy)]
struct Home {
    parent: NodeId,
    /// Directories above it.
    depth: u32,
}

/// A directory tree made of layers.
pub(super) struct Tree {
    files: bulkhead_erofs::Tree,
    homes: HashMap<NodeId, Home>,
    limits: TreeLimits,
    bytes: u64,
    members: u64,
    memory: usize,
    /// What the layer being applied has put into place, by directory and name: whiteouts are
    /// about lower layers only, wherever in the archive they stand.
    fresh: HashSet<(NodeId, Vec<u8>)>,
    /// Directories that have nothing of lower layers any more.
    cleared: HashSet<NodeId>,
}

impl Tree {
    /// An empty tree.
    pub fn new(limits: TreeLimits) -> Tree {
        let root = Home {
            parent: ROOT,
            depth: 0,
        };
        Tree {
            files: bulkhead_erofs::Tree {
                nodes: vec![directory()],
            },
            homes: HashMap::from([(ROOT, root)]),
            limits,
            bytes: 0,
            members: 0,
            memory: 0,
            fresh: HashSet::new(),
            cleared: HashSet::new(),
        }
    }

    /// Applies one layer, given as a tar stream, and returns the reader at its end. What its files
    /// contain goes to `bodies`.
    pub fn apply<R: Read>(&mut self, layer: R, bodies: &mut Bodies) -> Result<R, TreeError> {
        self.fresh.clear();
        self.cleared.clear();
        let mut archive = Archive::new(layer);
        while let Some(member) = archive.next_member()? {
            self.count()?;
            self.place(&member, &mut archive, bodies)?;
        }
        Ok(archive.finish()?)
    }

    /// Counts a file.
    fn count(&mut self) -> Result<(), TreeError> {
        self.members += 1;
        if self.members > self.limits.members {
            return Err(TreeError::TooLarge(format!(
                "it has more than {} files",
                self.limits.members
            )));
        }
        Ok(())
    }

    /// Counts what is kept in memory until the tree is finished.
    fn charge(&mut self, bytes: usize) -> Result<(), TreeError> {
        self.memory = self.memory.saturating_add(bytes);
        if self.memory > self.limits.memory {
            return Err(TreeError::TooLarge(format!(
                "its files, names and attributes take more than {} bytes",
                self.limits.memory
            )));
        }
        Ok(())
    }

    /// What all layers together are.
    pub fn finish(self) -> bulkhead_erofs::Tree {
        self.files
    }

    fn place<R: Read>(
        &mut self,
        member: &Member,
        archive: &mut Archive<R>,
        bodies: &mut Bodies,
    ) -> Result<(), TreeError> {
        let components = components(&member.path)?;
        let Some((&name, parents)) = components.split_last() else {
            return self.place_root(member);
        };
        if name == OPAQUE {
            if let Some(directory) = self.find(parents, &member.path)? {
                self.clear_lower(directory);
            }
            return Ok(());
        }
        if components.iter().any(|name| name.starts_with(AUFS)) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            path::check_name(hidden, &member.path)?;
            if let Some(directory) = self.find(parents, &member.path)? {
                self.remove_lower(directory, hidden);
            }
            return Ok(());
        }
        path::check_name(name, &member.path)?;
        let parent = self.parent(parents, &member.path)?;
        self.create(member, archive, bodies, parent, name)?;
        self.fresh.insert((parent, name.to_vec()));
        Ok(())
    }

    /// The archive's entry for `/` itself says how the root directory looks.
    fn place_root(&mut self, member: &Member) -> Result<(), TreeError> {
        if member.kind != Kind::Directory || member.uid == u32::MAX || member.gid == u32::MAX {
            return Err(TreeError::Refused(
                "its root is not a proper directory".to_string(),
            ));
        }
        self.adorn(ROOT, member)
    }

    /// Removes `name` as lower layers left it; what this layer put there stays.
    fn remove_lower(&mut self, directory: NodeId, name: &[u8]) {
        let Some(child) = self.child(directory, name) else {
            return;
        };
        if self.entries(child).is_some() {
            self.clear_lower(child);
        }
        let emptied = self.entries(child).is_none_or(BTreeMap::is_empty);
        if emptied
            && !self.fresh.contains(&(directory, name.to_vec()))
            && let Some(entries) = self.entries_mut(directory)
        {
            entries.remove(name);
        }
    }

    /// No deeper than the tree, which is bounded. Nothing of lower layers comes back into a directory
    /// that has been cleared of them.
    fn clear_lower(&mut self, directory: NodeId) {
        if !self.cleared.insert(directory) {
            return;
        }
        let names: Vec<Vec<u8>> = self
            .entries(directory)
            .into_iter()
            .flat_map(BTreeMap::keys)
            .cloned()
            .collect();
        for name in names {
            self.remove_lower(directory, &name);
        }
    }

    fn content(&self, node: NodeId) -> Option<&Content> {
        self.files.nodes.get(node).map(|node| &node.content)
    }

    /// What a directory names; `None` of what is none.
    fn entries(&self, node: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match self.content(node) {
            Some(Content::Directory(entries)) => Some(entries),
            _ => None,
        }
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.entries(directory)?.get(name).copied()
    }

    fn entries_mut(&mut self, node: NodeId) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match self.files.nodes.get_mut(node).map(|node| &mut node.content) {
            Some(Content::Directory(entries)) => Some(entries),
            _ => None,
        }
    }

    /// Makes a node and puts it into a directory, in place of what has the name there.
    fn add(&mut self, directory: NodeId, name: &[u8], node: Node) -> Result<NodeId, TreeError> {
        let more = match &node.content {
            Content::Symlink(target) => target.len(),
            _ => 0,
        };
        self.charge(FILE_BYTES + more)?;
        let id = self.files.nodes.len();
        self.files.nodes.push(node);
        self.link(directory, name, id)?;
        Ok(id)
    }

    fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) -> Result<(), TreeError> {
        // Once in its directory and once among what is fresh.
        self.charge(NAME_BYTES + 2 * name.len())?;
        if let Some(entries) = self.entries_mut(directory) {
            entries.insert(name.to_vec(), node);
        }
        Ok(())
    }
}

/// A directory that no member has described.
fn directory() -> Node {
    Node {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nanoseconds: 0,
        xattrs: BTreeMap::new(),
        content: Content::Directory(BTreeMap::new()),
    }
}
