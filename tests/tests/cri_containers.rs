//! Containers through the CRI: life, what they are made with, logs, exec.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{labels, refused};
use bulkhead_tests::log::{self, Stream};
use bulkhead_tests::request::{container, number, security, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    container_runs_and_reports_its_exit,
    status_has_the_image_id_and_user,
    start_of_a_started_container_is_refused,
    stop_sends_the_signal_and_waits,
    stop_kills_what_does_not_end,
    stop_sends_the_images_signal,
    stop_and_remove_may_be_repeated,
    remove_kills_a_running_container,
    containers_are_filtered,
    name_in_use_is_refused,
    unknown_container_is_not_found,
    unknown_container_may_be_stopped,
    unknown_image_is_refused_by_name,
    command_and_arguments_replace_the_images,
    environment_is_the_images_then_the_requests,
    working_directory_is_made,
    user_is_the_one_asked_for,
    images_user_has_the_groups_that_list_it,
    group_without_user_is_refused,
    unknown_user_is_refused_by_name,
    capabilities_are_added_and_dropped,
    capabilities_may_bear_their_prefix,
    setuid_and_file_capabilities_work,
    no_new_privileges_disarms_setuid,
    root_file_system_is_read_only_when_asked_for,
    paths_are_masked_and_read_only,
    log_has_both_streams,
    log_splits_long_lines,
    log_keeps_the_last_bytes,
    log_is_reopened_after_a_rename,
    log_is_dropped_without_a_path,
    standard_input_is_empty,
    exec_answers_output_and_exit_code,
    exec_is_killed_at_its_time_limit,
    exec_is_killed_with_its_children,
    exec_runs_as_the_container_does,
    exec_of_a_missing_command_fails,
    exec_needs_a_running_container,
    large_output_arrives_whole,
    large_output_of_an_exec_arrives_whole,
    containers_run_side_by_side,
}

fn container_runs_and_reports_its_exit(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exits")?;
    let image = node.base()?;
    let mut config = shell("seven", &image, "exit 7");
    config.labels = labels(&[("app", "seven")]);
    config.annotations = labels(&[("note", "a b")]);
    let id = pod.create(&config)?;

    let created = cri.container(&id)?;
    ensure!(
        created.state() == ContainerState::ContainerCreated,
        "{created:?}"
    );
    ensure!(
        created.created_at > 1_000_000_000_000_000_000,
        "{created:?}"
    );
    ensure!(
        created.started_at == 0 && created.finished_at == 0,
        "{created:?}"
    );
    ensure!(created.metadata == config.metadata, "{created:?}");
    ensure!(created.labels == config.labels, "{created:?}");
    ensure!(created.annotations == config.annotations, "{created:?}");
    ensure!(
        created.log_path == pod.log_path(&config).display().to_string(),
        "{created:?}"
    );

    cri.start(&id)?;
    let exited = cri.wait(&id)?;
    ensure!(exited.exit_code == 7, "{exited:?}");
    ensure!(exited.reason == "Error", "{exited:?}");
    ensure!(exited.started_at >= exited.created_at, "{exited:?}");
    ensure!(exited.finished_at >= exited.started_at, "{exited:?}");

    let good = pod.run_to_end(&shell("zero", &image, "exit 0"))?.status;
    ensure!(
        good.exit_code == 0 && good.reason == "Completed",
        "{good:?}"
    );
    let killed = pod
        .run_to_end(&shell("killed", &image, "kill -9 $$"))?
        .status;
    ensure!(
        killed.exit_code == 137 || killed.exit_code == 0,
        "{killed:?}"
    );
    Ok(())
}

fn status_has_the_image_id_and_user(node: &Node) -> Result<()> {
    let pod = node.pod("image-id")?;
    let image = node.base()?;
    let known = node.cri()?.image(&image)?.context("no image")?;
    let mut config = shell("container", &image, "exit 0");
    security(&mut config).run_as_user = number(1000);
    let status = pod.run_to_end(&config)?.status;
    ensure!(status.image_id == known.id, "{status:?}");
    let user = status.user.and_then(|user| user.linux).context("no user")?;
    ensure!(user.uid == 1000 && user.gid == 1000, "{user:?}");
    Ok(())
}

