//! Terminals of containers through the CRI. What needs a client's streams is not here.

use anyhow::{Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::request::{number, security, shell};
use bulkhead_tests::{Node, suite};

suite! {
    terminal_is_the_containers_stdio_and_console,
    terminal_belongs_to_the_user,
    terminals_name_is_the_requests,
    terminal_is_of_a_devpts_of_the_containers_own,
    terminal_output_arrives_to_the_last_byte,
    terminal_that_is_closed_ends_nothing,
    exec_in_a_container_with_a_terminal_has_none,
}

fn terminal(name: &str, image: &str, line: &str) -> ContainerConfig {
    ContainerConfig {
        tty: true,
        ..shell(name, image, line)
    }
}

fn terminal_is_the_containers_stdio_and_console(node: &Node) -> Result<()> {
    let pod = node.pod("terminal")?;
    let line = "tty; echo $TERM; test -t 0 && test -t 1 && test -t 2 && echo all three;
        echo error >&2; echo controlling > /dev/tty; echo console > /dev/console; exit 5";
    let ended = pod.run_to_end(&terminal("terminal", &node.base()?, line))?;
    // One stream, its lines ended as a terminal ends them.
    let wanted = "/dev/pts/0\r\nxterm\r\nall three\r\nerror\r\ncontrolling\r\nconsole\r\n";
    ensure!(ended.stdout() == wanted, "{:?}", ended.stdout());
    ensure!(ended.stderr().is_empty(), "{:?}", ended.stderr());
    ensure!(ended.status.exit_code == 5, "{:?}", ended.status);
    Ok(())
}

fn terminal_belongs_to_the_user(node: &Node) -> Result<()> {
    let pod = node.pod("terminal-user")?;
    let line = "stat -c %u:%a /dev/pts/0; echo again > /dev/stdout; echo here > /dev/console";
    let mut config = terminal("user", &node.base()?, line);
    security(&mut config).run_as_user = number(1000);
    let ended = pod.run_to_end(&config)?;
    let wanted = "1000:620\r\nagain\r\nhere\r\n";
    ensure!(ended.stdout() == wanted, "{:?}", ended.stdout());
    Ok(())
}

fn terminals_name_is_the_requests(node: &Node) -> Result<()> {
    let pod = node.pod("terminal-name")?;
    let mut config = terminal("name", &node.base()?, "echo $TERM");
    config.envs = vec![KeyValue {
        key: "TERM".to_owned(),
        value: "linux".to_owned(),
    }];
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.stdout() == "linux\r\n", "{:?}", ended.stdout());
    Ok(())
}

fn terminal_is_of_a_devpts_of_the_containers_own(node: &Node) -> Result<()> {
    let pod = node.pod("terminal-devpts")?;
    let image = node.base()?;
    let mut first = terminal("first", &image, "sleep 1000");
    first.stdin = true;
    pod.start(&first)?;
    let line = "ls /dev/pts; stat -Lc %a /dev/ptmx";
    let ended = pod.run_to_end(&terminal("second", &image, line))?;
    let wanted = "0     ptmx\r\n666\r\n";
    ensure!(ended.stdout() == wanted, "{:?}", ended.stdout());
    Ok(())
}

fn terminal_output_arrives_to_the_last_byte(node: &Node) -> Result<()> {
    const LINES: usize = 20_000;
    let pod = node.pod("terminal-large")?;
    let line = format!("seq {LINES}");
    let ended = pod.run_to_end(&terminal("large", &node.base()?, &line))?;
    let wanted: String = (1..=LINES).map(|number| format!("{number}\r\n")).collect();
    let said = ended.stdout();
    ensure!(said == wanted, "{} of {} bytes", said.len(), wanted.len());
    Ok(())
}

fn terminal_that_is_closed_ends_nothing(node: &Node) -> Result<()> {
    let pod = node.pod("terminal-closed")?;
    let line = "echo before; exec 0<&- 1>&- 2>&-; sleep 1; exit 3";
    let ended = pod.run_to_end(&terminal("closed", &node.base()?, line))?;
    ensure!(ended.stdout() == "before\r\n", "{:?}", ended.stdout());
    ensure!(ended.status.exit_code == 3, "{:?}", ended.status);
    Ok(())
}

fn exec_in_a_container_with_a_terminal_has_none(node: &Node) -> Result<()> {
    let pod = node.pod("terminal-exec")?;
    let id = pod.start(&terminal("sleeper", &node.base()?, "sleep 1000"))?;
    let reply = node.cri()?.exec_for(
        &id,
        &["/bin/sh", "-c", "tty; echo $TERM; echo error >&2"],
        0,
    )?;
    ensure!(reply.stdout == b"not a tty\nxterm\n", "{reply:?}");
    ensure!(reply.stderr == b"error\n", "{reply:?}");
    Ok(())
}
