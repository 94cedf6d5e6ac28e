//! Requests as drivers make them, and as an attacker does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const DATA: u64 = 0x4000;
const MEMORY: usize = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Address, length, flags and next of a descriptor.
type Descriptor = (u64, u32, u16, u16);

/// Runs the chain that starts at descriptor 0.
fn request(
    memory: &GuestMemoryMmap,
    disk: &mut Disk,
    descriptors: &[Descriptor],
) -> Result<u32, Malformed> {
    for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
        let place = GuestAddress(DESCRIPTORS + 16 * index);
        let word = u64::from(*length) | u64::from(*flags) << 32 | u64::from(*next) << 48;
        memory.write_obj(*address, place).unwrap();
        memory.write_obj(word, GuestAddress(place.0 + 8)).unwrap();
    }
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(DESCRIPTORS))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(AVAILABLE))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(0x3000))
        .unwrap();
    queue.set_ready(true);
    let chain = queue.iter(memory).unwrap().next().unwrap();
    disk.serve(memory, chain)
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// A disk of 16 sectors, each filled with its number, in the middle of a file.
fn disk(read_only: bool) -> (Disk, Arc<File>) {
    let file = Arc::new(tempfile::tempfile().unwrap());
    for sector in 0..16 {
        file.write_all_at(&[sector; 512], 4096 + 512 * u64::from(sector))
            .unwrap();
    }
    file.set_len(64 << 10).unwrap();
    let piece = Piece {
        file: file.clone(),
        offset: 4096,
        length: 8192,
    };
    (Disk::new("a-serial", read_only, vec![piece]), file)
}

/// A request whose header, 512 bytes of data and result are laid out from [`DATA`] on.
fn simple(memory: &GuestMemoryMmap, kind: u32, sector: u64, data: u16) -> [Descriptor; 3] {
    memory.write_obj(kind, GuestAddress(DATA)).unwrap();
    memory.write_obj(sector, GuestAddress(DATA + 8)).unwrap();
    memory
        .write_obj(0xffu8, GuestAddress(DATA + 0x900))
        .unwrap();
    [
        (DATA, 16, NEXT, 1),
        (DATA + 0x100, 512, NEXT | data, 2),
        (DATA + 0x900, 1, WRITE, 0),
    ]
}

fn result(memory: &GuestMemoryMmap) -> u8 {
    memory.read_obj(GuestAddress(DATA + 0x900)).unwrap()
}

#[test]
fn a_sector_is_read_and_written() {
    let (memory, (mut disk, file)) = (memory(), disk(false));
    let read = simple(&memory, 0, 3, WRITE);
    assert_eq!(request(&memory, &mut disk, &read), Ok(513));
    assert_eq!(result(&memory), 0);
    assert_eq!(
        memory
            .read_obj::<[u8; 32]>(GuestAddress(DATA + 0x100))
            .unwrap(),
        [3; 32]
    );
    let write = simple(&memory, 1, 15, 0);
    assert_eq!(request(&memory, &mut disk, &write), Ok(1));
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 4096 + 15 * 512).unwrap();
    assert_eq!((result(&memory), sector), (0, [3; 512]));
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let (memory, (mut disk, _)) = (memory(), disk(false));
    simple(&memory, 0, 5, WRITE);
    let cut = [
        (DATA, 5, NEXT, 1),
        (DATA + 5, 11, NEXT, 2),
        (DATA + 0x100, 100, NEXT | WRITE, 3),
        (DATA + 0x164, 412, NEXT | WRITE, 4),
        (DATA + 0x900, 1, WRITE, 0),
    ];
    assert_eq!(request(&memory, &mut disk, &cut), Ok(513));
    assert_eq!(
        memory
            .read_obj::<[u8; 32]>(GuestAddress(DATA + 0x2e0))
            .unwrap(),
        [5; 32]
    );
    // The result may follow the data in one piece.
    let joined = [(DATA, 16, NEXT, 1), (DATA + 0x700, 513, WRITE, 0)];
    assert_eq!(request(&memory, &mut disk, &joined), Ok(513));
    assert_eq!(result(&memory), 0);
}

#[test]
fn the_serial_is_told() {
    let (memory, (mut disk, _)) = (memory(), disk(true));
    let mut identify = simple(&memory, 8, 0, WRITE);
    identify[1].1 = 20;
    assert_eq!(request(&memory, &mut disk, &identify), Ok(21));
    let name: [u8; 20] = memory.read_obj(GuestAddress(DATA + 0x100)).unwrap();
    assert_eq!(&name, b"a-serial\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn what_cannot_be_done_is_answered_with_an_error() {
    let (memory, (mut disk, file)) = (memory(), disk(true));
    let bytes = || {
        let mut bytes = vec![0; 64 << 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = bytes();
    let mut answer = |kind, sector, data| {
        let chain = simple(&memory, kind, sector, data);
        assert_eq!(request(&memory, &mut disk, &chain), Ok(1));
        result(&memory)
    };
    assert_eq!(answer(0, 16, WRITE), 1, "beyond the end");
    assert_eq!(answer(0, u64::MAX, WRITE), 1, "beyond all numbers");
    assert_eq!(answer(1, 0, 0), 1, "a write to a read-only disk");
    assert_eq!(answer(4, 0, 0), 0, "a flush of one");
    assert_eq!(answer(13, 0, 0), 2, "several ranges to zero");
    assert_eq!(answer(99, 0, 0), 2, "an unknown kind");
    assert!(bytes() == before, "the read-only disk was changed");
}

#[test]
fn a_chain_that_is_no_request_breaks_the_rules() {
    let (memory, (mut disk, _)) = (memory(), disk(false));
    let chain = simple(&memory, 0, 0, WRITE);
    let mut refuse = |change: fn(&mut [Descriptor; 3])| {
        let mut bad = chain;
        change(&mut bad);
        request(&memory, &mut disk, &bad).unwrap_err();
    };
    refuse(|chain| chain[0].1 = 15);
    refuse(|chain| chain[0].2 = 0);
    refuse(|chain| chain[1].0 = MEMORY as u64 - 100);
    refuse(|chain| chain[1].0 = u64::MAX - 100);
    refuse(|chain| chain[2].2 = 0);
    refuse(|chain| (chain[1].1, chain[2].1) = (0, 0));
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![DATA..DATA + 0x1000, any::<u64>()];
    let length = prop_oneof![0u32..600, any::<u32>()];
    (address, length, 0u16..8, 0u16..20)
}

proptest! {
    #[test]
    fn no_chain_makes_it_panic_or_write_beside_the_disk(
        kind in 0u32..16,
        sector in prop_oneof![0u64..20, any::<u64>()],
        chain in proptest::collection::vec(descriptor(), 1..16),
    ) {
        let (memory, (mut disk, file)) = (memory(), disk(false));
        simple(&memory, kind, sector, 0);
        let _ = request(&memory, &mut disk, &chain);
        let mut beside = [1; 4096];
        file.read_exact_at(&mut beside, 0).unwrap();
        prop_assert_eq!(beside, [0; 4096]);
        file.read_exact_at(&mut beside, 12288).unwrap();
        prop_assert_eq!(beside, [0; 4096]);
        prop_assert_eq!(file.metadata().unwrap().len(), 64 << 10);
    }
}