fn start_of_a_started_container_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("twice")?;
    let id = pod.start(&sleeper("running", &node.base()?))?;
    refused(cri.start(&id), &[Code::FailedPrecondition])?;
    ensure!(
        cri.container(&id)?.state() == ContainerState::ContainerRunning,
        "after it"
    );
    cri.stop(&id, 10)?;
    refused(cri.start(&id), &[Code::FailedPrecondition])?;
    Ok(())
}

fn stop_sends_the_signal_and_waits(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("graceful")?;
    let line = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.2; done";
    let config = shell("graceful", &node.base()?, line);
    let id = pod.start(&config)?;
    wait_for_log(&pod.log_path(&config), "up\n")?;
    cri.stop(&id, 60)?;
    let status = cri.container(&id)?;
    ensure!(
        status.state() == ContainerState::ContainerExited,
        "{status:?}"
    );
    ensure!(status.exit_code == 3, "{status:?}");
    let said = log::text(&log::read(&pod.log_path(&config))?, Stream::Stdout);
    ensure!(said == "up\nbye\n", "{said:?}");
    Ok(())
}

fn stop_kills_what_does_not_end(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("stubborn")?;
    let image = node.base()?;
    for (name, timeout) in [("after-a-second", 1), ("at-once", 0)] {
        // A child of its own must go as well.
        let line = "trap '' TERM; sleep 1000 & echo up; while :; do sleep 1; done";
        let config = shell(name, &image, line);
        let id = pod.start(&config)?;
        wait_for_log(&pod.log_path(&config), "up\n")?;
        cri.stop(&id, timeout)?;
        let status = cri.container(&id)?;
        ensure!(
            status.state() == ContainerState::ContainerExited,
            "{status:?}"
        );
        ensure!(status.exit_code == 137, "{status:?}");
    }
    Ok(())
}

fn stop_sends_the_images_signal(node: &Node) -> Result<()> {
    let pod = node.pod("signal")?;
    let image = node.image("test/config:1")?;
    let line = "trap 'exit 10' USR1; trap 'exit 15' TERM; echo up; while :; do sleep 0.2; done";
    let config = shell("usr1", &image, line);
    let id = pod.start(&config)?;
    wait_for_log(&pod.log_path(&config), "up\n")?;
    node.cri()?.stop(&id, 60)?;
    let status = node.cri()?.container(&id)?;
    ensure!(status.exit_code == 10, "{status:?}");
    Ok(())
}

fn stop_and_remove_may_be_repeated(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("again")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    for _ in 0..2 {
        cri.stop(&id, 10)?;
    }
    for _ in 0..2 {
        cri.remove(&id)?;
    }
    cri.remove("0123456789abcdef")?;
    Ok(())
}

fn remove_kills_a_running_container(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("removed")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    cri.remove(&id)?;
    refused(cri.container(&id), &[Code::NotFound])?;
    // The pod is as good as before, and the name is free.
    pod.start(&sleeper("sleeper", &node.base()?))?;
    Ok(())
}

fn containers_are_filtered(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let (first, second) = (node.pod("first")?, node.pod("second")?);
    let image = node.base()?;
    let labelled = |name: &str, pairs: &[(&str, &str)]| {
        let mut config = sleeper(name, &image);
        config.labels = labels(pairs);
        config
    };
    let one = first.start(&labelled("one", &[("app", "web"), ("tier", "front")]))?;
    let two = first.create(&labelled("two", &[("app", "web")]))?;
    let three = second.create(&labelled("three", &[("app", "db")]))?;

    let expect = |filter: ContainerFilter, wanted: &[&String]| -> Result<()> {
        let found: BTreeSet<_> = cri.container_ids(filter.clone())?.into_iter().collect();
        let wanted: BTreeSet<_> = wanted.iter().map(|&id| id.clone()).collect();
        ensure!(
            found == wanted,
            "{filter:?} gives {found:?}, not {wanted:?}"
        );
        Ok(())
    };
    let all = ContainerFilter::default();
    expect(all.clone(), &[&one, &two, &three])?;
    let start = one.get(..12).context("a short id")?.to_owned();
    expect(
        ContainerFilter {
            id: start,
            ..all.clone()
        },
        &[&one],
    )?;
    let of_first = ContainerFilter {
        pod_sandbox_id: first.id.clone(),
        ..all.clone()
    };
    expect(of_first.clone(), &[&one, &two])?;
    let state = |state: ContainerState| {
        Some(ContainerStateValue {
            state: state.into(),
        })
    };
    let created = state(ContainerState::ContainerCreated);
    expect(
        ContainerFilter {
            state: created,
            ..all.clone()
        },
        &[&two, &three],
    )?;
    expect(
        ContainerFilter {
            state: created,
            ..of_first.clone()
        },
        &[&two],
    )?;
    let web = labels(&[("app", "web")]);
    expect(
        ContainerFilter {
            label_selector: web,
            ..all.clone()
        },
        &[&one, &two],
    )?;
    let both = labels(&[("app", "web"), ("tier", "front")]);
    expect(
        ContainerFilter {
            label_selector: both,
            ..all
        },
        &[&one],
    )?;
    expect(
        ContainerFilter {
            id: three,
            ..of_first
        },
        &[],
    )
}

