//! What a guest and a server see of the VMM. Needs a machine whose KVM boots Linux.

// Everything here is a test; clippy only knows the functions marked as one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use bulkhead_vmm_api::control::{Action, FromVmm, Reply, ToVmm};
use bulkhead_vmm_api::{ExitReason, OpenDevice};
use guest::{Guest, Setup, disk_file, md5};

/// Waits, in a script, until a device is in the window and its driver holds it.
macro_rules! bind {
    ($window:literal) => {
        concat!(
            "until echo virtio-mmio.",
            $window,
            " >$drivers/bind; do sleep 0.02; done 2>/dev/null\n"
        )
    };
}

#[test]
fn a_guest_boots_and_its_reset_ends_the_vmm() {
    let mut guest = Setup::new("echo READY").start();
    guest.line("READY");
    let (status, record) = guest.end();
    assert!(status.success(), "{status}");
    assert_eq!(record.reason, ExitReason::GuestReset);
    assert!(
        record.console_tail.contains("READY"),
        "{}",
        record.console_tail
    );
}

#[test]
fn a_panic_is_told_from_a_reset() {
    let mut guest = Setup::new("exit 3").start();
    let (status, record) = guest.end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(record.reason, ExitReason::GuestPanic);
    assert!(
        record.console_tail.contains("Attempted to kill init"),
        "{}",
        record.console_tail
    );
}

#[test]
fn a_triple_fault_is_told_from_a_reset() {
    let mut setup = Setup::new("reboot -f");
    setup.command_line = "quiet reboot=t,force";
    let (status, record) = setup.start().end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(record.reason, ExitReason::TripleFault);
}

#[test]
fn a_file_that_is_no_kernel_is_named_in_the_record() {
    let mut setup = Setup::new("");
    setup.kernel = Some(disk_file(b"MZ"));
    let (status, record) = setup.start().end();
    assert_eq!(status.code(), Some(1));
    let ExitReason::StartFailed(why) = record.reason else {
        panic!("{:?}", record.reason)
    };
    assert!(
        why.contains("not an uncompressed x86_64 ELF kernel"),
        "{why}"
    );
}

#[test]
fn processors_beyond_the_first_come_online_when_asked() {
    let mut setup = Setup::new(
        "echo CPUS $(nproc)
         for cpu in 1 2 3; do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done
         echo CPUS $(nproc)
         echo SIBLINGS $(cat /sys/devices/system/cpu/cpu3/topology/thread_siblings_list)",
    );
    (setup.vcpus, setup.command_line) = (4, "quiet maxcpus=1");
    let mut guest = setup.start();
    assert_eq!(guest.line("CPUS"), "1");
    assert_eq!(guest.line("CPUS"), "4");
    assert_eq!(guest.line("SIBLINGS"), "3");
}

#[test]
fn memory_goes_on_above_the_hole_for_devices() {
    let mut setup = Setup::new("echo MEMORY $(awk '/MemTotal/ {print $2}' /proc/meminfo)");
    setup.memory = 3584;
    let mut guest = setup.start();
    let kib: u32 = guest.line("MEMORY").parse().unwrap();
    // The kernel keeps some for itself.
    assert!((3300 << 10..3584 << 10).contains(&kib), "{kib}");
}

#[test]
fn a_disk_comes_and_goes_by_its_window() {
    let mut guest = Setup::new(concat!(
        "echo UP\n",
        bind!(2),
        "echo SERIAL $(cat /sys/block/vda/serial) RO $(cat /sys/block/vda/ro)
         echo SUM $(md5sum </dev/vda)\n",
        bind!(3),
        "echo virtio-mmio.2 >$drivers/unbind
         echo DISKS $(ls /sys/block)\n",
        bind!(4),
        bind!(2),
        "cd /sys/bus/platform/devices/virtio-mmio.2/virtio*/block/*
         echo SERIAL $(cat serial) RO $(cat ro)"
    ))
    .start();
    let mut control = guest.control();
    guest.line("UP");
    let bytes: Vec<u8> = (0..1 << 20).map(|n| (n >> 9) as u8).collect();
    let disk = |serial, read_only| {
        OpenDevice::disk(
            serial,
            read_only,
            vec![(disk_file(&bytes).into(), 0, 1 << 20)],
        )
    };
    assert_eq!(control.attach("a", &disk("first", true)).unwrap(), 2);
    assert_eq!(guest.line("SERIAL"), "first RO 1");
    assert_eq!(guest.line("SUM"), format!("{} -", md5(&bytes)));
    let refusal = control
        .request("b", Action::Detach { window: 2 })
        .unwrap_err();
    assert!(
        refusal.to_string().contains("unbind it in the guest first"),
        "{refusal}"
    );
    // The others only tell the guest to go on.
    assert_eq!(control.attach("c", &disk("go", true)).unwrap(), 3);
    assert_eq!(guest.line("DISKS"), "vdb");
    assert_eq!(
        control.request("d", Action::Detach { window: 2 }).unwrap(),
        Reply::Done
    );
    assert_eq!(control.attach("e", &disk("second", false)).unwrap(), 2);
    assert_eq!(control.attach("f", &disk("go", true)).unwrap(), 4);
    assert_eq!(guest.line("SERIAL"), "second RO 0");
    assert_eq!(guest.end().1.reason, ExitReason::GuestReset);
}

