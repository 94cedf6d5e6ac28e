//! Exec, attach and port-forward over WebSocket.

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::*;

type Socket = WebSocketStream<TcpStream>;

async fn connect(url: &str, protocol: &str) -> Socket {
    let host = url
        .strip_prefix("http://")
        .unwrap()
        .split('/')
        .next()
        .unwrap();
    let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
    let headers = request.headers_mut();
    headers.insert("Sec-WebSocket-Protocol", protocol.parse().unwrap());
    let io = TcpStream::connect(host).await.unwrap();
    let connecting = tokio_tungstenite::client_async(request, io);
    let (socket, answer) = soon(connecting).await.unwrap();
    assert!(protocol.contains(answer.headers()["Sec-WebSocket-Protocol"].to_str().unwrap()));
    socket
}

async fn send(socket: &mut Socket, bytes: &[u8]) {
    socket.send(Message::binary(bytes.to_vec())).await.unwrap();
}

/// All that comes, by channel, and the code of the close.
async fn whole(socket: &mut Socket) -> (Vec<Vec<u8>>, Option<CloseCode>) {
    let mut channels = vec![Vec::new(); 6];
    loop {
        match soon(socket.next()).await {
            Some(Ok(Message::Binary(bytes))) => {
                channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
            }
            Some(Ok(Message::Close(close))) => return (channels, close.map(|close| close.code)),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            other => panic!("{other:?} after {channels:?}"),
        }
    }
}

#[tokio::test]
async fn version_5_ends_the_input_and_closes_in_peace() {
    let server = Server::start().await;
    let url = server.exec(ALL, |session| cat(session, 3));
    let mut socket = connect(&url, "v5.channel.k8s.io").await;
    let first = soon(socket.next()).await.unwrap().unwrap();
    assert_eq!(first, Message::binary(vec![1]));
    send(&mut socket, b"\0one ").await;
    // As clients written in Python do.
    socket.send(Message::text("\0two")).await.unwrap();
    send(&mut socket, b"").await;
    send(&mut socket, b"\x09nobody").await;
    send(&mut socket, &[255, 0]).await;
    send(&mut socket, b"\0late").await;
    let (channels, code) = whole(&mut socket).await;
    assert_eq!(
        (&channels[1][..], &channels[2][..]),
        (&b"one two"[..], &b"begun"[..])
    );
    let status: serde_json::Value = serde_json::from_slice(&channels[3]).unwrap();
    assert_eq!(status["reason"], "NonZeroExitCode");
    assert_eq!(code, Some(CloseCode::Normal));
    assert!(soon(socket.next()).await.is_none());
}

#[tokio::test]
async fn base64_is_spoken_as_text_with_a_digit() {
    let server = Server::start().await;
    let wanted = Wanted {
        stderr: false,
        ..ALL
    };
    let url = server.exec(wanted, async |session: Session| {
        let (mut stdin, mut stdout) = (session.stdin.unwrap(), session.stdout.unwrap());
        let mut bytes = [0; 3];
        stdin.read_exact(&mut bytes).await.unwrap();
        stdout.write_all(&bytes).await.unwrap();
        Outcome::Exit(0)
    });
    let mut socket = connect(&url, "v4.base64.channel.k8s.io").await;
    socket.send(Message::text("0AP9B")).await.unwrap();
    let mut texts = Vec::new();
    while let Some(Ok(Message::Text(text))) = soon(socket.next()).await {
        texts.push(text.to_string());
    }
    assert_eq!(texts[..2], ["1", "1AP9B"]);
    assert!(texts[2].starts_with('3') && texts.len() == 3, "{texts:?}");
}