fn name_in_use_is_refused(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("name")?;
    let mut config = sleeper("twin", &node.base()?);
    pod.create(&config)?;
    let again = cri.create(&pod.id, &config, &pod.config);
    refused(again, &[Code::AlreadyExists])?;
    config.metadata.get_or_insert_default().attempt = 1;
    pod.create(&config)?;
    Ok(())
}

fn unknown_container_is_not_found(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    refused(cri.container("0123456789abcdef"), &[Code::NotFound])?;
    refused(cri.start("0123456789abcdef"), &[Code::NotFound])?;
    refused(
        cri.exec_for("0123456789abcdef", &["true"], 0),
        &[Code::NotFound],
    )?;
    Ok(())
}

fn unknown_container_may_be_stopped(node: &Node) -> Result<()> {
    node.cri()?.stop("0123456789abcdef", 0)?;
    Ok(())
}

fn unknown_image_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("imageless")?;
    let image = node.registry.name("test/none:1");
    let answer = node
        .cri()?
        .create(&pod.id, &sleeper("none", &image), &pod.config);
    let message = refused(answer, &[Code::NotFound])?;
    ensure!(message.contains("test/none:1"), "{message}");
    Ok(())
}

fn command_and_arguments_replace_the_images(node: &Node) -> Result<()> {
    let pod = node.pod("commands")?;
    let image = node.image("test/config:1")?;
    let words = |words: &[&str]| {
        words
            .iter()
            .map(|&word| word.to_owned())
            .collect::<Vec<_>>()
    };
    let cases: [(&[&str], &[&str], &str); 4] = [
        (&[], &[], "entrypoint cmd\n"),
        (&[], &["one", "two"], "entrypoint one two\n"),
        (&["echo", "command"], &[], "command\n"),
        (&["echo", "command"], &["one", "two"], "command one two\n"),
    ];
    for (index, (command, args, wanted)) in cases.into_iter().enumerate() {
        let mut config = container(&format!("case-{index}"), &image, command);
        config.args = words(args);
        let ended = pod.run_to_end(&config)?;
        ensure!(
            ended.stdout() == wanted,
            "{command:?} {args:?}: {:?}",
            ended.stdout()
        );
    }
    Ok(())
}