#[test]
fn a_disk_out_of_extents_is_read_and_written_as_one() {
    let mut setup = Setup::new(
        "cat /dev/vda | md5sum | sed 's/^/SUM /'
         yes bulkhead | dd of=/dev/vda bs=4k seek=1 count=3 conv=notrunc,fsync 2>/dev/null
         blkdiscard -o 16384 -l 4096 /dev/vda
         echo SUM $(md5sum </dev/vda)
         echo RO $(dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>&1 | grep -c 'not permitted')",
    );
    let (first, second) = (disk_file(&[1; 16384]), disk_file(&[2; 32768]));
    let extents = vec![
        (second.try_clone().unwrap().into(), 16384, 8192),
        (first.try_clone().unwrap().into(), 4096, 12288),
    ];
    let read_only = vec![(first.try_clone().unwrap().into(), 0, 4096)];
    setup.devices = vec![
        OpenDevice::disk("scratch", false, extents),
        OpenDevice::disk("ro", true, read_only),
    ];
    let mut guest = setup.start();
    let mut expected = [vec![2; 8192], vec![1; 12288]].concat();
    assert_eq!(guest.line("SUM"), format!("{}  -", md5(&expected)));
    let text: Vec<u8> = b"bulkhead\n".iter().copied().cycle().take(12288).collect();
    expected[4096..16384].copy_from_slice(&text);
    expected[16384..].fill(0);
    assert_eq!(guest.line("SUM"), format!("{} -", md5(&expected)));
    assert_eq!(guest.line("RO"), "1");
    guest.end();
    let mut on_host = vec![0; 8192];
    second.read_exact_at(&mut on_host, 16384).unwrap();
    assert_eq!(on_host, expected[..8192]);
    first.read_exact_at(&mut on_host, 4096).unwrap();
    assert_eq!(on_host, expected[8192..16384]);
    // What lies beside the extents is untouched.
    first.read_exact_at(&mut on_host[..4096], 0).unwrap();
    assert_eq!(on_host[..4096], [1; 4096]);
}

#[test]
fn all_windows_work_at_once_though_some_share_an_interrupt() {
    let mut setup = Setup::new(
        "cd /sys/block
         for disk in vd*; do
             md5sum /dev/$disk >/dev/$disk.sum &
         done
         wait
         for disk in vd*; do echo DISK $(cat $disk/serial) $(cut -c1-32 /dev/$disk.sum); done
         echo RANDOM $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)
         while :; do sleep 1; done",
    );
    let content = |number: u8| vec![number; 256 << 10];
    setup.memory = 256;
    setup.devices = (2..24)
        .map(|window| {
            let file = disk_file(&content(window));
            OpenDevice::disk(
                &format!("w{window}"),
                true,
                vec![(file.into(), 0, 256 << 10)],
            )
        })
        .collect();
    let mut guest = setup.start();
    let mut control = guest.control();
    for window in 2..24 {
        let line = guest.line("DISK");
        assert_eq!(line, format!("w{window} {}", md5(&content(window))));
    }
    assert_eq!(guest.line("RANDOM"), "64");
    let more = OpenDevice::disk("more", true, vec![(disk_file(&[0; 512]).into(), 0, 512)]);
    if let Err(refusal) = control.attach("more", &more) {
        assert!(refusal.to_string().contains("All 24 windows"), "{refusal}");
    } else {
        panic!("a 25th device was attached");
    }
}

