//! Layers of an image: archives as they come, or members that the input describes, so that their
//! headers have the right sums.
#![no_main]

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;

use libfuzzer_sys::fuzz_target;

/// The server's modules, by their own files.
#[allow(dead_code, missing_docs, unreachable_pub)]
#[path = "../../src/image"]
mod image {
    use std::fs;
    use std::path::Path;

    mod archive;
    mod bodies;
    mod tree;

    const LIMITS: tree::TreeLimits = tree::TreeLimits {
        bytes: 1 << 20,
        members: 200,
        depth: 16,
        memory: 1 << 20,
    };

    /// Makes a disk of layers, up to the first that is refused.
    pub fn make(layers: impl Iterator<Item = Vec<u8>>, disk: &Path) {
        let mut bodies = bodies::Bodies::create(disk).expect("a disk");
        let mut tree = tree::Tree::new(LIMITS);
        for layer in layers {
            if tree.apply(layer.as_slice(), &mut bodies).is_err() {
                break;
            }
        }
        // What would be refused here has passed all checks of members.
        let length = bodies
            .finish(&tree.finish(), [7; 16])
            .expect("a whole disk");
        assert_eq!(fs::metadata(disk).expect("a disk").len(), length);
    }
}

/// Layers of an image, at most.
const LAYERS: usize = 4;
/// What a member may be: files, links, devices, directories, pipes; PAX and GNU extended headers.
const KINDS: &[u8] = b"0125346xLKg7";

fuzz_target!(|input: &[u8]| {
    let disk = place();
    let mut rest = input;
    let layers = std::iter::from_fn(|| {
        let (&[as_it_is, high, low], after) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes([high, low])).min(after.len());
        let (layer, after) = after.split_at(length);
        rest = after;
        Some(match as_it_is {
            0 => layer.to_vec(),
            _ => described(layer),
        })
    });
    image::make(layers.take(LAYERS), &disk);
    fs::remove_file(&disk).expect("a disk");
});

/// In memory, where there is room for it.
fn place() -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let directory = if shared.is_dir() {
        shared
    } else {
        env::temp_dir()
    };
    directory.join(format!("layers-{}", process::id()))
}

/// Members one after another: kind, mode, lengths of name, link and contents, then these.
fn described(mut input: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    while let Some((&[kind, mode, name, link, contents], rest)) = input.split_first_chunk() {
        let mut rest = rest;
        let mut take = |length: u8| {
            let (taken, after) = rest.split_at(usize::from(length).min(rest.len()));
            rest = after;
            taken
        };
        let (name, link, contents) = (take(name % 101), take(link % 101), take(contents));
        input = rest;
        // Now and then a body that does not fit behind its inode.
        let contents = contents.repeat(if mode & 0x80 == 0 { 1 } else { 40 });
        let kind = KINDS[usize::from(kind) % KINDS.len()];
        archive.extend(header(kind, mode, name, link, contents.len()));
        archive.extend(&contents);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// A header of the older kind, which all readers know.
fn header(kind: u8, mode: u8, name: &[u8], link: &[u8], size: usize) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name);
    put(100, format!("{:07o}", u16::from(mode) << 4).as_bytes());
    put(108, b"0001750\0000001750\0");
    put(124, format!("{size:011o}").as_bytes());
    put(136, b"07346545000\0        ");
    put(156, &[kind]);
    put(157, link);
    put(257, b"ustar\x0000");
    put(329, b"0000001\0000000003\0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