fn environment_is_the_images_then_the_requests(node: &Node) -> Result<()> {
    let pod = node.pod("environment")?;
    let mut config = container("env", &node.image("test/config:1")?, &["env"]);
    let pair = |key: &str, value: &str| KeyValue {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    config.envs = vec![
        pair("BOTH", "request"),
        pair("ADDED", "a=b c"),
        pair("EMPTY", ""),
    ];
    let ended = pod.run_to_end(&config)?;
    let lines: BTreeSet<_> = ended.stdout().lines().map(str::to_owned).collect();
    for wanted in ["FROM_IMAGE=image", "BOTH=request", "ADDED=a=b c", "EMPTY="] {
        ensure!(lines.contains(wanted), "no {wanted} in {lines:?}");
    }
    ensure!(!lines.contains("BOTH=image"), "{lines:?}");
    ensure!(
        lines
            .iter()
            .any(|line| line.starts_with("PATH=/usr/local/sbin:")),
        "{lines:?}"
    );
    Ok(())
}

fn working_directory_is_made(node: &Node) -> Result<()> {
    let pod = node.pod("directories")?;
    let image = node.image("test/config:1")?;
    let of_image = container("image", &image, &["pwd"]);
    ensure!(
        pod.run_to_end(&of_image)?.stdout() == "/work/made\n",
        "the image's"
    );
    let mut own = container("own", &image, &["pwd"]);
    own.working_dir = "/not/there/yet".to_owned();
    ensure!(
        pod.run_to_end(&own)?.stdout() == "/not/there/yet\n",
        "the request's"
    );
    let root = container("root", &node.base()?, &["pwd"]);
    ensure!(pod.run_to_end(&root)?.stdout() == "/\n", "nobody's");
    Ok(())
}

/// Prints user, group and groups, these in the order of their numbers: the kernel's is nobody's
/// business.
const IDS: &str = "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n -u)";

fn images_user_has_the_groups_that_list_it(node: &Node) -> Result<()> {
    let pod = node.pod("image-user")?;
    let ended = pod.run_to_end(&shell("image", &node.image("test/config:1")?, IDS))?;
    ensure!(ended.stdout() == "1000 50 44 50\n", "{:?}", ended.stdout());
    Ok(())
}

fn user_is_the_one_asked_for(node: &Node) -> Result<()> {
    type Choose = fn(&mut LinuxContainerSecurityContext);
    let pod = node.pod("users")?;
    let (base, with_user) = (node.base()?, node.image("test/config:1")?);
    let cases: [(&str, &str, Choose, &str); 7] = [
        ("root", &base, |_| {}, "0 0 0"),
        (
            "number",
            &base,
            |user| user.run_as_user = number(1000),
            "1000 1000 44 50 1000",
        ),
        (
            "unlisted",
            &base,
            |user| user.run_as_user = number(4242),
            "4242 0 0",
        ),
        (
            "name",
            &base,
            |user| user.run_as_username = "app".to_owned(),
            "1000 1000 44 50 1000",
        ),
        (
            "group",
            &base,
            |user| {
                user.run_as_user = number(1000);
                user.run_as_group = number(7);
            },
            "1000 7 7 44 50",
        ),
        (
            "extra",
            &base,
            |user| {
                user.run_as_user = number(4242);
                user.supplemental_groups = vec![9, 8];
            },
            "4242 0 0 8 9",
        ),
        (
            "over-image",
            &with_user,
            |user| user.run_as_user = number(0),
            "0 0 0",
        ),
    ];
    for (name, image, choose, wanted) in cases {
        let mut config = shell(name, image, IDS);
        choose(security(&mut config));
        let ended = pod.run_to_end(&config)?;
        let said = ended.stdout();
        ensure!(
            said.trim() == wanted,
            "{name}: {said:?}, not {wanted:?}{}",
            ended.stderr()
        );
    }
    Ok(())
}

fn group_without_user_is_refused(node: &Node) -> Result<()> {
    let pod = node.pod("group")?;
    let mut config = sleeper("group", &node.base()?);
    security(&mut config).run_as_group = number(50);
    let answer = node.cri()?.create(&pod.id, &config, &pod.config);
    refused(answer, &[Code::InvalidArgument])?;
    Ok(())
}

fn unknown_user_is_refused_by_name(node: &Node) -> Result<()> {
    let pod = node.pod("user")?;
    let mut config = sleeper("user", &node.base()?);
    security(&mut config).run_as_username = "nosuchuser".to_owned();
    let error = match node.cri()?.create(&pod.id, &config, &pod.config) {
        // Where the guest looks it up, the start is what fails.
        Ok(id) => refused(
            node.cri()?.start(&id),
            &[Code::InvalidArgument, Code::FailedPrecondition],
        )?,
        Err(status) => status.message().to_owned(),
    };
    ensure!(error.contains("user"), "{error}");
    Ok(())
}

fn capabilities_are_added_and_dropped(node: &Node) -> Result<()> {
    type Choose = fn(&mut LinuxContainerSecurityContext);
    const CHOWN: u64 = 1 << 0;
    const NET_ADMIN: u64 = 1 << 12;
    const NET_RAW: u64 = 1 << 13;
    const SYS_ADMIN: u64 = 1 << 21;
    fn change(user: &mut LinuxContainerSecurityContext, added: &[&str], dropped: &[&str]) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let capabilities = user.capabilities.get_or_insert_default();
        capabilities.add_capabilities = owned(added);
        capabilities.drop_capabilities = owned(dropped);
    }
    let pod = node.pod("capabilities")?;
    let image = node.base()?;
    let cases: [(&str, Choose, u64, u64); 6] = [
        ("default", |_| {}, CHOWN, NET_ADMIN | SYS_ADMIN),
        ("drop-all", |user| change(user, &[], &["ALL"]), 0, u64::MAX),
        (
            "add",
            |user| change(user, &["NET_ADMIN"], &[]),
            CHOWN | NET_ADMIN,
            SYS_ADMIN,
        ),
        ("drop", |user| change(user, &[], &["CHOWN"]), NET_RAW, CHOWN),
        (
            "only",
            |user| change(user, &["NET_RAW"], &["ALL"]),
            NET_RAW,
            !NET_RAW,
        ),
        (
            "add-all",
            |user| change(user, &["ALL"], &[]),
            SYS_ADMIN | NET_ADMIN | CHOWN,
            0,
        ),
    ];
    for (name, choose, present, absent) in cases {
        let mut config = shell(name, &image, "grep CapEff /proc/self/status");
        choose(security(&mut config));
        let said = pod.run_to_end(&config)?.stdout();
        let hex = said.split_whitespace().nth(1).context("no CapEff")?;
        let effective = u64::from_str_radix(hex, 16)?;
        ensure!(effective & present == present, "{name}: {said}");
        ensure!(effective & absent == 0, "{name}: {said}");
    }
    Ok(())
}