#[test]
fn the_server_pauses_resumes_and_ends_a_guest() {
    let mut guest = Setup::new("while :; do echo TICK; sleep 0.05; done").start();
    guest.line("TICK");
    let mut control = guest.control();
    assert_eq!(control.request("1", Action::Pause).unwrap(), Reply::Done);
    let Reply::Stats {
        paused: true,
        console_tail,
        ..
    } = control.request("2", Action::Stats).unwrap()
    else {
        panic!("the guest is not paused");
    };
    let Reply::Stats {
        console_tail: later,
        ..
    } = control.request("3", Action::Stats).unwrap()
    else {
        panic!("no statistics");
    };
    assert_eq!(console_tail, later);
    assert_eq!(control.request("4", Action::Resume).unwrap(), Reply::Done);
    // What was asked before is answered again, and not done again.
    assert_eq!(control.request("1", Action::Pause).unwrap(), Reply::Done);
    guest.line("TICK");
    // The newest connection is the server.
    let mut newer = guest.control();
    assert_eq!(newer.request("5", Action::Resume).unwrap(), Reply::Done);
    assert!(control.request("6", Action::Stats).is_err());
    assert_eq!(newer.request("7", Action::Shutdown).unwrap(), Reply::Done);
    let (status, record) = guest.end();
    assert!(status.success(), "{status}");
    assert_eq!(record.reason, ExitReason::Shutdown);
}

#[test]
fn a_paused_guest_can_be_ended() {
    let mut setup = Setup::new("echo UP; while :; do :; done");
    setup.vcpus = 2;
    let mut guest = setup.start();
    guest.line("UP");
    let mut control = guest.control();
    control.request("1", Action::Pause).unwrap();
    control.request("2", Action::Shutdown).unwrap();
    assert_eq!(guest.end().1.reason, ExitReason::Shutdown);
}

#[test]
fn a_stream_for_a_dial_that_was_never_made_is_closed() {
    let mut guest = Setup::new("echo UP; while :; do sleep 1; done").start();
    guest.line("UP");
    let mut control = guest.control();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let fds = [std::os::fd::AsFd::as_fd(&theirs)];
    control.send(&ToVmm::Stream { stream: 77 }, &fds).unwrap();
    drop(theirs);
    // The end of the stream, which can only come when the VMM's copy is closed.
    assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
    assert!(matches!(
        control.request("1", Action::Shutdown),
        Ok(Reply::Done)
    ));
    assert!(!matches!(control.receive(), Ok(Some(FromVmm::Dial { .. }))));
}

#[test]
fn the_vmm_is_confined() {
    let mut guest = Setup::new("echo UP; while :; do sleep 1; done").start();
    guest.line("UP");
    let of = |file: &str| format!("/proc/{}/{file}", guest.vmm.pid());
    let status = std::fs::read_to_string(of("status")).unwrap();
    let field = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(std::fs::read_dir(of("root/")).unwrap().count(), 0);
    let mounts = std::fs::read_to_string(of("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let link = |path: String| std::fs::read_link(path).unwrap();
        let ours = link(format!("/proc/self/ns/{namespace}"));
        assert_ne!(link(of(&format!("ns/{namespace}"))), ours, "{namespace}");
    }
    let limits = std::fs::read_to_string(of("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert!(
        core.split_whitespace()
            .skip(4)
            .take(2)
            .all(|limit| limit == "0"),
        "{core}"
    );
    // Nothing is open but what was given and what KVM and events are.
    for entry in std::fs::read_dir(of("fd")).unwrap() {
        let target = std::fs::read_link(entry.unwrap().path()).unwrap();
        let target = target.to_string_lossy();
        let known = [
            "anon_inode:",
            "socket:",
            "pipe:",
            "/memfd:",
            "/dev/null",
            "/dev/kvm",
        ];
        let messages = std::fs::read_link("/proc/self/fd/2").unwrap();
        let known = known.iter().any(|known| target.starts_with(known));
        assert!(
            known || target == messages.to_string_lossy(),
            "{target} is open"
        );
    }
}

#[test]
fn the_vmm_lives_in_the_cgroup_it_was_given() {
    let cgroup = Path::new("/sys/fs/cgroup/bulkhead-vmm-test");
    std::fs::create_dir(cgroup).expect("the boot tests need cgroup v2");
    let mut setup = Setup::new("echo UP; while :; do sleep 1; done");
    setup.cgroup = File::options()
        .write(true)
        .open(cgroup.join("cgroup.procs"))
        .ok();
    let mut guest = setup.start();
    guest.line("UP");
    let membership = std::fs::read_to_string(format!("/proc/{}/cgroup", guest.vmm.pid()));
    assert!(membership.unwrap().ends_with("/bulkhead-vmm-test\n"));
    guest.control().request("1", Action::Shutdown).unwrap();
    guest.end();
    std::fs::remove_dir(cgroup).expect("nothing is left in the cgroup");
}

#[test]
fn a_vmm_that_is_killed_leaves_no_record() {
    let mut guest: Guest = Setup::new("echo UP; while :; do sleep 1; done").start();
    guest.line("UP");
    guest.vmm.kill().unwrap();
    assert_eq!(guest.vmm.wait().unwrap().signal(), Some(9));
    assert!(guest.record().is_none());
}