#[tokio::test]
async fn sizes_and_pings_are_answered_beside_the_streams() {
    let server = Server::start().await;
    let wanted = Wanted {
        stdout: true,
        tty: true,
        ..Wanted::default()
    };
    let url = server.exec(wanted, async |mut session: Session| {
        let size = session.sizes.recv().await.unwrap();
        assert_eq!((size.columns, size.rows), (10, 20));
        Outcome::Exit(0)
    });
    let mut socket = connect(&url, "v4.channel.k8s.io").await;
    socket.send(Message::Ping("there?".into())).await.unwrap();
    assert_eq!(
        soon(socket.next()).await.unwrap().unwrap(),
        Message::binary(vec![1])
    );
    assert_eq!(
        soon(socket.next()).await.unwrap().unwrap(),
        Message::Pong("there?".into())
    );
    send(&mut socket, b"\x04{\"Width\":10,\"Height\":20}").await;
    let (channels, code) = whole(&mut socket).await;
    assert_eq!(code, Some(CloseCode::Normal));
    assert!(String::from_utf8_lossy(&channels[3]).contains("Success"));
}

#[tokio::test]
async fn what_is_too_large_or_wrong_closes_with_its_code() {
    let server = Server::start().await;
    for (protocol, bytes, code) in [
        ("v5.channel.k8s.io", vec![0; (1 << 20) + 1], CloseCode::Size),
        (
            "base64.channel.k8s.io",
            b"0???".to_vec(),
            CloseCode::Invalid,
        ),
    ] {
        let (told, gone) = oneshot::channel();
        let url = server.exec(ALL, stubborn(told));
        let mut socket = connect(&url, protocol).await;
        let _ = socket.send(Message::binary(bytes)).await;
        let closed = loop {
            match soon(socket.next()).await {
                Some(Ok(Message::Close(close))) => break close.unwrap().code,
                Some(Ok(_)) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(closed, code);
        soon(gone).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn frames_that_are_none_end_the_exec() {
    let server = Server::start().await;
    for bytes in [
        // Not masked; an opcode that is none; a length of 2^63; a control frame in parts.
        &[0x82, 1, 0][..],
        &[0x83, 0x80, 0, 0, 0, 0],
        &[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0x09, 0x80, 0, 0, 0, 0],
    ] {
        let (told, gone) = oneshot::channel();
        let url = server.exec(ALL, stubborn(told));
        let mut socket = connect(&url, "v5.channel.k8s.io").await;
        socket.get_mut().write_all(bytes).await.unwrap();
        soon(gone).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn a_client_that_closes_or_vanishes_ends_the_exec() {
    let server = Server::start().await;
    for close in [true, false] {
        let (told, gone) = oneshot::channel();
        let url = server.exec(ALL, stubborn(told));
        let mut socket = connect(&url, "v5.channel.k8s.io").await;
        send(&mut socket, &[0; 200_000]).await;
        if close {
            drop(socket.close(None).await);
        }
        drop(socket);
        soon(gone).await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn a_client_that_never_reads_stops_the_process() {
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
    let mut socket = connect(&url, "v5.channel.k8s.io").await;
    while tokio::time::timeout(5 * SHORT, written.changed())
        .await
        .is_ok()
    {}
    assert!(
        *written.borrow() < MUCH,
        "{} were written",
        *written.borrow()
    );
    let (channels, _) = whole(&mut socket).await;
    assert_eq!(channels[1].len(), MUCH);
}

#[tokio::test]
async fn ports_have_two_channels_each_that_begin_with_the_port() {
    let server = Server::start().await;
    let url = server.forward(echoes) + "?port=1&port=258,99";
    let mut socket = connect(&url, "v4.channel.k8s.io").await;
    send(&mut socket, b"\x02hello").await;
    let mut channels = vec![Vec::new(); 6];
    while channels[2].len() < 16 || channels[1].len() < 20 || channels[4].len() < 10 {
        match soon(socket.next()).await {
            Some(Ok(Message::Binary(bytes))) => {
                channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
            }
            other => panic!("{other:?} after {channels:?}"),
        }
    }
    let wanted: [&[u8]; 6] = [
        b"\x01\0",
        b"\x01\0connection refused",
        b"\x02\x01port 258\nhello",
        b"\x02\x01",
        b"\x63\0port 99\n",
        b"\x63\0",
    ];
    assert_eq!(channels, wanted);
}
