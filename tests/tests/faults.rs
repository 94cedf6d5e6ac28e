//! Bad input and broken machines: each gives a clear error and leaves nothing behind.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cri_api::v1::*;
use bulkhead_tests::cri::refused;
use bulkhead_tests::fake_registry::FakeImage;
use bulkhead_tests::leak::Machine;
use bulkhead_tests::node::{BASE, Scratch, WEB, is_reference};
use bulkhead_tests::request::{Pod, container, shell, sleeper};
use bulkhead_tests::{Cri, Node, Server, archive, log, suite};
use tonic::Code;

suite! {
    unknown_image_is_not_found,
    unreachable_registry_is_unavailable,
    layer_with_other_bytes_is_refused,
    layer_that_breaks_off_is_refused,
    layer_that_ends_early_is_refused,
    layer_with_another_diff_id_is_refused,
    manifest_with_another_digest_is_refused,
    name_that_is_none_is_refused,
    missing_command_fails_at_the_start,
    file_that_is_no_program_fails_at_the_start,
    full_disk_fails_the_pull,
    full_disk_fails_the_pod,
    pod_on_a_disk_that_has_filled_up_can_be_removed,
    full_scratch_disk_is_the_containers_trouble,
    wide_tree_is_removed_from_a_full_scratch_disk,
    machine_without_kvm_still_has_images,
    machine_with_cgroup_v1_still_has_images,
    guest_that_panics_shows_its_console,
    guest_that_never_calls_shows_its_console,
    kernel_that_is_none_is_refused_by_name,
    missing_kernel_is_named,
    vmm_that_refuses_to_run_says_why,
    vmm_that_dies_leaves_a_pod_that_can_be_removed,
}

/// An image no other case uses the layers of: containerd 1.6 keeps what it fetched of a layer under
/// the layer's digest, and never gets over wrong bytes there.
const TO_DAMAGE: &str = "test/zstd:1";

/// A pull that must fail, name every one of `words`, and leave neither image nor file.
fn pull_fails(node: &Node, name: &str, codes: &[Code], words: &[&str]) -> Result<()> {
    let server = node.server()?;
    let before = images_and_files(server)?;
    let message = refused(server.cri.pull(name), codes)?;
    // Not every error of the reference says which layer.
    for word in words.iter().filter(|_| !is_reference()) {
        ensure!(message.contains(word), "{message:?} does not name {word}");
    }
    ensure!(server.cri.image(name)?.is_none(), "{name} is there");
    let after = images_and_files(server)?;
    ensure!(after == before, "before: {before:?}\nafter: {after:?}");
    Ok(())
}

/// Publishes a false image and answers its name with a tag.
fn false_name(node: &Node, repository: &str, image: FakeImage) -> Result<String> {
    let name = node.fake_registry.publish(repository, image, None)?;
    Ok(format!("{name}:1"))
}

/// All images and, where the store is this project's, all files.
fn images_and_files(server: &Server) -> Result<(usize, Vec<PathBuf>)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), found);
            } else {
                found.push(entry.path());
            }
        }
    }
    let mut files = Vec::new();
    if !is_reference() {
        walk(server.root(), &mut files);
        files.sort();
    }
    Ok((server.cri.images(None)?.len(), files))
}

fn unknown_image_is_not_found(node: &Node) -> Result<()> {
    let name = node.registry.name("test/none:1");
    pull_fails(node, &name, &[Code::NotFound], &[&name])?;
    let name = node.registry.name("test/base:none");
    pull_fails(node, &name, &[Code::NotFound], &[&name])
}

fn unreachable_registry_is_unavailable(node: &Node) -> Result<()> {
    // Nobody listens on port 1.
    pull_fails(
        node,
        "127.0.0.1:1/test/base:1",
        &[Code::Unavailable],
        &["127.0.0.1:1"],
    )
}

fn layer_with_other_bytes_is_refused(node: &Node) -> Result<()> {
    let mut image = FakeImage::copy(&node.registry, TO_DAMAGE)?;
    let layer = image.layer(0)?;
    image.corrupt(&layer)?;
    let name = false_name(node, "test/wrong", image)?;
    // Inflating it may fail first, and names the layer as well.
    pull_fails(node, &name, &[Code::DataLoss], &[&layer])
}

fn layer_that_breaks_off_is_refused(node: &Node) -> Result<()> {
    let mut image = FakeImage::copy(&node.registry, TO_DAMAGE)?;
    let layer = image.layer(0)?;
    image.cut(&layer)?;
    let name = false_name(node, "test/cut", image)?;
    pull_fails(node, &name, &[Code::Unavailable, Code::DataLoss], &[&layer])
}

