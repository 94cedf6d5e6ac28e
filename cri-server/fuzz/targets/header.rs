//! Header blocks of one connection, each after its length in two bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spdy::header::Inflater;

/// The server's modules, by their own files.
#[allow(dead_code, missing_docs)]
#[path = "../../src/streaming/spdy"]
mod spdy {
    mod frame;
    pub mod header;
}

fuzz_target!(|input: &[u8]| {
    let (mut inflater, mut rest) = (Inflater::new(), input);
    while let Some((&length, after)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(length)).min(after.len());
        let (block, after) = after.split_at(length);
        if inflater.read(block).is_err() {
            return;
        }
        rest = after;
    }
});
