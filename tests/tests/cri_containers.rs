//! The life of containers through the CRI.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::{labels, refused};
use bulkhead_tests::log::{self, Stream};
use bulkhead_tests::request::{number, security, shell, sleeper};
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
    containers_run_side_by_side,
    host_files_are_read_by_their_group,
    what_a_container_writes_to_host_files_comes_back,
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
    log::wait_for(&pod.log_path(&config), "up\n")?;
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
        log::wait_for(&pod.log_path(&config), "up\n")?;
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
    log::wait_for(&pod.log_path(&config), "up\n")?;
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

fn host_files_are_read_by_their_group(node: &Node) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let pod = node.pod("secret")?;
    let path = node.scratch().join("password");
    fs::write(&path, "of the host\n")?;
    chown(&path, Some(0), Some(2000))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o440))?;
    for (name, groups, wanted) in [
        ("member", vec![2000], "of the host\n"),
        ("other", vec![], ""),
    ] {
        let mut config = shell(name, &node.base()?, "cat /in/password");
        security(&mut config).run_as_user = number(1000);
        security(&mut config).supplemental_groups = groups;
        config.mounts = vec![Mount {
            host_path: path.display().to_string(),
            container_path: "/in/password".to_owned(),
            readonly: true,
            ..Mount::default()
        }];
        let ended = pod.run_to_end(&config)?;
        ensure!(ended.stdout() == wanted, "{name}: {}", ended.stdout());
        let denied = ended.stderr().contains("denied");
        ensure!(denied == wanted.is_empty(), "{name}: {}", ended.stderr());
    }
    Ok(())
}

fn what_a_container_writes_to_host_files_comes_back(node: &Node) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    let pod = node.pod("termination")?;
    let directory = node.scratch().join("termination");
    fs::create_dir_all(&directory)?;
    let host = |name: &str| directory.join(name);
    for name in ["log", "fixed", "large", "swapped", "taken"] {
        fs::write(host(name), "old\n")?;
        fs::set_permissions(host(name), fs::Permissions::from_mode(0o666))?;
    }
    let mount = |name: &str, path: &str, readonly| Mount {
        host_path: host(name).display().to_string(),
        container_path: path.to_owned(),
        readonly,
        ..Mount::default()
    };
    // What the image's user may write, too; after a kill by the runtime as after an end.
    let line = "echo reason > /dev/termination-log; echo x >> /in/fixed; echo x > /in/swapped; \
                echo x > /in/taken; head -c 70000 /dev/zero > /in/large; \
                trap '' TERM; while :; do sleep 1; done";
    let mut config = shell("failing", &node.base()?, line);
    security(&mut config).run_as_user = number(1000);
    config.mounts = vec![
        mount("log", "/dev/termination-log", false),
        mount("fixed", "/in/fixed", true),
        mount("large", "/in/large", false),
        mount("swapped", "/in/swapped", false),
        mount("taken", "/in/taken", false),
    ];
    let inode = fs::metadata(host("log"))?.ino();
    let id = pod.create(&config)?;
    pod.cri.start(&id)?;
    // A link in a file's place is not followed, and what the host has written stays.
    fs::write(host("secret"), "of the host\n")?;
    fs::remove_file(host("swapped"))?;
    symlink(host("secret"), host("swapped"))?;
    fs::write(host("taken"), "newer\n")?;
    let written = "while [ $(stat -c %s /in/large) != 70000 ]; do sleep 0.1; done";
    pod.cri.shell(&id, written)?;
    ensure!(
        fs::read_to_string(host("log"))? == "old\n",
        "before the end"
    );
    let logged = node.server()?.log_length();
    pod.cri.stop(&id, 0)?;
    let status = pod.cri.wait(&id)?;
    ensure!(status.exit_code == 137, "{status:?}");
    let log = node.server()?.log_since(logged);
    let told = |path: &str| {
        log.lines()
            .any(|line| line.contains(path) && line.contains(&id))
    };
    ensure!(told("/in/large") && told("/in/taken"), "{log}");
    let now = |name: &str| fs::read_to_string(host(name));
    ensure!(now("log")? == "reason\n", "{:?}", now("log"));
    ensure!(
        fs::metadata(host("log"))?.ino() == inode,
        "another file in its place"
    );
    ensure!(now("fixed")? == "old\n", "{:?}", now("fixed"));
    ensure!(now("large")? == "old\n", "{:?}", now("large"));
    ensure!(now("secret")? == "of the host\n", "{:?}", now("secret"));
    ensure!(now("taken")? == "newer\n", "{:?}", now("taken"));
    Ok(())
}
