//! A client of exec or port-forward over WebSocket: the first byte says of what, the rest is sent
//! after the handshake.
#![no_main]

use bulkhead_fuzz::streaming::command::Version;
use bulkhead_fuzz::streaming::websocket::{self, Codec};
use bulkhead_fuzz::{cat, echoes, talk, wanted};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&how, bytes)) = input.split_first() else {
        return;
    };
    let codec = Codec {
        base64: how & 0x80 != 0,
        version: if how & 0x40 != 0 {
            Version::V5
        } else {
            Version::V1
        },
    };
    let sent = talk(bytes, how & 0x10 != 0, async |io, line| {
        if how & 0x20 != 0 {
            websocket::forward(io, &line, codec, &[1, 80, 443], Box::new(echoes)).await;
        } else {
            websocket::command(io, &line, codec, wanted(how), Box::new(cat)).await;
        }
    });
    // A server's frames are not masked (RFC 6455, 5.1), and the first is whole.
    if let [first, second, ..] = sent[..] {
        assert!(
            matches!(first, 0x81 | 0x82 | 0x88..=0x8a),
            "a frame that begins {first:#x}"
        );
        assert!(second & 0x80 == 0, "a frame that is masked");
    }
});
