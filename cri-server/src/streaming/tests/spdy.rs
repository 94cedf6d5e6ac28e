//! Exec and attach over SPDY, with clients good and bad.

use proptest::prelude::*;

use super::spdy_client::{Client, Frame, bomb};
use super::*;

const V4: &str = "v4.channel.k8s.io";

#[tokio::test]
async fn streams_go_both_ways_and_the_status_comes_last() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 3));
    let mut client =
        Client::connect(&url, "v9.channel.k8s.io, v4.channel.k8s.io, channel.k8s.io").await;
    let name = client.answer.to_lowercase();
    assert!(
        name.contains("x-stream-protocol-version: v4.channel.k8s.io"),
        "{name}"
    );
    let kinds = ["stderr", "error", "stdin", "stdout"];
    let [stderr, error, stdin, stdout] = client.open_all(kinds).await;
    client.data(stdin, b"one ", false).await;
    client.data(stdin, b"two", true).await;
    let [out, err, status] = client.whole([stdout, stderr, error]).await;
    assert_eq!((&out[..], &err[..]), (&b"one two"[..], &b"begun"[..]));
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    let mut left = Vec::new();
    loop {
        match client.event().await {
            Frame::Closed => break,
            frame => left.push(frame),
        }
    }
    // The end of the stream that was the client's, and the end of all.
    assert_eq!(left.pop(), Some(Frame::Away(0)));
    assert!(
        left.iter()
            .all(|frame| *frame == Frame::Data(stdin, true, vec![])),
        "{left:?}"
    );
}

#[tokio::test]
async fn older_protocols_tell_a_failure_in_words_and_success_by_nothing() {
    let server = Server::start().await;
    for (name, code, said) in [
        ("v3.channel.k8s.io", 0, ""),
        (
            "v2.channel.k8s.io",
            2,
            "command terminated with exit code 2",
        ),
        ("channel.k8s.io", 1, "command terminated with exit code 1"),
    ] {
        let url = server.exec(ALL, move |session| cat(session, code));
        let mut client = Client::connect(&url, name).await;
        let kinds = ["error", "stdin", "stdout", "stderr"];
        let [error, stdin, _, _] = client.open_all(kinds).await;
        client.data(stdin, b"", true).await;
        let [status] = client.whole([error]).await;
        assert_eq!(String::from_utf8(status).unwrap(), said);
    }
}

#[tokio::test]
async fn a_terminals_sizes_arrive_and_streams_nobody_wants_are_ended() {
    let server = Server::start().await;
    let wanted = Wanted {
        stdout: true,
        tty: true,
        ..Wanted::default()
    };
    let url = server.exec(wanted, async |mut session: Session| {
        let size = session.sizes.recv().await.unwrap();
        let text = format!("{}x{}", size.columns, size.rows);
        session
            .stdout
            .unwrap()
            .write_all(text.as_bytes())
            .await
            .unwrap();
        Outcome::Exit(0)
    });
    let mut client = Client::connect(&url, V4).await;
    let [stderr, _, stdout, resize] = client
        .open_all(["stderr", "error", "stdout", "resize"])
        .await;
    client.data(resize, b"{\"Width\":132,", false).await;
    client.data(resize, b"\"Height\":50}\n", false).await;
    let [err, out] = client.whole([stderr, stdout]).await;
    assert_eq!((&out[..], &err[..]), (&b"132x50"[..], &b""[..]));
}

