//! Boots a kernel in a VM and shows its console: `boot VMM KERNEL INITRAMFS MIB VCPUS COMMAND-LINE
//! [DISK…]`. Ends with the VM and tells why it ended.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;

use bulkhead_vmm_api::{Control, ExitRecord, Launch, OpenDevice};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vmm, kernel, initramfs, mib, vcpus, command_line, disks @ ..] = &arguments[..] else {
        return Err("boot VMM KERNEL INITRAMFS MIB VCPUS COMMAND-LINE [DISK…]".into());
    };
    let socket = std::env::temp_dir().join(format!("boot-{}.sock", std::process::id()));
    let record = rustix::fs::memfd_create("exit-record", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut devices = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let file = File::options().read(true).write(true).open(disk)?;
        let length = file.metadata()?.len();
        devices.push(OpenDevice::disk(
            &format!("disk{number}"),
            false,
            vec![(file.into(), 0, length)],
        ));
    }
    let launch = Launch {
        program: vmm.into(),
        id: "boot".into(),
        kvm: File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")?
            .into(),
        kernel: File::open(kernel)?.into(),
        initramfs: Some(File::open(initramfs)?.into()),
        command_line: command_line.clone(),
        memory_mib: mib.parse()?,
        vcpus: vcpus.parse()?,
        guest_cid: 3,
        control: Control::listen(&socket)?,
        exit_record: record.try_clone()?,
        console: Some(std::io::stdout().as_fd().try_clone_to_owned()?),
        devices,
        cgroup_procs: None,
        messages: Some(std::io::stderr().as_fd().try_clone_to_owned()?),
    };
    let status = launch.spawn()?.wait()?;
    std::fs::remove_file(&socket)?;
    match ExitRecord::read(&record)? {
        Some(record) => eprintln!("boot: {}; {status}", record.reason),
        None => eprintln!("boot: the VMM left no record; {status}"),
    }
    Ok(())
}
