//! What the process of a container is made with: command, environment, user, capabilities, root.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::request::{container, number, security, shell, sleeper};
use bulkhead_tests::{Node, suite};
use tonic::Code;

suite! {
    command_and_arguments_replace_the_images,
    environment_is_the_images_then_the_requests,
    working_directory_is_made,
    images_user_has_the_groups_that_list_it,
    user_is_the_one_asked_for,
    group_without_user_is_refused,
    unknown_user_is_refused_by_name,
    capabilities_are_added_and_dropped,
    capabilities_may_bear_their_prefix,
    setuid_and_file_capabilities_work,
    no_new_privileges_disarms_setuid,
    root_file_system_is_read_only_when_asked_for,
    paths_are_masked_and_read_only,
    standard_input_is_empty,
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
    ensure!(error.contains("nosuchuser"), "{error}");
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

fn standard_input_is_empty(node: &Node) -> Result<()> {
    let pod = node.pod("input")?;
    let ended = pod.run_to_end(&shell("input", &node.base()?, "cat; echo end"))?;
    ensure!(ended.stdout() == "end\n", "{:?}", ended.stdout());
    Ok(())
}