#[tokio::test]
async fn much_goes_both_ways_whole() {
    let server = Server::start().await;
    let wanted = Wanted {
        stderr: false,
        ..ALL
    };
    let url = server.exec(wanted, |session| cat(session, 0));
    let client = Client::connect(&url, V4).await;
    let much: Vec<u8> = (0..4_000_000_u32).map(|n| (n ^ (n >> 7)) as u8).collect();
    let mut client = client;
    let [_, stdin, stdout] = client.open_all(["error", "stdin", "stdout"]).await;
    // As Go's clients do: in frames of any size, whatever the window.
    let (socket, sent) = (client.io.get_ref(), much.clone());
    let other = socket.as_fd().try_clone_to_owned().unwrap();
    let writer = tokio::task::spawn_blocking(move || {
        use std::io::Write;
        let mut socket = std::net::TcpStream::from(other);
        for (place, chunk) in sent.chunks(300_000).enumerate() {
            let last = (place + 1) * 300_000 >= sent.len();
            let [_, a, b, c] = (chunk.len() as u32).to_be_bytes();
            let head = [&stdin.to_be_bytes()[..], &[u8::from(last), a, b, c]].concat();
            // The descriptor is shared with a socket that does not block.
            for part in [&head[..], chunk] {
                let mut left = part;
                while !left.is_empty() {
                    match socket.write(left) {
                        Ok(wrote) => left = &left[wrote..],
                        Err(_) => std::thread::yield_now(),
                    }
                }
            }
        }
    });
    let [out] = client.whole([stdout]).await;
    writer.await.unwrap();
    assert!(out == much, "{} bytes came", out.len());
}

#[tokio::test]
async fn a_client_that_keeps_to_windows_is_given_more() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let mut client = Client::connect(&url, V4).await;
    let [_, stdin, stdout, _] = client
        .open_all(["error", "stdin", "stdout", "stderr"])
        .await;
    let (mut one, mut all, mut sent, mut came) = (64 << 10, 64 << 10, 0, 0);
    let much = 1 << 20;
    while came < much {
        let now = one.min(all).min(much - sent).min(10_000);
        if now > 0 {
            sent += now;
            client.data(stdin, &vec![7; now], sent == much).await;
            (one, all) = (one - now, all - now);
            continue;
        }
        match client.frame().await {
            Frame::Window(0, more) => all += more as usize,
            Frame::Window(id, more) if id == stdin => one += more as usize,
            Frame::Data(id, _, bytes) if id == stdout => came += bytes.len(),
            Frame::Closed => panic!("closed at {came}"),
            _ => {}
        }
    }
    assert_eq!(came, much);
}

#[tokio::test]
async fn the_clients_windows_are_kept_to_once_it_has_told_of_them() {
    let server = Server::start().await;
    let wanted = Wanted {
        stdout: true,
        ..Wanted::default()
    };
    let url = server.exec(wanted, async |session: Session| {
        session.stdout.unwrap().write_all(&[1; 5000]).await.unwrap();
        Outcome::Exit(0)
    });
    let mut client = Client::connect(&url, V4).await;
    let initial = [0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 3, 232];
    client.control(4, 0, &initial).await;
    let [_, stdout] = client.open_all(["error", "stdout"]).await;
    assert_eq!(
        client.event().await,
        Frame::Data(stdout, false, vec![1; 1000])
    );
    // Whatever came before the answer to a ping was sent before more was allowed.
    client.control(6, 0, &[0, 0, 0, 9]).await;
    assert_eq!(client.event().await, Frame::Ping(9));
    client.window(stdout, 3000).await;
    assert_eq!(
        client.event().await,
        Frame::Data(stdout, false, vec![1; 3000])
    );
    client.window(stdout, 5000).await;
    assert_eq!(
        client.event().await,
        Frame::Data(stdout, false, vec![1; 1000])
    );
}