fn layer_that_ends_early_is_refused(node: &Node) -> Result<()> {
    let mut image = FakeImage::copy(&node.registry, BASE)?;
    let layer = image.shorten(0)?;
    let name = false_name(node, "test/short", image)?;
    // The bytes are those of the digest, so the image itself is at fault.
    pull_fails(node, &name, &[Code::FailedPrecondition], &[&layer])
}

fn layer_with_another_diff_id_is_refused(node: &Node) -> Result<()> {
    let mut image = FakeImage::copy(&node.registry, BASE)?;
    image.lie_about_diff_id(1)?;
    let name = false_name(node, "test/lie", image)?;
    pull_fails(node, &name, &[Code::DataLoss], &[])
}

fn manifest_with_another_digest_is_refused(node: &Node) -> Result<()> {
    let digest = format!("sha256:{}", "5".repeat(64));
    let image = FakeImage::copy(&node.registry, BASE)?;
    let registry = &node.fake_registry;
    let repository = registry.publish("test/pinned", image, Some(&digest))?;
    let name = format!("{repository}@{digest}");
    pull_fails(node, &name, &[Code::DataLoss], &[&digest])
}

fn name_that_is_none_is_refused(node: &Node) -> Result<()> {
    for name in ["", "host.test/UPPER/case:1", "a b", "host/image:tag:tag"] {
        refused(node.cri()?.pull(name), &[Code::InvalidArgument])?;
    }
    Ok(())
}

fn missing_command_fails_at_the_start(node: &Node) -> Result<()> {
    start_fails(node, "/no/such/command")
}

fn file_that_is_no_program_fails_at_the_start(node: &Node) -> Result<()> {
    start_fails(node, "/data/kept")
}

fn start_fails(node: &Node, command: &str) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("no-command")?;
    let id = pod.create(&container("none", &node.base()?, &[command]))?;
    let message = refused(
        cri.start(&id),
        &[Code::FailedPrecondition, Code::InvalidArgument],
    )?;
    ensure!(message.contains(command), "{message}");
    let status = cri.container(&id)?;
    ensure!(
        status.state() == ContainerState::ContainerExited,
        "{status:?}"
    );
    ensure!([126, 127, 128].contains(&status.exit_code), "{status:?}");
    ensure!(
        ["StartError", "ContainerCannotRun"].contains(&&*status.reason),
        "{status:?}"
    );
    // The pod takes another.
    let ended = pod.run_to_end(&shell("good", &node.base()?, "echo good"))?;
    ensure!(ended.stdout() == "good\n", "{:?}", ended.stdout());
    Ok(())
}

fn full_disk_fails_the_pull(node: &Node) -> Result<()> {
    let disk = Scratch::mount("full", "size=28m")?;
    let mut plan = node.plan("full");
    plan.root = Some(disk.path().to_owned());
    let server = plan.start()?;
    let name = node.registry.name(WEB);
    let message = refused(server.cri.pull(&name), &[Code::ResourceExhausted])?;
    ensure!(
        message.to_lowercase().contains("no space left"),
        "{message}"
    );
    ensure!(server.cri.image(&name)?.is_none(), "{name} is there");
    // What the failed pull took is given back.
    node.image_on(&server.cri, BASE)?;
    server.stop()
}

/// Fills a file system with one file, and takes it away again for `false`.
fn fill(disk: &Scratch, full: bool) -> Result<()> {
    let file = disk.path().join("filling");
    if !full {
        return Ok(fs::remove_file(file)?);
    }
    let zeros = fs::File::open("/dev/zero")?;
    let written = std::io::copy(&mut zeros.take(1 << 30), &mut fs::File::create(file)?);
    ensure!(written.is_err(), "{} is larger", disk.path().display());
    Ok(())
}

fn full_disk_fails_the_pod(node: &Node) -> Result<()> {
    let disk = Scratch::mount("full-pod", "size=64m")?;
    let mut plan = node.plan("full-pod");
    plan.root = Some(disk.path().to_owned());
    let server = plan.start()?;
    fill(&disk, true)?;
    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config("no-space")?);
    let message = refused(answer, &[Code::ResourceExhausted])?;
    ensure!(
        message.to_lowercase().contains("no space left"),
        "{message}"
    );
    before.settles_again_at(&server)?;
    let left = server.cri.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "{left:?}");
    fill(&disk, false)?;
    Pod::run(&server.cri, node.pod_config("space")?)?;
    server.stop()
}

fn pod_on_a_disk_that_has_filled_up_can_be_removed(node: &Node) -> Result<()> {
    let disk = Scratch::mount("filled-up", "size=64m")?;
    let mut plan = node.plan("filled-up");
    plan.root = Some(disk.path().to_owned());
    let server = plan.start()?;
    let pod = Pod::run(&server.cri, node.pod_config("filled-up")?)?;
    fill(&disk, true)?;
    server.cri.remove_pod(&pod.id)?;
    let left = server.cri.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "{left:?}");
    server.stop()
}