fn capabilities_may_bear_their_prefix(node: &Node) -> Result<()> {
    let pod = node.pod("prefix")?;
    let mut config = shell("prefix", &node.base()?, "grep CapEff /proc/self/status");
    let capabilities = security(&mut config).capabilities.get_or_insert_default();
    capabilities.drop_capabilities = vec!["ALL".to_owned()];
    capabilities.add_capabilities = vec!["CAP_CHOWN".to_owned()];
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "CapEff:\t0000000000000001\n", "{said:?}");
    Ok(())
}

fn setuid_and_file_capabilities_work(node: &Node) -> Result<()> {
    let pod = node.pod("setuid")?;
    let line = "/suid/bash -p -c 'echo $EUID'; /caps/cat /proc/self/status | grep CapEff";
    let mut config = shell("user", &node.base()?, line);
    security(&mut config).run_as_user = number(1000);
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(said == "0\nCapEff:\t0000000000000001\n", "{said:?}");
    Ok(())
}

fn no_new_privileges_disarms_setuid(node: &Node) -> Result<()> {
    let pod = node.pod("disarmed")?;
    let line = "/suid/bash -p -c 'echo $EUID'; /caps/cat /proc/self/status | grep CapEff; grep NoNewPrivs /proc/self/status";
    let mut config = shell("user", &node.base()?, line);
    security(&mut config).run_as_user = number(1000);
    security(&mut config).no_new_privs = true;
    let said = pod.run_to_end(&config)?.stdout();
    ensure!(
        said == "1000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n",
        "{said:?}"
    );
    Ok(())
}

fn root_file_system_is_read_only_when_asked_for(node: &Node) -> Result<()> {
    let pod = node.pod("read-only")?;
    let image = node.base()?;
    let line = "touch /data/new && echo written";
    let mut config = shell("read-only", &image, line);
    security(&mut config).readonly_rootfs = true;
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.status.exit_code != 0, "{:?}", ended.stdout());
    ensure!(
        ended.stderr().contains("Read-only file system"),
        "{:?}",
        ended.stderr()
    );
    let ended = pod.run_to_end(&shell("writable", &image, line))?;
    ensure!(ended.stdout() == "written\n", "{:?}", ended.stderr());
    Ok(())
}

fn paths_are_masked_and_read_only(node: &Node) -> Result<()> {
    let pod = node.pod("paths")?;
    let line =
        "cat /proc/kallsyms | wc -c; ls /proc/bus | wc -l; echo 1 > /proc/sys/vm/overcommit_memory";
    let mut config = shell("paths", &node.base()?, line);
    let owned = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    security(&mut config).masked_paths = owned(&["/proc/kallsyms", "/proc/bus", "/proc/none"]);
    security(&mut config).readonly_paths = owned(&["/proc/sys"]);
    let ended = pod.run_to_end(&config)?;
    ensure!(ended.stdout() == "0\n0\n", "{:?}", ended.stdout());
    ensure!(
        ended.stderr().contains("Read-only file system"),
        "{:?}",
        ended.stderr()
    );
    Ok(())
}