#[tokio::test]
async fn a_client_that_never_reads_stops_the_process_and_loses_nothing() {
    let server = Server::start().await;
    let wanted = Wanted {
        stdout: true,
        ..Wanted::default()
    };
    let (told, mut written) = tokio::sync::watch::channel(0_usize);
    const MUCH: usize = 64 << 20;
    let url = server.exec(wanted, async move |session: Session| {
        let mut stdout = session.stdout.unwrap();
        let chunk = [5; 1 << 16];
        while *told.borrow() < MUCH {
            stdout.write_all(&chunk).await.unwrap();
            told.send_modify(|written| *written += chunk.len());
        }
        Outcome::Exit(0)
    });
    let mut client = Client::connect(&url, V4).await;
    let [_, stdout] = client.open_all(["error", "stdout"]).await;
    // It stands still, where the sockets' buffers are full.
    while tokio::time::timeout(5 * SHORT, written.changed())
        .await
        .is_ok()
    {}
    assert!(
        *written.borrow() < MUCH,
        "{} were written",
        *written.borrow()
    );
    let mut came = 0;
    loop {
        match client.event().await {
            Frame::Data(id, fin, bytes) if id == stdout => {
                came += bytes.len();
                if fin {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(came, MUCH);
}

#[tokio::test]
async fn a_client_that_vanishes_is_noticed_even_when_its_input_is_not_read() {
    let server = Server::start().await;
    let (told, gone) = oneshot::channel();
    let url = server.exec(ALL, stubborn(told));
    let mut client = Client::connect(&url, V4).await;
    let [_, stdin, _, _] = client
        .open_all(["error", "stdin", "stdout", "stderr"])
        .await;
    for _ in 0..5 {
        client.data(stdin, &[0; 50_000], false).await;
    }
    drop(client);
    let input = soon(gone).await.unwrap().unwrap_err();
    assert_eq!(input.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn what_is_idle_too_long_is_ended() {
    let server = Server::with(Limits {
        idle: SHORT,
        ..short()
    })
    .await;
    let (told, gone) = oneshot::channel();
    let url = server.exec(ALL, stubborn(told));
    let mut client = Client::connect(&url, V4).await;
    client
        .open_all(["error", "stdin", "stdout", "stderr"])
        .await;
    soon(gone).await.unwrap().unwrap_err();
    while client.frame().await != Frame::Closed {}
}

#[tokio::test]
async fn what_goes_on_after_the_client_is_dropped_in_the_end() {
    let server = Server::with(Limits {
        grace: SHORT,
        ..short()
    })
    .await;
    let (held, dropped) = oneshot::channel::<()>();
    let url = server.exec(ALL, async move |_: Session| {
        let _held = held;
        std::future::pending().await
    });
    let mut client = Client::connect(&url, V4).await;
    client
        .open_all(["error", "stdin", "stdout", "stderr"])
        .await;
    drop(client);
    soon(dropped).await.unwrap_err();
}

#[tokio::test]
async fn streams_that_do_not_come_in_time_end_the_connection_and_run_nothing() {
    let server = Server::with(Limits {
        creation: SHORT,
        ..short()
    })
    .await;
    let (ran, never) = oneshot::channel::<()>();
    let url = server.exec(ALL, async move |_: Session| {
        let _ = ran.send(());
        Outcome::Exit(0)
    });
    let mut client = Client::connect(&url, V4).await;
    client
        .open_all(["error", "stdin", "stdout", "stdout", "what"])
        .await;
    while client.frame().await != Frame::Closed {}
    soon(never).await.unwrap_err();
}

#[tokio::test]
async fn streams_beyond_those_needed_are_refused() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let mut client = Client::connect(&url, V4).await;
    let [_, stdin, stdout, _] = client
        .open_all(["error", "stdin", "stdout", "stderr"])
        .await;
    client.data(stdin, b"x", false).await;
    loop {
        match client.event().await {
            Frame::Data(id, ..) if id == stdout => break,
            Frame::Data(..) => {}
            other => panic!("{other:?}"),
        }
    }
    let [more] = client.open_all(["stdout"]).await;
    assert_eq!(client.event().await, Frame::Reset(more, 3));
    // The others go on.
    client.data(stdin, b"y", true).await;
    let [out] = client.whole([stdout]).await;
    assert_eq!(out, b"y");
}

#[tokio::test]
async fn a_client_that_does_not_keep_to_the_protocol_is_sent_away() {
    let server = Server::start().await;
    let stream_zero = [0x80, 3, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let zero_data = [0, 0, 0, 0, 0, 0, 0, 0];
    let version_two = [0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1];
    let too_long = [0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff];
    let cut_off = [0x80, 3, 0, 1, 0, 0, 0, 2, 0, 0];
    let settings = [0x80, 3, 0, 4, 0, 0, 0, 4, 0, 0, 0, 9];
    let no_window = [0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let overflow = [
        0x80, 3, 0, 9, 0, 0, 0, 8, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff,
    ];
    let no_zlib = [
        0x80, 3, 0, 1, 0, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4,
    ];
    let nothing = [0x80, 3, 0, 8, 0, 0, 0, 4, 0, 0, 0, 1];
    for bytes in [
        &stream_zero[..],
        &zero_data,
        &version_two,
        &too_long,
        &cut_off,
        &settings,
        &no_window,
        &overflow,
        &no_zlib,
        &nothing,
    ] {
        let (told, gone) = oneshot::channel();
        let url = server.exec(ALL, stubborn(told));
        let mut client = Client::connect(&url, V4).await;
        client
            .open_all(["error", "stdin", "stdout", "stderr"])
            .await;
        client.raw(bytes).await;
        assert_eq!(client.event().await, Frame::Away(1), "{bytes:?}");
        soon(gone).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn a_header_bomb_is_not_inflated() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let mut client = Client::connect(&url, V4).await;
    let bomb = bomb();
    assert!(bomb.len() < 16 << 10, "{}", bomb.len());
    client.syn(1, &bomb).await;
    assert_eq!(client.event().await, Frame::Away(1));
}

#[tokio::test]
async fn numbers_of_streams_must_be_odd_and_rise() {
    let server = Server::start().await;
    for second in [1, 4] {
        let url = server.exec(ALL, |session| cat(session, 0));
        let mut client = Client::connect(&url, V4).await;
        let mut deflater = crate::streaming::spdy::test::Deflater::new().unwrap();
        for id in [1, second] {
            let block = deflater.write(&[("streamtype", "error")]).unwrap();
            client.syn(id, &block).await;
        }
        assert_eq!(client.event().await, Frame::Away(1));
    }
}

#[tokio::test]
async fn streams_that_never_were_are_reset_and_unknown_frames_ignored() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 0));
    let mut client = Client::connect(&url, V4).await;
    client.control(10, 0, b"credentials").await;
    client.control(6, 0, &[0, 0, 0, 2]).await;
    client.data(77, b"x", false).await;
    assert_eq!(client.event().await, Frame::Reset(77, 2));
    client.control(3, 0, &[0, 0, 0, 99, 0, 0, 0, 5]).await;
    client.control(6, 0, &[0, 0, 0, 1]).await;
    assert_eq!(client.event().await, Frame::Ping(1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever comes, the connection ends when the client has gone, and nothing panics.
    #[test]
    fn no_bytes_are_too_wrong(
        frames in proptest::collection::vec(
            (0_u16..12, any::<u8>(), proptest::collection::vec(any::<u8>(), 0..64)), 0..24),
        noise in proptest::collection::vec(any::<u8>(), 0..256),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::start().await;
            let (told, gone) = oneshot::channel();
            let url = server.exec(ALL, stubborn(told));
            let mut client = Client::connect(&url, V4).await;
            client.open_all(["error", "stdin", "stdout", "stderr"]).await;
            let mut bytes = Vec::new();
            for (kind, flags, payload) in frames {
                let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
                bytes.extend([0x80, 3, 0, kind as u8, flags, a, b, c]);
                bytes.extend(payload);
            }
            bytes.extend(noise);
            // The server may have closed already.
            let _ = client.io.write_all(&bytes).await;
            drop(client);
            soon(gone).await.unwrap().unwrap_err();
        });
    }
}
