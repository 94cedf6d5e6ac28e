//! Port-forward over SPDY.

use super::spdy_client::{Client, Frame};
use super::*;

const PROTOCOL: &str = "portforward.k8s.io";

async fn pair(client: &mut Client, request: &str, port: &str) -> (u32, u32) {
    let mut one = async |kind| {
        let headers = [("streamtype", kind), ("port", port), ("requestid", request)];
        client.open(&headers).await
    };
    (one("error").await, one("data").await)
}

#[tokio::test]
async fn many_connections_go_at_once_each_with_its_own_ends() {
    let server = Server::start().await;
    let mut client = Client::connect(&server.forward(echoes), PROTOCOL).await;
    let mut data = [0; 8];
    let mut errors = [0; 8];
    for place in 0..8 {
        let port = (80 + place).to_string();
        (errors[place], data[place]) = pair(&mut client, &place.to_string(), &port).await;
        client.data(errors[place], b"", true).await;
    }
    for (place, id) in data.iter().enumerate().rev() {
        client
            .data(*id, &vec![place as u8; 1000 * place], true)
            .await;
    }
    let all = client.whole(data).await;
    for (place, bytes) in all.iter().enumerate() {
        let mut wanted = format!("port {}\n", 80 + place).into_bytes();
        wanted.extend(vec![place as u8; 1000 * place]);
        assert!(*bytes == wanted, "{place}: {} bytes", bytes.len());
    }
}

#[tokio::test]
async fn a_port_that_cannot_be_reached_is_told_and_the_others_go_on() {
    let server = Server::start().await;
    let mut client = Client::connect(&server.forward(echoes), PROTOCOL).await;
    let (error, data) = pair(&mut client, "0", "1").await;
    let [told, nothing] = client.whole([error, data]).await;
    assert_eq!(
        (&told[..], &nothing[..]),
        (&b"connection refused"[..], &b""[..])
    );
    let (error, _) = pair(&mut client, "1", "99999").await;
    let [told] = client.whole([error]).await;
    assert!(String::from_utf8(told).unwrap().contains("port"));
    let (error, data) = pair(&mut client, "2", "7").await;
    client.data(data, b"x", true).await;
    let [bytes, none] = client.whole([data, error]).await;
    assert_eq!((&bytes[..], &none[..]), (&b"port 7\nx"[..], &b""[..]));
}

#[tokio::test]
async fn streams_without_a_request_are_paired_by_their_order() {
    let server = Server::start().await;
    let mut client = Client::connect(&server.forward(echoes), PROTOCOL).await;
    client.open(&[("streamtype", "error"), ("port", "8")]).await;
    let data = client.open(&[("streamtype", "data"), ("port", "8")]).await;
    client.data(data, b"", true).await;
    assert_eq!(client.whole([data]).await, [b"port 8\n".to_vec()]);
}

#[tokio::test]
async fn half_a_pair_is_ended_when_the_other_does_not_come() {
    let server = Server::with(Limits {
        creation: 5 * SHORT,
        ..short()
    })
    .await;
    let mut client = Client::connect(&server.forward(echoes), PROTOCOL).await;
    let error = client
        .open(&[("streamtype", "error"), ("requestid", "1")])
        .await;
    assert_eq!(client.whole([error]).await, [b"".to_vec()]);
}

#[tokio::test]
async fn a_stream_that_is_reset_is_told_from_one_that_has_ended() {
    let server = Server::start().await;
    let (told, reset) = oneshot::channel();
    let url = server.forward(async |mut forwards: mpsc::Receiver<Forward>| {
        let mut forward = forwards.recv().await.unwrap();
        let mut bytes = Vec::new();
        let result = forward.data.read_to_end(&mut bytes).await;
        let _ = told.send((bytes, result));
        let write = forward.data.write_all(b"x").await;
        assert!(write.is_err(), "{write:?}");
        std::future::pending().await
    });
    let mut client = Client::connect(&url, PROTOCOL).await;
    let (_, data) = pair(&mut client, "0", "80").await;
    client.data(data, b"part", false).await;
    let payload = [data.to_be_bytes(), 5_u32.to_be_bytes()].concat();
    client.control(3, 0, &payload).await;
    let (bytes, result) = soon(reset).await.unwrap();
    assert_eq!(
        result.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    // What came right before a reset may be lost with it.
    assert!(b"part".starts_with(&bytes), "{bytes:?}");
}

#[tokio::test]
async fn streams_are_bounded_in_number() {
    let server = Server::with(Limits {
        streams: 4,
        ..short()
    })
    .await;
    let mut client = Client::connect(&server.forward(echoes), PROTOCOL).await;
    pair(&mut client, "0", "80").await;
    pair(&mut client, "1", "80").await;
    let [more] = client.open_all(["error"]).await;
    loop {
        match client.event().await {
            Frame::Reset(id, why) => break assert_eq!((id, why), (more, 3)),
            Frame::Data(..) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_forward_is_dropped_with_its_client() {
    let server = Server::start().await;
    let (held, dropped) = oneshot::channel::<()>();
    let url = server.forward(async move |_| {
        let _held = held;
        std::future::pending().await
    });
    let mut client = Client::connect(&url, PROTOCOL).await;
    pair(&mut client, "0", "80").await;
    drop(client);
    soon(dropped).await.unwrap_err();
}