fn log_has_both_streams(node: &Node) -> Result<()> {
    let pod = node.pod("streams")?;
    let line =
        "echo out 1; echo err 1 >&2; echo; echo '  spaces  '; printf 'a\\tb\\n'; echo err 2 >&2";
    let ended = pod.run_to_end(&shell("both", &node.base()?, line))?;
    ensure!(
        ended.stdout() == "out 1\n\n  spaces  \na\tb\n",
        "{:?}",
        ended.stdout()
    );
    ensure!(ended.stderr() == "err 1\nerr 2\n", "{:?}", ended.stderr());
    ensure!(
        ended.log.iter().all(|line| line.complete),
        "{:?}",
        ended.log
    );
    let times: Vec<_> = ended.log.iter().map(|line| line.time.clone()).collect();
    ensure!(times.iter().all(|time| time.len() >= 20), "{times:?}");
    Ok(())
}

fn log_splits_long_lines(node: &Node) -> Result<()> {
    let pod = node.pod("long")?;
    // 40,000 bytes in one line: two full parts and a rest.
    let line = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo short";
    let ended = pod.run_to_end(&shell("long", &node.base()?, line))?;
    let shape: Vec<_> = ended
        .log
        .iter()
        .map(|line| (line.text.len(), line.complete))
        .collect();
    let (last, parts) = shape.split_last().context("an empty log")?;
    ensure!(*last == (5, true), "{shape:?}");
    let (end, parts) = parts.split_last().context("one line")?;
    ensure!(end.1 && parts.iter().all(|part| !part.1), "{shape:?}");
    ensure!(parts.len() >= 2, "{shape:?}");
    ensure!(
        ended.stdout() == format!("{}\nshort\n", "x".repeat(40_000)),
        "{shape:?}"
    );
    Ok(())
}

fn log_keeps_the_last_bytes(node: &Node) -> Result<()> {
    let pod = node.pod("last")?;
    let ended = pod.run_to_end(&shell(
        "last",
        &node.base()?,
        "echo whole; printf 'no newline'",
    ))?;
    let texts: Vec<_> = ended
        .log
        .iter()
        .map(|line| String::from_utf8_lossy(&line.text))
        .collect();
    ensure!(texts == ["whole", "no newline"], "{texts:?}");
    Ok(())
}

fn log_is_reopened_after_a_rename(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("rotated")?;
    let line = "echo before; while [ ! -e /go ]; do sleep 0.1; done; echo after; sleep 1000";
    let config = shell("rotated", &node.base()?, line);
    let id = pod.create(&config)?;
    let request = || ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    let refusal = cri.reopen_container_log(request());
    refused(refusal, &[Code::FailedPrecondition])?;
    cri.start(&id)?;
    let (path, old) = (
        pod.log_path(&config),
        pod.log_path(&config).with_extension("old"),
    );
    wait_for_log(&path, "before\n")?;
    fs::rename(&path, &old)?;
    cri.reopen_container_log(request())?;
    ensure!(path.exists(), "no new log when the call has returned");
    cri.shell(&id, "touch /go")?;
    wait_for_log(&path, "after\n")?;
    wait_for_log(&old, "before\n")?;
    Ok(())
}

fn log_is_dropped_without_a_path(node: &Node) -> Result<()> {
    let pod = node.pod("logless")?;
    let mut config = shell(
        "logless",
        &node.base()?,
        "head -c 1000000 /dev/zero; exit 5",
    );
    config.log_path = String::new();
    let id = pod.start(&config)?;
    let status = node.cri()?.wait(&id)?;
    ensure!(status.exit_code == 5, "{status:?}");
    let left: Vec<_> = fs::read_dir(&pod.config.log_directory)?.flatten().collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

fn standard_input_is_empty(node: &Node) -> Result<()> {
    let pod = node.pod("input")?;
    let ended = pod.run_to_end(&shell("input", &node.base()?, "cat; echo end"))?;
    ensure!(ended.stdout() == "end\n", "{:?}", ended.stdout());
    Ok(())
}

fn exec_answers_output_and_exit_code(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "echo out; echo err >&2; printf '\\377\\000'; exit 9";
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", line], 0)?;
    ensure!(reply.stdout == b"out\n\xff\0", "{reply:?}");
    ensure!(reply.stderr == b"err\n", "{reply:?}");
    ensure!(reply.exit_code == 9, "{reply:?}");
    let reply = cri.exec_for(&id, &["/bin/true"], 30)?;
    ensure!(reply.exit_code == 0 && reply.stdout.is_empty(), "{reply:?}");
    let reply = cri.exec_for(&id, &["/bin/sh", "-c", "kill -9 $$"], 0)?;
    ensure!(reply.exit_code == 137, "{reply:?}");
    // One exec leaves nothing in the way of the next.
    for _ in 0..5 {
        ensure!(cri.shell(&id, "echo again")? == "again", "a later exec");
    }
    Ok(())
}

fn exec_is_killed_at_its_time_limit(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-limit")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    refused(
        cri.exec_for(&id, &["sleep", "7654"], 1),
        &[Code::DeadlineExceeded],
    )?;
    let left = cri.shell(&id, "ps -o args | grep -c '^sleep 7654' || true")?;
    ensure!(left == "0", "{left} processes of the exec go on");
    Ok(())
}

