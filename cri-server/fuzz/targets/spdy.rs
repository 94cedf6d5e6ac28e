//! A client of exec or port-forward over SPDY: the first byte says of what, the rest is sent.
#![no_main]

use bulkhead_fuzz::streaming::command::{self, Version};
use bulkhead_fuzz::streaming::{forward, spdy};
use bulkhead_fuzz::{cat, echoes, talk, wanted};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&how, bytes)) = input.split_first() else {
        return;
    };
    let sent = talk(bytes, how & 0x10 != 0, async |io, line| {
        if how & 0x20 != 0 {
            let work = |streams| forward::over_spdy(Box::new(echoes), &line, streams);
            spdy::serve(io, &line, work).await;
        } else {
            let version = if how & 0x40 != 0 {
                Version::V4
            } else {
                Version::V2
            };
            let work =
                |streams| command::over_spdy(wanted(how), Box::new(cat), version, &line, streams);
            spdy::serve(io, &line, work).await;
        }
    });
    frames(&sent);
});

/// Holds the server to its own frames, to the one that was cut off, if any.
fn frames(mut sent: &[u8]) {
    while let Some((&[a, b, c, d, flags, e, f, g], rest)) = sent.split_first_chunk() {
        let (word, length) = (
            u32::from_be_bytes([a, b, c, d]),
            u32::from_be_bytes([0, e, f, g]),
        );
        match word {
            0x8003_0002 | 0x8003_0003 | 0x8003_0006 | 0x8003_0007 | 0x8003_0009 => {
                assert!(length <= 1024, "a control frame of {length} bytes");
            }
            _ => {
                assert!(
                    word >> 31 == 0 && word % 2 == 1,
                    "a frame that begins {word:#x}"
                );
                assert!(
                    length <= 16 << 10 && flags <= 1,
                    "{length} bytes, flags {flags}"
                );
            }
        }
        sent = rest.get(length as usize..).unwrap_or_default();
    }
}