fn full_scratch_disk_is_the_containers_trouble(node: &Node) -> Result<()> {
    let mut plan = node.plan("small");
    plan.settings = "vm.scratch_mib = 64".to_owned();
    let server = plan.start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let pod = Pod::run(&server.cri, node.pod_config("full")?)?;
    let line = "dd if=/dev/zero of=/tmp/fill bs=1M count=200; rm /tmp/fill; echo again > /tmp/small && cat /tmp/small";
    let ended = pod.run_to_end(&shell("writer", &image, line))?;
    ensure!(
        ended.stderr().contains("No space left on device"),
        "{:?} {:?} {:?}",
        ended.status,
        ended.stderr(),
        ended.stdout()
    );
    ensure!(ended.stdout() == "again\n", "{:?}", ended.stdout());
    server.stop()
}

fn wide_tree_is_removed_from_a_full_scratch_disk(node: &Node) -> Result<()> {
    let mut plan = node.plan("wide");
    plan.settings = "vm.scratch_mib = 64".to_owned();
    let server = plan.start()?;
    let image = node.image_on(&server.cri, BASE)?;
    let pod = Pod::run(&server.cri, node.pod_config("wide")?)?;
    let line = "for i in $(seq 1500); do echo /a/$i/x/y; done | xargs mkdir -p; ls /a | wc -l";
    let ended = pod.run_to_end(&shell("wide", &image, line))?;
    ensure!(ended.stdout() == "1500\n", "{}", ended.stderr());
    let line = "while :; do cat /dev/zero >> /fill; echo full; sleep 0.2; done 2>/dev/null";
    let filler = shell("filler", &image, line);
    pod.start(&filler)?;
    while !log::read(&pod.log_path(&filler)).is_ok_and(|lines| !lines.is_empty()) {
        std::thread::sleep(Duration::from_millis(100));
    }
    server.cri.remove(&ended.status.id)?;
    server.stop()
}

fn machine_without_kvm_still_has_images(node: &Node) -> Result<()> {
    // A /dev with everything but kvm.
    let mounts = "d=$(mktemp -d); mount -t tmpfs -o mode=755 devices $d; mkdir $d/net $d/shm; \
        for n in null zero full random urandom tty net/tun; do \
        [ ! -e /dev/$n ] || cp -a /dev/$n $d/$n; done; mount --bind $d /dev";
    images_but_no_pods(node, "no-kvm", mounts, "/dev/kvm")
}

fn machine_with_cgroup_v1_still_has_images(node: &Node) -> Result<()> {
    let mounts = "mount -t tmpfs cgroup /sys/fs/cgroup; \
        mkdir /sys/fs/cgroup/cpu /sys/fs/cgroup/memory /sys/fs/cgroup/pids";
    images_but_no_pods(node, "cgroup-v1", mounts, "cgroup")
}

/// On a machine that cannot run pods the server says why and does everything else.
fn images_but_no_pods(node: &Node, name: &str, mounts: &str, word: &str) -> Result<()> {
    let mut plan = node.plan(name);
    plan.private_mounts = Some(mounts.to_owned());
    let server = plan.start()?;
    server.cri.version(VersionRequest::default())?;
    let ready = server.cri.condition("RuntimeReady")?;
    ensure!(!ready.status && !ready.reason.is_empty(), "{ready:?}");
    ensure!(ready.message.contains(word), "{ready:?}");

    let image = node.image_on(&server.cri, BASE)?;
    ensure!(server.cri.images(None)?.len() == 1, "ListImages");
    ensure!(
        !server
            .cri
            .image_fs_info(ImageFsInfoRequest {})?
            .image_filesystems
            .is_empty(),
        "ImageFsInfo"
    );

    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config(name)?);
    let message = refused(answer, &[Code::FailedPrecondition, Code::Unavailable])?;
    ensure!(message.contains(word), "{message}");
    before.settles_again_at(&server)?;
    server.cri.remove_image_named(&image)?;
    server.stop()
}

/// A directory of programs like the node's, with one file replaced.
fn programs_with(node: &Node, name: &str, file: &str, contents: Option<&[u8]>) -> Result<PathBuf> {
    let directory = node.scratch().join(format!("programs-{name}"));
    fs::create_dir_all(&directory)?;
    for program in ["bulkhead", "bulkhead-vmm", "vmlinux", "initramfs"] {
        let (from, to) = (node.programs().join(program), directory.join(program));
        match contents {
            None if program == file => {}
            Some(contents) if program == file => {
                fs::write(&to, contents)?;
                fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
            }
            _ => drop(fs::copy(&from, &to).with_context(|| from.display().to_string())?),
        }
    }
    Ok(directory)
}

