//! Terminals: a client's side of them.

use bulkhead_agent_api::v1::{self as api, Stdio};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::Code;

use crate::guest::Guest;
use crate::{create, process, remove, signal, spec, start, wait};

/// Reads, acknowledging nothing, until `wanted` has come; what came before it too.
async fn until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut all = Vec::new();
    while !String::from_utf8_lossy(&all).contains(wanted) {
        let mut buffer = [0; 4096];
        let length = stream.read(&mut buffer).await.unwrap();
        assert_ne!(length, 0, "{:?}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&buffer[..length]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

async fn resize(guest: &mut Guest, exec: &str, columns: u32, rows: u32) -> Result<(), Code> {
    let request = api::ResizeRequest {
        container_id: "c1".into(),
        exec_id: exec.into(),
        columns,
        rows,
    };
    let resized = guest.agent.resize(request).await;
    resized.map(drop).map_err(|status| status.code())
}

#[tokio::test]
async fn a_terminal_has_a_size_takes_another_and_is_typed_the_end() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let script = "stty size; read line; echo got $line; stty size; cat; exit 3";
    let mut program = spec(&["sh", "-c", script]);
    program["process"]["terminal"] = true.into();
    program["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    let request = create(&guest, "c1", &program);
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let (_, mut output) = guest.stream("c1", "", Stdio::Stdout, 0).await;
    let (_, mut input) = guest.stream("c1", "", Stdio::Stdin, 0).await;
    until(&mut output, "30 100\r\n").await;
    resize(&mut guest, "", 120, 40).await.unwrap();
    input.write_all(b"a line\n").await.unwrap();
    let seen = until(&mut output, "40 120\r\n").await;
    assert_eq!(seen, "a line\r\ngot a line\r\n40 120\r\n");
    // A line that is begun reaches the program as well.
    input.write_all(b"more").await.unwrap();
    input.shutdown().await.unwrap();
    until(&mut output, "moremore").await;
    drop(output);
    let _ = guest.output("c1", "", Stdio::Stdout).await;
    assert_eq!(wait(&mut guest, "c1", "").await.code, 3);
    remove(&mut guest, "c1").await;
    guest.end().await;
}

#[tokio::test]
async fn an_execs_terminal_is_its_own_and_interrupts_it() {
    let mut guest = Guest::boot().await;
    guest.prepare().await;
    let request = create(&guest, "c1", &spec(&["sleep", "1000"]));
    guest.agent.create_container(request).await.unwrap();
    start(&mut guest, "c1").await.unwrap();
    let script =
        "trap 'echo caught; exit 4' INT; readlink /proc/self/fd/2; while :; do sleep 1; done";
    let mut program = process(&["sh", "-c", script]);
    program["terminal"] = true.into();
    let request = api::ExecRequest {
        operation_id: guest.operation(),
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process: serde_json::to_vec(&program).unwrap(),
        stdin: false,
    };
    guest.agent.exec(request).await.unwrap();
    let (_, mut output) = guest.stream("c1", "e1", Stdio::Stdout, 0).await;
    let (_, mut input) = guest.stream("c1", "e1", Stdio::Stdin, 0).await;
    until(&mut output, "/dev/pts/0\r\n").await;
    input.write_all(b"\x03").await.unwrap();
    until(&mut output, "caught\r\n").await;
    drop(output);
    let _ = guest.output("c1", "e1", Stdio::Stdout).await;
    assert_eq!(wait(&mut guest, "c1", "e1").await.code, 4);
    // Neither the container nor the terminal of one that is over has a size to change; nor is there
    // a standard error.
    let refused = resize(&mut guest, "", 80, 25).await;
    assert_eq!(refused, Err(Code::FailedPrecondition));
    let refused = resize(&mut guest, "e1", 80, 70_000).await;
    assert_eq!(refused, Err(Code::InvalidArgument));
    let request = api::OpenStreamRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        stdio: Stdio::Stderr.into(),
        token: 1,
        offset: 0,
    };
    let refused = guest.agent.open_stream(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    signal(&mut guest, "c1", 9, true).await;
    wait(&mut guest, "c1", "").await;
    guest.end().await;
}