fn exec_is_killed_with_its_children(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-children")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let line = "sleep 7654 & sleep 7654";
    let answer = cri.exec_for(&id, &["/bin/sh", "-c", line], 1);
    refused(answer, &[Code::DeadlineExceeded])?;
    let left = cri.shell(&id, "ps -o args | grep -c '^sleep 7654' || true")?;
    ensure!(left == "0", "{left} processes of the exec go on");
    Ok(())
}

fn exec_runs_as_the_container_does(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-as")?;
    let mut config = sleeper("sleeper", &node.image("test/config:1")?);
    security(&mut config)
        .capabilities
        .get_or_insert_default()
        .drop_capabilities = vec!["ALL".to_owned()];
    let id = pod.start(&config)?;
    let said = cri.shell(
        &id,
        "id -u; id -g; pwd; echo $FROM_IMAGE; grep CapBnd /proc/self/status",
    )?;
    ensure!(
        said == "1000\n50\n/work/made\nimage\nCapBnd:\t0000000000000000",
        "{said:?}"
    );
    Ok(())
}

fn exec_of_a_missing_command_fails(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-missing")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    match cri.exec_for(&id, &["/no/such/command"], 0) {
        Ok(reply) => ensure!([126, 127].contains(&reply.exit_code), "{reply:?}"),
        Err(status) => ensure!(status.message().contains("/no/such/command"), "{status}"),
    }
    ensure!(
        cri.shell(&id, "echo fine")? == "fine",
        "the container after it"
    );
    Ok(())
}

fn exec_needs_a_running_container(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("exec-stopped")?;
    let created = pod.create(&sleeper("created", &node.base()?))?;
    let codes = [Code::FailedPrecondition];
    refused(cri.exec_for(&created, &["true"], 0), &codes)?;
    cri.start(&created)?;
    cri.stop(&created, 10)?;
    refused(cri.exec_for(&created, &["true"], 0), &codes)?;
    Ok(())
}

/// Lines of a container that writes more than any buffer on the way holds.
const LINES: usize = 40_000;

/// What `seq` prints of them.
fn numbers() -> String {
    (1..=LINES).map(|number| format!("{number}\n")).collect()
}

fn large_output_arrives_whole(node: &Node) -> Result<()> {
    let pod = node.pod("large")?;
    let command = format!("seq {LINES}; seq {LINES} >&2");
    let ended = pod.run_to_end(&shell("large", &node.base()?, &command))?;
    for (name, said) in [("stdout", ended.stdout()), ("stderr", ended.stderr())] {
        ensure!(said == numbers(), "{name}: {} bytes", said.len());
    }
    Ok(())
}

fn large_output_of_an_exec_arrives_whole(node: &Node) -> Result<()> {
    let pod = node.pod("large-exec")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let said = node.cri()?.shell(&id, &format!("seq {LINES}"))?;
    ensure!(said == numbers().trim_end(), "{} bytes", said.len());
    Ok(())
}

fn containers_run_side_by_side(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("many")?;
    let image = node.base()?;
    let ids = (0..6)
        .map(|number| {
            pod.start(&shell(
                &format!("number-{number}"),
                &image,
                &format!("sleep 1; exit {number}"),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    for (wanted, id) in (0..).zip(&ids) {
        ensure!(
            cri.wait(id)?.exit_code == wanted,
            "exit code of container {wanted}"
        );
    }
    Ok(())
}

/// Waits until a running container has said exactly this.
fn wait_for_log(path: &std::path::Path, wanted: &str) -> Result<()> {
    for _ in 0..600 {
        let said = log::read(path).map(|lines| log::text(&lines, Stream::Stdout));
        if said.as_deref().is_ok_and(|said| said == wanted) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    anyhow::bail!("{} does not say {wanted:?}", path.display())
}