/// Starts a server with one program replaced, expects its pods to fail, and answers the message.
fn pod_fails_with(
    node: &Node,
    name: &str,
    (file, contents): (&str, Option<&[u8]>),
    codes: &[Code],
) -> Result<String> {
    let mut plan = node.plan(name);
    plan.programs = programs_with(node, name, file, contents)?;
    plan.settings = "vm.boot_timeout_seconds = 15".to_owned();
    let server = plan.start()?;
    let before = Machine::look_at(&server)?;
    let answer = server.cri.run_pod(&node.pod_config(name)?);
    let message = refused(answer, codes)?;
    before.settles_again_at(&server)?;
    let left = server.cri.pod_ids(PodSandboxFilter::default())?;
    ensure!(left.is_empty(), "{left:?}");
    server.stop()?;
    fs::remove_dir_all(node.scratch().join(format!("programs-{name}")))?;
    Ok(message)
}

fn guest_that_panics_shows_its_console(node: &Node) -> Result<()> {
    // Nothing to run as init.
    let empty = archive::newc(&[])?;
    let codes = [Code::Internal, Code::Aborted, Code::Unavailable];
    let message = pod_fails_with(node, "panic", ("initramfs", Some(&empty)), &codes)?;
    ensure!(message.contains("Kernel panic - not syncing"), "{message}");
    Ok(())
}

fn guest_that_never_calls_shows_its_console(node: &Node) -> Result<()> {
    // busybox as init: it says a line and waits.
    let busybox = fs::read("/bin/busybox").context("/bin/busybox (package busybox-static)")?;
    let inittab = b"::once:/bin/busybox echo a silent guest is here\n";
    let initramfs = archive::newc(&[
        archive::Entry::directory("bin"),
        archive::Entry::directory("dev"),
        archive::Entry::directory("etc"),
        archive::Entry::character_device("dev/console", 5, 1),
        archive::Entry::program("bin/busybox", &busybox),
        archive::Entry::program("init", &busybox),
        archive::Entry::program("etc/inittab", inittab),
    ])?;
    let codes = [Code::DeadlineExceeded];
    let message = pod_fails_with(node, "silent", ("initramfs", Some(&initramfs)), &codes)?;
    ensure!(message.contains("a silent guest is here"), "{message}");
    Ok(())
}

fn kernel_that_is_none_is_refused_by_name(node: &Node) -> Result<()> {
    let garbage = b"\x7fELF and then nothing of an ELF file".repeat(100);
    let codes = [Code::Internal, Code::FailedPrecondition];
    let message = pod_fails_with(node, "garbage", ("vmlinux", Some(&garbage)), &codes)?;
    ensure!(
        message.contains("kernel") || message.contains("vmlinux"),
        "{message}"
    );
    Ok(())
}

fn missing_kernel_is_named(node: &Node) -> Result<()> {
    let codes = [Code::FailedPrecondition, Code::Unavailable];
    let message = pod_fails_with(node, "missing", ("vmlinux", None), &codes)?;
    ensure!(message.contains("vmlinux"), "{message}");
    Ok(())
}

fn vmm_that_refuses_to_run_says_why(node: &Node) -> Result<()> {
    // Like one of a version that does not know this server's configuration.
    let program = b"#!/bin/sh\necho 'no version 9 is known here' >&2\nexit 3\n";
    let replaced = ("bulkhead-vmm", Some(&program[..]));
    let codes = [Code::Internal, Code::FailedPrecondition];
    let message = pod_fails_with(node, "other-vmm", replaced, &codes)?;
    for words in ["no version 9 is known here", "exit status: 3"] {
        ensure!(message.contains(words), "{message}");
    }
    Ok(())
}

fn vmm_that_dies_leaves_a_pod_that_can_be_removed(node: &Node) -> Result<()> {
    let cri = node.cri()?;
    let pod = node.pod("killed")?;
    let id = pod.start(&sleeper("sleeper", &node.base()?))?;
    let status = Command::new("pkill")
        .args(["-KILL", "-f", "bulkhead-vmm"])
        .status()?;
    ensure!(status.success(), "no VMM to kill");
    wait_until_not_ready(cri, &pod.id)?;
    let status = cri.container(&id)?;
    ensure!(
        status.state() == ContainerState::ContainerExited,
        "{status:?}"
    );
    ensure!(
        cri.exec_for(&id, &["true"], 5).is_err(),
        "an exec in a dead VM"
    );
    cri.stop_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    Ok(())
}

fn wait_until_not_ready(cri: &Cri, pod: &str) -> Result<()> {
    let begun = Instant::now();
    while cri.pod(pod)?.state() == PodSandboxState::SandboxReady {
        if begun.elapsed() > Duration::from_secs(60) {
            bail!("pod {pod} is still ready");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
